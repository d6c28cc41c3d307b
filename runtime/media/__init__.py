"""Pictures and videos in, and the picture that shows which tokens were kept."""
