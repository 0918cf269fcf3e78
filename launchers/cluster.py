"""Joining a Ray cluster or starting a private one, and saying what a cluster lacks."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a private instance. A chunk is some megabytes, and only a few are under way."""


KNOCK_SECONDS = 10.0


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or does not have what is needed. The message is one line."""


@contextmanager
def connected(address: str, *, cpus: float, gpus: float = 0) -> Iterator[None]:
    """Be a driver inside the `with`.

    `address`: "local" for an instance of this process's own, of `cpus` and `gpus` and with its own temporary folder;
    "auto" for the cluster that this machine belongs to; or HOST:PORT. Raises `ClusterError` if there is none.
    """
    options = {"logging_level": "error", "log_to_driver": False, "configure_logging": True}
    folder = None
    if address == "local":
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: Ray's sockets lie in it
        options |= {
            "num_cpus": int(-(-cpus // 1)),
            "num_gpus": int(-(-gpus // 1)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }
    try:
        _knock(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
        try:
            ray.init(address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"--address {address}: no Ray cluster answers there ({reason}); start one with `ray start --head`, or "
                "use --address local"
            ) from None
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _knock(address: str) -> None:
    """Raises `ClusterError` if nothing listens at HOST:PORT. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--address {address}: no Ray cluster answers there ({error}); start one with `ray start --head`, or use "
            "--address local"
        ) from None


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
    names = sorted(add(needs.bundles))
    free = ray._private.state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            left = free.get(node["NodeID"], {})
            parts = (f"{left.get(name, 0):g} of {have.get(name, 0):g} {name}" for name in names)
            nodes.append(f"{node['NodeManagerAddress']} has {', '.join(parts)} free")
    missing = [
        f"no node has {_amounts(bundle)}"
        for bundle in ([add(needs.bundles)] if needs.strategy == "STRICT_PACK" else needs.bundles[:1])
        if not any(
            all(node["Resources"].get(name, 0) >= amount for name, amount in bundle.items())
            for node in ray.nodes()
            if node["Alive"]
        )
    ]
    reason = f"; {missing[0]} at all" if missing else ""
    return (
        f"{worker} needs {needs}, which the cluster does not have{reason}; {'; '.join(nodes)}; add nodes, end other "
        "jobs, or ask for fewer --groups, --decoders or ranks"
    )


def _amounts(bundle: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(bundle.items()))
