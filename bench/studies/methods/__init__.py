"""`make methods`: every method side by side on the built-in model's exam, and the pages made from it."""
