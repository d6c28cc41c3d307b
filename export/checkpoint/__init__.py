"""A Hugging Face model folder: what it says, and its weights, read one at a time."""
