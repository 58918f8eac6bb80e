"""Run parts in TensorRT."""
