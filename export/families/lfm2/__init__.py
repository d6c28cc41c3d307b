"""Families whose decoder is LFM2: short convolutions, and attention in some layers."""
