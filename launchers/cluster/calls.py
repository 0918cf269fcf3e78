"""Calls of a worker's actors, and their results in the object store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from launchers.cluster.faults import WorkerLostError, fault_of

COLLECT_SECONDS = 60
"""To fetch a result that is there already."""

Answered = Callable[["list[Payload] | BaseException"], None]
"""Gets the results of a call, or what went wrong, from a thread of its own."""


@dataclass(frozen=True)
class Payload:
    """A result in the object store, and this process's view of it, which lasts when the node that made it is gone."""

    reference: ray.ObjectRef
    value: Any

    @classmethod
    def put(cls, value: Any) -> Payload:
        """Put a value into this node's store."""
        return cls(ray.put(value), value)

    def again(self) -> Payload:
        """The same, put into this node's store."""
        return Payload.put(self.value)


class GangCall:
    """Collects the answers of a gang of `size` actors; a single actor is a gang of one.

    `answered` is called once: with the first actor's results when all have answered, or with `fault_of` the first
    error.
    """

    def __init__(self, size: int, answered: Answered) -> None:
        self.size = size
        self.answered = answered
        self._lock = threading.Lock()
        self._left = size
        self._first: list[ray.ObjectRef] = []

    def send(self, methods: Sequence[Any], arguments: Sequence[Any]) -> None:
        sent = [method.remote(*arguments) for method in methods]
        answers = [answer if isinstance(answer, list) else [answer] for answer in sent]
        self._first = answers[0]
        for references in answers:
            references[0].future().add_done_callback(self._one)

    def _one(self, future: Any) -> None:
        error = future.exception()
        with self._lock:
            if self._left <= 0:
                return
            self._left = self._left - 1 if error is None else 0
            if self._left:
                return
        if error is not None:
            self.answered(fault_of(error, in_gang=self.size > 1))
            return
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        try:
            values = ray.get(self._first, timeout=COLLECT_SECONDS)
        except Exception as error:
            self.answered(WorkerLostError(str(error)))
        else:
            pairs = zip(self._first, values, strict=True)
            self.answered([Payload(reference, value) for reference, value in pairs])
