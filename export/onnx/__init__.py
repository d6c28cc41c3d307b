"""Torch modules to ONNX files: tracing, clean-up, external data, graphs in slices."""
