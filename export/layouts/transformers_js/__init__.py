"""A bundle as a folder that npm's @huggingface/transformers (4.x) loads unmodified."""
