"""Where `launchers.status` finds what a driver says of its pipeline."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "helios_cp"


class StatusBoard:
    """Holds what the driver last said of its pipeline, for `launchers.status`."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}

    def show(self, values: dict[str, Any]) -> None:
        self._shown = values

    def read(self) -> dict[str, Any]:
        return self._shown


def put_up(name: str, node: str) -> Any:
    """A board on the driver's node, as nothing else of the cluster lives as long; a killed one comes back empty."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1, "scheduling_strategy": where}
    return ray.remote(StatusBoard).options(**options).remote()
