"""What a method has to beat at the same cost: a random choice of tokens, and bundles of other kinds."""
