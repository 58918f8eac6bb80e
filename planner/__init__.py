"""What fits on a GPU, how fast it is and what it costs: the planner and the doctor."""
