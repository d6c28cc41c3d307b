"""Bundles behind the names of transformers' models, for code that has `model.generate(**inputs)`."""
