"""What the reader's training has and the first model's has not: it grows out of the first model."""
