"""The command `python -m benchmarks.forward`: FLOPs, kernels, memory traffic and time of a forward."""
