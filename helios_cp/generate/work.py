"""What every rank of a job does, decided by rank 0 and shared as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from helios_cp.config.execution import Execution
from helios_cp.config.json_types import from_json
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request


@dataclass(frozen=True)
class Work:
    """How a model is loaded, and the videos that may be made with it: none if every one is finished already.

    `dtype` is a name, and `backend` that of the communication.
    """

    model: str
    dtype: str
    layout: Layout
    backend: str
    execution: Execution
    requests: tuple[Request, ...]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` reads it back to an equal work."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Work:
        """Raises `TypeError` for names or types that it does not have."""
        return from_json(cls, values)
