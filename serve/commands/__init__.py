"""The commands of `serve`."""
