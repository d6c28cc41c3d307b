"""Ollama's API, for the clients that speak it: what a request may say, and how its answer is written."""
