"""ONNX artifacts to TensorRT plans; `command` and `plan` need neither TensorRT nor a GPU."""
