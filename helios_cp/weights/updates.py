"""What adapters make of a weight, by PEFT's formulas, in fp32. `scale` holds the strength that the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Update(Protocol):
    """One step from the weight of a checkpoint to that of the adapted model."""

    def apply(self, total: Tensor, weight: Tensor) -> Tensor:
        """The next `total`, in fp32: `weight` is the checkpoint's, whole, `total` what earlier updates made of it."""


class Addition(Protocol):
    """An update that adds to the weight something that does not depend on it."""

    scale: float

    def product(self, like: Tensor) -> Tensor:
        """What to add, in fp32, with the shape and on the device of `like`. Raises `RuntimeError` if it cannot be."""

    def apply(self, total: Tensor, weight: Tensor) -> Tensor:
        return total + self.product(weight)


@dataclass(frozen=True)
class Difference(Addition):
    """`scale · tensor`: what `.diff`, `.diff_b` and the bias of a LoRA are."""

    tensor: Tensor
    scale: float

    def product(self, like: Tensor) -> Tensor:
        return self.scale * self.tensor.to(like.device, torch.float32)


@dataclass(frozen=True)
class Factors(Addition):
    """`scale · join(sides)`. A side is one matrix, or the product of two, `[N, r]` and `[r, K]`.

    LoRA has one side, up · down (Hu et al., arXiv 2106.09685). LoHa multiplies two sides element by element (Hyeon-Woo
    et al., arXiv 2108.06098), and LoKr takes their Kronecker product (Yeh et al., arXiv 2309.14859).
    """

    sides: tuple[tuple[Tensor, ...], ...]
    scale: float
    join: Callable[..., Tensor] = lambda side: side

    def product(self, like: Tensor) -> Tensor:
        sides = [_multiplied(factors, like.device) for factors in self.sides]
        return self.scale * self.join(*sides).unflatten(1, like.shape[1:])


@dataclass(frozen=True)
class Decomposed:
    """DoRA: rows of `weight + update` get the lengths `magnitude` `[N]` (Liu et al., arXiv 2402.09353).

    The factor of a row comes from the checkpoint's weight and this update alone. It scales what earlier updates added
    too, as in PEFT while adapters are not merged. So the order of adapters matters where one of them is a DoRA.
    """

    update: Addition
    magnitude: Tensor

    def apply(self, total: Tensor, weight: Tensor) -> Tensor:
        product = self.update.product(weight)
        lengths = (weight + product).flatten(1).norm(dim=1).clamp(min=1e-12)  # a row of zeros stays one
        factors = self.magnitude.to(weight.device, torch.float32) / lengths
        return factors.view(-1, *[1] * (weight.ndim - 1)) * (total + product)


def merged(weight: Tensor, updates: Iterable[Update]) -> Tensor:
    """A whole weight of the checkpoint after all updates, in fp32."""
    weight = weight.float()
    total = weight
    for update in updates:
        total = update.apply(total, weight)
    return total


def _multiplied(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """One matrix, or the product of two."""
    first, *others = (factor.to(device, torch.float32).flatten(1) for factor in factors)
    return first @ others[0] if others else first
