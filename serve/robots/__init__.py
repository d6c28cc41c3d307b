"""Robots: nodes that answer a standing question about the newest picture of a topic. No torch."""
