"""The names of each model family: diffusers' and the model's own, and which rows lie where.

One table of rows a family says both ways what the other naming calls a module, pure and without torch. Nothing here
knows how a module is quantized: companions of a weight share its module, and move with it.
"""
