"""A quantized artifact from an exported one."""
