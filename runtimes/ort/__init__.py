"""Run parts in ONNX Runtime."""
