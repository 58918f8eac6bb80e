"""Measure the parts of FLUX.2 on a GPU in every mode, relative to the ceilings of the card."""
