"""TensorRT and TensorRT-RTX: the library, the store of built engines, running them."""
