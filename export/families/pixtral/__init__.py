"""Mistral 3: Pixtral's tower at a picture's own size, rows of tokens with marks between them."""
