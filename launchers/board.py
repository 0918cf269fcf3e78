"""Where `launchers.status` finds what a driver says of its pipeline."""

from __future__ import annotations

from typing import Any


class StatusBoard:
    """Holds what the driver last said of its pipeline, for `launchers.status`."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}

    def show(self, values: dict[str, Any]) -> None:
        self._shown = values

    def read(self) -> dict[str, Any]:
        return self._shown
