"""NVIDIA's real TensorRT bindings as the yardstick of the engine code, where neither TensorRT nor a GPU is."""
