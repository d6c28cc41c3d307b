"""Where answers and alerts go: lines, pictures, the counts of a watch, a user's command, a URL."""
