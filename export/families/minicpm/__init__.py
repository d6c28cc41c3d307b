"""MiniCPM-V 4.6: a tower that merges patches on the way, and Qwen3.5's decoder."""
