"""Checkpoint to ONNX: graphs traced without loading a weight, weights left where they lie."""
