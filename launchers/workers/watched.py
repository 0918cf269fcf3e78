"""What all workers have in common."""

from __future__ import annotations

import os
import socket
import threading

import ray

from launchers.messages.messages import ActorInfo
from launchers.messages.versions import own_versions


def own_info() -> ActorInfo:
    return ActorInfo(socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid(), own_versions())


class Watched:
    """An actor whose end is seen at once, even when it has nothing to do: `watch` fails with it."""

    def watch(self) -> None:
        """Never returns; runs in a thread of its own."""
        threading.Event().wait()
