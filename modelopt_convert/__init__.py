"""mopt: convert NVIDIA ModelOpt exports of diffusion transformers into repos that serving engines load right."""

__version__ = "0.1.0"
