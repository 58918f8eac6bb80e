"""Build TensorRT plans from ONNX artifacts; `options` and `refuse` need neither TensorRT nor a GPU."""
