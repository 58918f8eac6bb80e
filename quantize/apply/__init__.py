"""Quantize an exported artifact by a recipe."""
