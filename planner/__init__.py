"""Plan capacity and check machines: what fits on a GPU, how fast it is and what it costs."""
