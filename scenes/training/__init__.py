"""Training of the built-in model; not shipped."""
