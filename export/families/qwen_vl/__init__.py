"""The Qwen-VL families: patches at the picture's own size, positions along three axes."""
