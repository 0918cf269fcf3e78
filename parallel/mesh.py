"""The process groups of a layout, made from its degrees of parallelism.

`rank = (cfg · R + ring) · U + ulysses`: neighbours usually share a node, so the all-to-all of Ulysses stays on it and
the ring's messages cross nodes. The sequence group is the ring × ulysses ranks of one cfg branch; the tensor-parallel
FFN and the VAE are folded over consecutive ranks of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from parallel.collectives import Group, Meter
from parallel.degrees import Degrees

AXES = ("world", "cfg", "sequence", "ring", "ulysses", "ffn_tp", "vae")


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
    step, size = spans[axis]
    return tuple(
        tuple(range(first, first + step * size, step))
        for begin in range(0, degrees.world, step * size)
        for first in range(begin, begin + step)
    )


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
