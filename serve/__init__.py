"""Serving: write a Triton model repository, run it, and ask it for images."""
