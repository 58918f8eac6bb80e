"""Would TensorRT take every node of a graph?"""
