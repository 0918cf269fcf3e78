"""The command `python -m benchmarks.scaling`: a forward on more and more ranks."""
