"""Parts in TensorRT."""
