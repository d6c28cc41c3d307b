"""Who does the work of a calibration: this process, or a Ray cluster."""
