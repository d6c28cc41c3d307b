"""Families whose visual tokens are several patches of a tile: InternVL, Idefics3, SmolVLM."""
