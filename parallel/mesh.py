"""Degrees of parallelism, checked against the world they run in, and the process groups made from them.

Ranks are numbered with cfg outermost, then ring, then ulysses: `rank = (cfg · R + ring) · U + ulysses`. Neighbouring
ranks usually share a node, so the all-to-all of Ulysses stays on it and the ring's point-to-point crosses nodes. The
sequence group is the ring × ulysses ranks of one cfg branch; the tensor-parallel FFN and the VAE are folded over
consecutive ranks of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.collectives import Group, Meter

AXES = ("world", "cfg", "sequence", "ring", "ulysses", "ffn_tp", "vae")


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
        self,
        world_size: int,
        *,
        guidance: bool,
        heads: int,
        smallest_tokens: int,
        vae_rows: int | None = None,
    ) -> None:
        """Raises `ValueError` in one line: the value, what is allowed, and the nearest layouts that work.

        `guidance`: whether there are two branches to share out. `heads`: attention heads. `smallest_tokens`: sharded
        tokens of the smallest stage. `vae_rows`: rows of the VAE's coarsest grid, where it is to be split.
        """
        allowed = layouts(world_size, guidance, heads, smallest_tokens)
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
            nearest = sorted(allowed, key=self._distance)[:3]
            raise ValueError(f"{problem}; nearest that work: {' or '.join(map(str, nearest))}")
        for name in ("ffn_tp", "vae"):
            self._check_folded(name, vae_rows if name == "vae" else None)

    def _distance(self, other: Degrees) -> float:
        """How far apart two layouts are, by the ratios of their degrees."""
        return sum(abs(math.log(getattr(self, name) / getattr(other, name))) for name in ("cfg", "ring", "ulysses"))

    def _check_folded(self, name: str, rows: int | None) -> None:
        degree = getattr(self, name)
        fits = [d for d in range(1, self.sequence + 1) if self.sequence % d == 0 and (rows is None or d <= rows)]
        if degree not in fits:
            at_most = "" if rows is None else f" and be at most {rows}, the rows of its coarsest grid"
            raise ValueError(
                f"{name} {degree}: must divide or equal the sequence group of {self.sequence} "
                f"(ring {self.ring} · ulysses {self.ulysses}){at_most}; allowed are {', '.join(map(str, fits))}"
            )


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


def axis_groups(degrees: Degrees, axis: str) -> tuple[tuple[int, ...], ...]:
    """All groups of one axis of `AXES`, as global ranks in the order of their rank in the group."""
    spans = {
        "world": (1, degrees.world),
        "cfg": (degrees.sequence, degrees.cfg),
        "sequence": (1, degrees.sequence),
        "ring": (degrees.ulysses, degrees.ring),
        "ulysses": (1, degrees.ulysses),
        "ffn_tp": (1, degrees.ffn_tp),
        "vae": (1, degrees.vae),
    }
    return tuple(_strided_groups(degrees.world, *spans[axis]))


def _strided_groups(world: int, step: int, size: int) -> Iterator[tuple[int, ...]]:
    for begin in range(0, world, step * size):
        for offset in range(step):
            yield tuple(begin + offset + step * index for index in range(size))


def position(degrees: Degrees, axis: str, rank: int) -> tuple[tuple[int, ...], int]:
    """The group of an axis that a global rank belongs to, and its rank within it."""
    group = next(group for group in axis_groups(degrees, axis) if rank in group)
    return group, group.index(rank)


@dataclass(frozen=True)
class Mesh:
    """One rank's place in a layout: a group for every axis, to be passed on to whatever needs it.

    `group.rank` is this rank's coordinate on the axis and `group.size` the degree. Groups of one rank communicate
    nothing and need no torch.distributed.
    """

    degrees: Degrees
    rank: int
    world: Group
    cfg: Group
    sequence: Group
    ring: Group
    ulysses: Group
    ffn_tp: Group
    vae: Group

    @classmethod
    def build(cls, degrees: Degrees, *, meter: Meter | None = None, timeout: timedelta | None = None) -> Mesh:
        """Make this rank's groups; every rank of the default process group must call it with the same degrees.

        `timeout` is that of the groups made here (torch's default does not follow that of the world). Raises
        `ValueError` when the degrees do not multiply to the world size.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if degrees.world != world_size:
            raise ValueError(f"{degrees}: these degrees take {degrees.world} ranks, but {world_size} are running")
        rank = dist.get_rank() if world_size > 1 else 0
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        groups = {}
        for axis in AXES:
            members, own = position(degrees, axis, rank)
            if len(members) == 1:
                groups[axis] = Group(None, members, own, meter, timeout=timeout)
                continue
            for ranks in axis_groups(degrees, axis):
                # Axes that coincide share one group; every rank sees the same ones coincide, so the order of
                # creation, which must agree over the world, does.
                if ranks not in made:
                    whole = len(ranks) == world_size
                    made[ranks] = dist.group.WORLD if whole else dist.new_group(list(ranks), timeout=timeout)
            groups[axis] = Group(made[members], members, own, meter, timeout=timeout)
        return cls(degrees, rank, **groups)
