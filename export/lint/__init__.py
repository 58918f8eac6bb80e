"""Check whether TensorRT supports every node of a graph, without TensorRT or a GPU."""
