"""Compile a checkpoint with AOTInductor."""
