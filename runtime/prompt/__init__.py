"""Between words and token ids: messages, chat template, tokenizer, stop strings."""
