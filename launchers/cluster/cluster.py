"""Joining a Ray cluster or starting a private one, and saying what a cluster lacks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from launchers.cluster.address import host_and_port
from launchers.cluster.tokens import TokenError, own_token, token_for

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a private instance. A chunk is some megabytes, and only a few are under way."""

STARTS = 3
"""Tries to start a private instance."""

KNOCK_SECONDS = 10.0
"""For an answer from a machine that may not be there."""

PAUSE = 0.5
"""Seconds between two knocks."""


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or does not have what is needed. The message is one line."""


@contextlib.contextmanager
def connected(address: str, *, cpus: int = 0, gpus: int = 0, wait: float = 0) -> Iterator[None]:
    """Be a driver inside the `with`.

    `address`: "local" for an instance of this process's own, of `cpus` and `gpus` and with its own temporary folder;
    "auto" for the cluster that this machine belongs to; or HOST:PORT, which has `wait` seconds to begin to answer.
    Raises `ClusterError` if there is none.
    """
    options = {"logging_level": "error", "log_to_driver": False, "configure_logging": True}
    with contextlib.ExitStack() as stack:
        if address == "local":
            folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: Ray's sockets lie in it
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(own_token(Path(folder)))
            options |= {
                "num_cpus": cpus,
                "num_gpus": gpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
        else:
            knock(address, wait)
            try:
                stack.enter_context(token_for(address))
            except TokenError as error:
                raise ClusterError(f"--address {address}: the Ray cluster is closed to this driver: {error}") from None
        stack.callback(ray.shutdown)
        _init(address, options)
        yield


def _init(address: str, options: Mapping[str, Any]) -> None:
    """Ray gives itself 30 s to start an instance, which a busy machine may need more than once."""
    for _ in range(STARTS if address == "local" else 1):
        try:
            ray.init(address, **options)
            return
        except Exception as error:  # of many kinds, a bare `Exception` among them
            ray.shutdown()
            reason = " ".join(str(error).split())[:200]
    if address == "local":
        raise ClusterError(f"Ray does not start on this machine ({reason}); try again when it is less busy")
    raise _unanswered(address, reason)


def _unanswered(address: str, reason: object) -> ClusterError:
    return ClusterError(
        f"--address {address}: no Ray cluster answers there ({reason}); start one with `ray start --head`, or use "
        "--address local"
    )


def knock(address: str, wait: float) -> None:
    """Wait until something listens at HOST:PORT, or raise `ClusterError`. Ray itself would try for minutes."""
    place = host_and_port(address)
    deadline = time.monotonic() + wait
    while place is not None:
        try:
            socket.create_connection(place, timeout=KNOCK_SECONDS).close()
            return
        except (OSError, UnicodeError) as error:  # the latter of a host name that cannot be one
            if time.monotonic() + PAUSE > deadline:
                raise _unanswered(address, error) from None
        time.sleep(PAUSE)


@dataclass(frozen=True)
class Needs:
    """What a worker asks of the cluster: bundles that each fit on one node, and how they are placed."""

    bundles: tuple[dict[str, float], ...]
    strategy: str = "STRICT_PACK"

    def __str__(self) -> str:
        if self.strategy == "STRICT_PACK":
            return f"{_amounts(add(self.bundles))} on one node"
        return f"{len(self.bundles)} nodes with {_amounts(self.bundles[0])} each"


def nodes_free() -> list[dict[str, float]]:
    """What each node that is alive has free."""
    free = ray._private.state.available_resources_per_node()
    return [free.get(node["NodeID"], {}) for node in ray.nodes() if node["Alive"]]


def add(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] += amount
    return dict(total)


def shortage(worker: str, needs: Needs) -> str:
    """A line that says what `worker` waits for and what the nodes have of it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = ray._private.state.available_resources_per_node()
    told = []
    for node in nodes:
        have, left = node["Resources"], free.get(node["NodeID"], {})
        parts = (f"{left.get(name, 0):g} of {have.get(name, 0):g} {name}" for name in sorted(add(needs.bundles)))
        told.append(f"{node['NodeManagerAddress']} has {', '.join(parts)} free")
    bundle = add(needs.bundles) if needs.strategy == "STRICT_PACK" else needs.bundles[0]
    fits = any(all(node["Resources"].get(name, 0) >= amount for name, amount in bundle.items()) for node in nodes)
    reason = "" if fits else f"; no node has {_amounts(bundle)} at all"
    return (
        f"{worker} needs {needs}, which the cluster does not have{reason}; {'; '.join(told)}; add nodes, end other "
        "jobs, or ask for fewer --groups, --decoders or ranks"
    )


def _amounts(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(bundle.items()))
