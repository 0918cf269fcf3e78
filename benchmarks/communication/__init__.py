"""The command `python -m benchmarks.communication`: bytes and calls that each rank sends."""
