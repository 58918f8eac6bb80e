"""Load on a deployment: capacity, latency at shares of it, policies beside each other, and the planner's prediction."""
