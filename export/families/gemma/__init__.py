"""PaliGemma and Gemma 3: a whole SigLIP tower, visual tokens that see ahead."""
