"""The command `python -m benchmarks.deviation`: how far each inexact choice moves the latents."""
