"""Exact, distributed inference for the Helios video diffusion transformer."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "Request"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then (PEP 562): a command line answers `--help` without torch."""
    if name == "Pipeline":
        from helios_cp.pipeline.pipeline import Pipeline

        return Pipeline
    if name == "Request":
        from helios_cp.config.request import Request

        return Request
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
