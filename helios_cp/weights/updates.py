"""What adapters make of a weight, by PEFT's formulas, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """Adds `scale · join(sides)` to a weight. `scale` holds the strength that the user asked for.

    A side is one matrix, or two to multiply, `[N, r]` and `[r, K]`. A plain difference has one side of one matrix, and
    LoRA one of two, up · down (Hu et al., arXiv 2106.09685). LoHa multiplies two sides element by element
    (Hyeon-Woo et al., arXiv 2108.06098), and LoKr takes their Kronecker product (Yeh et al., arXiv 2309.14859).

    With DoRA the rows of the sum get the lengths `magnitude` `[N]` (Liu et al., arXiv 2402.09353). The factor of a row
    comes from the checkpoint's weight and this update alone. It scales what earlier updates added too, as in PEFT while
    adapters are not merged. So the order of adapters matters where one of them is a DoRA.
    """

    sides: tuple[tuple[Tensor, ...], ...]
    scale: float
    join: Callable[..., Tensor] = lambda side: side
    magnitude: Tensor | None = None

    def product(self, like: Tensor) -> Tensor:
        """What is added, in fp32, with the shape and on the device of `like`. Raises `RuntimeError` if it cannot be."""
        sides = []
        for side in self.sides:
            first, *others = (factor.to(like.device, torch.float32).flatten(1) for factor in side)
            sides.append(first @ others[0] if others else first)
        joined = self.join(*sides)
        return self.scale * (joined.unflatten(1, like.shape[1:]) if like.ndim > 1 else joined.flatten())

    def apply(self, total: Tensor, weight: Tensor) -> Tensor:
        """The next `total`, in fp32: `weight` is the checkpoint's, whole, `total` what earlier updates made of it."""
        product = self.product(weight)
        if self.magnitude is None:
            return total + product
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
