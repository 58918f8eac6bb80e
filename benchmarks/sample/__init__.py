"""The sample checkpoint: a small FLUX.2 that this project trains on pictures it draws itself, and its judge."""
