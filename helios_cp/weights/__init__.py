"""From what `--model` names to loaded parts.

`load` finds a checkpoint and loads its VAE, text encoder and scheduler; `transformer` loads the transformer, with the
part of it that `placement` says, quantised by `quantize`, and with the adapters that `lora` reads merged into it.
`loader` is all of this as one object. `presets` writes tiny checkpoints. `python -m helios_cp.weights` quantises one.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Loader", "load_text_encoder", "load_transformer", "load_vae", "resolve"]

_FILES = {
    "Loader": "loader",
    "load_text_encoder": "load",
    "load_transformer": "transformer",
    "load_vae": "load",
    "resolve": "load",
}


def __getattr__(name: str) -> Any:
    """Import a file only when one of its names is asked for, because it loads torch."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
