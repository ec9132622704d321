"""The Hugging Face Hub: what is read from it, and what is published there. huggingface_hub is imported on use."""
