"""The command `python -m benchmarks.attention`: attention engines side by side."""
