"""What quantization does to pictures: pipelines that run, modules emulated as an engine runs them, and figures of both.

The emulation tests itself where it runs, before anything is compared. The library diffusers is imported inside
functions, since it comes with the extra ``fidelity``.
"""
