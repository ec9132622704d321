"""Inputs on the Hugging Face Hub, read by ranges or from the cache.

huggingface_hub is imported on use, so that start-up stays fast. What is published there is a matter of the push
command, and does not belong here.
"""
