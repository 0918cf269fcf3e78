"""Exact, distributed inference for the Helios video diffusion transformer."""

__version__ = "0.1.0"
