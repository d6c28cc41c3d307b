"""The CUDA driver, asked without a toolkit and without torch: devices, memory, one stream."""
