"""The command `python -m benchmarks.report`: results become a page and plots."""
