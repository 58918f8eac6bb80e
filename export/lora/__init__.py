"""Adapters (LoRA, LoKr) read from any of the file styles in use and added to the weights that an export points at."""
