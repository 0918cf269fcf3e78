"""Memory for a model that was built on the meta device."""

from __future__ import annotations

import torch
from torch import nn


def allocate(model: nn.Module, device: str | torch.device) -> None:
    """As `to_empty`, whose `empty_like` of a meta tensor has torch import sympy, a third of a second.

    Sharded parameters are of a kind of their own, which `to_empty` knows.
    """
    if not all(type(parameter) is nn.Parameter for parameter in model.parameters()):
        model.to_empty(device=device)
        return
    model._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device))
