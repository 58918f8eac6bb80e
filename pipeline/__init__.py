"""From a prompt to an image in one process, without a server."""
