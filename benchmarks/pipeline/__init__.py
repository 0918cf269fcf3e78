"""The command `python -m benchmarks.pipeline`: overlap and cost of the chunk pipeline on Ray."""
