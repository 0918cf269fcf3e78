"""The command `python -m benchmarks.gpu_suite`: all that one big card can show, in one run."""
