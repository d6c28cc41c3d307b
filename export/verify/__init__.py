"""Fidelity checks: what an export is held to."""
