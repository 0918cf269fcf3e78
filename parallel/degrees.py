"""Degrees of parallelism: how many ranks share each kind of work, checked against the ranks there are. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Degrees:
    """How many ranks share each kind of work. Raises `ValueError` for a degree below 1."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    ffn_tp: int = 1
    vae: int = 1

    def __post_init__(self) -> None:
        for name in ("cfg", "ring", "ulysses", "ffn_tp", "vae"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is allowed")

    @property
    def sequence(self) -> int:
        """Ranks over which one sequence is sharded."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.cfg * self.sequence

    def __str__(self) -> str:
        folded = "".join(f" {name} {getattr(self, name)}" for name in ("ffn_tp", "vae") if getattr(self, name) > 1)
        return f"cfg {self.cfg} ring {self.ring} ulysses {self.ulysses}{folded}"

    def check(
        self, world_size: int, *, guidance: bool, heads: int, smallest_tokens: int, vae_rows: int | None = None
    ) -> None:
        """Raises `ValueError` in one line: the value, what is allowed, and the nearest layouts that work.

        `guidance`: whether there are two branches to share out. `heads`: attention heads. `smallest_tokens`: sharded
        tokens of the smallest stage. `vae_rows`: rows of the VAE's coarsest grid, where it is to be split.
        """
        problem = None
        if self.cfg not in ((1, 2) if guidance else (1,)):
            problem = f"cfg {self.cfg}: allowed is {'1 or 2' if guidance else '1, as there is no guidance'}"
        elif self.world != world_size:
            problem = f"{self}: cfg · ring · ulysses is {self.world} but must equal the world size {world_size}"
        elif self.ulysses > heads:
            problem = f"ulysses {self.ulysses}: at most {heads} is allowed, the number of heads"
        elif self.sequence > smallest_tokens:
            problem = (
                f"ring {self.ring} · ulysses {self.ulysses}: at most {smallest_tokens} sequence ranks are allowed, "
                "the tokens of the smallest stage"
            )
        if problem:
            allowed = layouts(world_size, guidance, heads, smallest_tokens)
            nearest = sorted(allowed, key=self._distance)[:3]
            raise ValueError(f"{problem}; nearest that work: {' or '.join(map(str, nearest))}")
        for name, degree, rows in (("ffn_tp", self.ffn_tp, None), ("vae", self.vae, vae_rows)):
            fits = [d for d in range(1, self.sequence + 1) if self.sequence % d == 0 and (rows is None or d <= rows)]
            if degree not in fits:
                at_most = "" if rows is None else f" and be at most {rows}, the rows of its coarsest grid"
                raise ValueError(
                    f"{name} {degree}: must divide or equal the sequence group of {self.sequence} "
                    f"(ring {self.ring} · ulysses {self.ulysses}){at_most}; allowed are {', '.join(map(str, fits))}"
                )

    def _distance(self, other: Degrees) -> float:
        """How far apart two layouts are, by the ratios of their degrees."""
        return sum(abs(math.log(getattr(self, name) / getattr(other, name))) for name in ("cfg", "ring", "ulysses"))


def layouts(world_size: int, guidance: bool, heads: int, smallest_tokens: int) -> list[Degrees]:
    """Every cfg, ring and ulysses that works on `world_size` ranks.

    Raises `ValueError`, naming the nearest number of ranks that works, when there is none.
    """
    found = list(_layouts(world_size, guidance, heads, smallest_tokens))
    if not found:
        fewer = next(n for n in range(world_size - 1, 0, -1) if any(_layouts(n, guidance, heads, smallest_tokens)))
        raise ValueError(
            f"no layout of {world_size} ranks works with {heads} heads and {smallest_tokens} tokens at the smallest "
            f"stage; the nearest number of ranks that does is {fewer}"
        )
    return found


def _layouts(world_size: int, guidance: bool, heads: int, smallest_tokens: int) -> Iterator[Degrees]:
    for cfg in (1, 2) if guidance else (1,):
        for ulysses in range(1, min(heads, world_size) + 1):
            if world_size % (cfg * ulysses) == 0 and world_size // cfg <= smallest_tokens:
                yield Degrees(cfg, world_size // cfg // ulysses, ulysses)


def default_degrees(
    world_size: int, guidance: bool, heads: int, smallest_tokens: int, vae_rows: int | None = None
) -> Degrees:
    """A sound layout of `world_size` ranks: cfg first, then ulysses as far as the heads allow, ring outside.

    Sharing out the two branches of guidance costs one exchange a step, so it comes first where the world is even.
    Ulysses moves fewer bytes than a ring on the same ranks. With `vae_rows`, the VAE is split over as many ranks of the
    sequence group as have a row each; without it the VAE is not split. Raises `ValueError` where no layout works.
    """
    best = max(
        layouts(world_size, guidance, heads, smallest_tokens), key=lambda degrees: (degrees.cfg, degrees.ulysses)
    )
    vae = max(d for d in range(1, best.sequence + 1) if best.sequence % d == 0 and d <= (vae_rows or 1))
    return Degrees(best.cfg, best.ring, best.ulysses, vae=vae)
