"""The LLaVA families: CLIP or SigLIP tower, tiles, frames."""
