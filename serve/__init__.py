"""Write a Triton model repository, run it, and request images from it."""
