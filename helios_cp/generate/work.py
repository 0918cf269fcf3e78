"""What every rank of a job does, decided by rank 0 and shared as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from helios_cp.config.execution import Execution
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
