"""The command `python -m benchmarks.guard`: exact counts that must not change unnoticed."""
