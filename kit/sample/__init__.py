"""The sample: a small FLUX.2 that ships with the kit, the world it generates, and a judge that reads its images."""
