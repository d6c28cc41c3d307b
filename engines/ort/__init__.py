"""ONNX Runtime: sessions behind the Engine interface, and where it placed a graph's nodes."""
