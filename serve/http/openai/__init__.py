"""OpenAI's chat completions: what a request may say, and how its answer is written."""
