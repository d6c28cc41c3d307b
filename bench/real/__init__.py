"""Real checkpoints on public question sets, in one command, beside the figures that papers give."""
