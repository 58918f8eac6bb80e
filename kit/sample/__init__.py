"""The shipped sample: a small FLUX.2, the grammar and drawings of its world, and a judge that reads its images."""
