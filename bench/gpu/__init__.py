"""Everything that waits for a GPU."""
