"""Compile a checkpoint with AOTInductor."""

RECIPES = ("fp32", "bf16", "fp8", "int8", "int8-weights")  # that have a form in torch (linears.py)
