"""Run parts that AOTInductor compiled, in torch."""
