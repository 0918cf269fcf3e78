"""A transformer of shapes alone: its weights have no memory and no values, so that it is made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.transformer import HeliosTransformer


def empty_model(config: TransformerConfig, dtype: torch.dtype) -> HeliosTransformer:
    """On the meta device, cast as the engine casts it."""
    with torch.device("meta"), _NoValues():
        model = HeliosTransformer(config)
    return model.cast(dtype)


class _NoValues(TorchFunctionMode):
    """Random initial values are left out. To scale them without memory, torch would load all of its compiler: 1 s."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.Tensor.div, torch.Tensor.__truediv__):
            return args[0]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))
