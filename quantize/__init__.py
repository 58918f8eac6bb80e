"""From a high-precision artifact to a quantized one, calibrated on prompts and proven on images."""
