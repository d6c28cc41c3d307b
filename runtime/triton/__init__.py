"""A bundle as a model repository of NVIDIA's Triton server."""
