"""The sample: a small FLUX.2 that ships with the kit, the world it paints, and a judge that reads its pictures."""
