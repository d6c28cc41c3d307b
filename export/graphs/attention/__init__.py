"""Attention as the graphs need it: grouped queries, a fixed cache, plain operators."""
