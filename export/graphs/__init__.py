"""Wrapped modules with named inputs and outputs, one per graph of a bundle, and how they become ONNX."""
