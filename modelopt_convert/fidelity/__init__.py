"""What quantization does to pictures: pipelines that run, modules emulated as an engine runs them, and figures of both.

diffusers is imported inside functions: it comes with the extra ``mopt[fidelity]``.
"""
