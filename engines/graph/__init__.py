"""A graph file without the onnx package: read, checked as a stranger's, its memory told."""
