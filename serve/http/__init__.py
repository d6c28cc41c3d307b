"""The HTTP server: OpenAI's and Ollama's endpoints over `vtp.runtime.scheduler`."""
