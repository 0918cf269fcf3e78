"""Exact, distributed inference for the Helios video diffusion transformer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
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


def _import_own_parallel() -> None:
    """Import the package `parallel` that came with this one, where Python would find another one of that name first.

    Python looks in the folder of the call before it looks where packages are installed, and `parallel` is a name that
    users give to folders of their own.
    """
    own = Path(__file__).parents[1] / "parallel" / "__init__.py"
    found = importlib.util.find_spec("parallel")
    if "parallel" in sys.modules or not own.exists() or (found and found.origin and own.samefile(found.origin)):
        return
    spec = importlib.util.spec_from_file_location("parallel", own, submodule_search_locations=[str(own.parent)])
    sys.modules["parallel"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_own_parallel()
