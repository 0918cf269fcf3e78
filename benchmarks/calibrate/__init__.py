"""The command `python -m benchmarks.calibrate`: measures this machine for the planner."""
