"""One rank of a job whose other ranks do not exist: messages are metered and not sent, what arrives is left empty.

With a model on the meta device this counts what any rank of any layout does at full size, by the engine's own code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from parallel import collectives
from parallel.collectives import Group, Meter
from parallel.mesh import AXES, Degrees, Mesh, position


@contextlib.contextmanager
def silent_mesh(degrees: Degrees, rank: int) -> Iterator[tuple[Mesh, dict[str, Meter]]]:
    """The mesh of a rank, with a meter for each axis. Collectives inside return at once."""
    meters = {axis: Meter() for axis in AXES}
    groups = {}
    for axis in AXES:
        members, own = position(degrees, axis, rank)
        groups[axis] = Group(object() if len(members) > 1 else None, members, own, meters[axis])
    silent = SimpleNamespace(
        all_to_all_single=lambda *_, **__: None,
        all_gather=lambda *_, **__: None,
        batch_isend_irecv=lambda messages: [],
        P2POp=lambda *_, **__: None,
        isend=None,
        irecv=None,
        get_backend=lambda group: "nccl",
    )
    with mock.patch.object(collectives, "dist", silent):
        yield Mesh(degrees, rank, **groups), meters
