"""The command `python -m benchmarks.fps`: frames a second end to end, beside diffusers."""
