"""llama.cpp as a peer: the same weights as GGUF, its own server, its own report of times."""
