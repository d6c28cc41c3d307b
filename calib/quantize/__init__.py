"""How few bits: what flows through the layers, rounding, a bundle written in fewer bits."""
