"""Full-size models with random weights: speed without a download."""
