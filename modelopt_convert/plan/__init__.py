"""What the output will be, tensor by tensor, from headers and configs alone.

Every tensor of every input gets a fate here, and every output tensor a step. Nothing here opens a file, reads a
tensor or imports torch.
"""
