"""Linear layers over one input, fused to one, under the names that checkpoints have for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear(nn.Linear):
    """Several linear layers over one input as one matrix product.

    In a state dict it appears as the separate layers `names` (siblings of this module, views of the fused weight), so
    that checkpoints keep the names of diffusers and can be copied into place.
    """

    def __init__(self, in_features: int, out_features: int, names: tuple[str, ...]) -> None:
        super().__init__(in_features, out_features * len(names))
        self.names = names

    def project(self, states: Tensor, first: int, last: int) -> Tensor:
        """Only the layers `first` to `last` (exclusive)."""
        width = self.out_features // len(self.names)
        rows = slice(first * width, last * width)
        return F.linear(states, self.weight[rows], self.bias[rows])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
        for kind, fused in (("weight", self.weight), ("bias", self.bias)):
            for name, part in zip(self.names, fused.chunk(len(self.names)), strict=True):
                destination[f"{parent}{name}.{kind}"] = part if keep_vars else part.detach()

    @staticmethod
    def gather_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Load hook for the module that holds fused layers: joins the separate layers of a state dict."""
        for child_name, child in module.named_children():
            if not isinstance(child, FusedLinear):
                continue
            for kind in ("weight", "bias"):
                keys = [f"{prefix}{name}.{kind}" for name in child.names]
                if all(key in state_dict for key in keys):
                    state_dict[f"{prefix}{child_name}.{kind}"] = torch.cat([state_dict.pop(key) for key in keys])


def stored_names(path: str, module: nn.Module, kind: str) -> list[str]:
    """The tensors of a checkpoint that make up a module's `weight` or `bias` (or other `kind`), from top to bottom."""
    if not isinstance(module, FusedLinear):
        return [f"{path}.{kind}" if path else kind]
    parent = path.rpartition(".")[0]
    return [f"{parent}.{name}.{kind}" for name in module.names]
