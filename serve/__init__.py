"""Long-running ways in: the HTTP server and its page. Never torch, transformers."""
