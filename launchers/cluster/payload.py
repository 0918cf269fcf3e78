"""Results of workers in Ray's object store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray


@dataclass(eq=False)
class Payload:
    """A result in the object store, and this process's view of it, which lasts when the node that made it is gone."""

    reference: ray.ObjectRef
    value: Any

    @classmethod
    def put(cls, value: Any) -> Payload:
        """Put a value into this node's store."""
        return cls(ray.put(value), value)

    def put_again(self) -> None:
        """Put the value into this node's store, because the reference is lost with another node."""
        self.reference = ray.put(self.value)
