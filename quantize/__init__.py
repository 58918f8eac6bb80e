"""Calibrate, quantize and evaluate artifacts: the same images from smaller or faster weights."""
