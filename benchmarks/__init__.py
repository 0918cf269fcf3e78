"""Measurements of this project, run from the checkout: `python -m benchmarks.forward`."""
