"""The typed results of commands, as they stand in JSON.

A model here says what is reported and in which words; fields are only added. Nothing here finds anything out, opens a
file or imports torch.
"""
