"""What has to be the same on every node: a video must not depend on where its chunks are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ray
import torch

import helios_cp
from launchers.messages.messages import ActorInfo


class VersionError(RuntimeError):
    """A node has other versions than the driver."""


def own_versions() -> dict[str, str]:
    """Of this process; builds of one version, such as for a CPU and for CUDA, count as the same."""
    return {
        "helios_cp": helios_cp.__version__,
        "torch": str(torch.__version__).partition("+")[0],
        "ray": ray.__version__,
    }


def check_versions(places: Iterable[ActorInfo], own: Mapping[str, str]) -> None:
    """Raises `VersionError` that names the first difference."""
    for place in places:
        for name, here in own.items():
            there = place.versions.get(name)
            if there != here:
                raise VersionError(
                    f"{place.host} has {name} {there}, the driver has {here}; install the same on every node"
                )
