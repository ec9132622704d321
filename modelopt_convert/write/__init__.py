"""From a plan to bytes in the stage: pieces of tensors, on threads, on a GPU, or as tasks of a cluster.

Who does the work changes no byte. What is to be written is decided by the plan, and not here.
"""
