"""Walks a bundle's stages: the runner, the KV cache, and what is kept from one prompt to the next."""
