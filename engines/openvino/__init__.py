"""OpenVINO: the graphs of target ort on the CPU, and on the GPUs and NPUs that it lists."""
