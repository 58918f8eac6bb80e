"""Export checkpoints to ONNX without loading their weights; graphs reference the original weight files."""
