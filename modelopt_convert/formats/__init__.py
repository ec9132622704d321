"""The arithmetic and the facts of quantization formats: a folder a format, and what all of them share.

Functions are pure: no paths, no config, no logging, and no argument is ever changed. Who names tensors how is a
matter of dialects, and does not belong here.
"""
