"""One module an area; each has an `Area` that draws cases and runs them."""
