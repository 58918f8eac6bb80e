"""Parts in ONNX Runtime."""
