"""One module a level of ``mopt verify``: record, container, layout, decode, kernels.

What a format needs for the stored bytes is the module with the format's name. A level returns what it found, and
concludes nothing about the others.
"""
