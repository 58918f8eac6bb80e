"""Generate images from prompts in one process, without a server."""
