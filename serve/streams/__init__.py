"""Cameras and videos: the newest frame, the standing question, the answers. Never torch, transformers."""
