"""The command `python -m benchmarks.decode`: VAE decoding, whole and split."""
