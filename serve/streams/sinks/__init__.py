"""Where answers and alerts go: lines, pictures and videos, the counts of a watch, a user's command, a URL."""
