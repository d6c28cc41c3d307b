"""Bundles of the Hugging Face hub: named, fetched into its cache, checked, and found there again."""
