"""The command `python -m benchmarks.validate_plan`: the planner's seconds against measured ones."""
