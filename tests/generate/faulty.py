"""`helios_cp.generate` with a fault, for ranks under torchrun's agent.

On the given rank the eighth forward of the transformer, in the second chunk, raises, kills its process, or hangs. By
then the others are in it too, where they miss that rank before they look for a signal; and they have time to say so.
With `kill-once` it is the second forward, and only before the ranks are started again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch.distributed as dist

from helios_cp.generate.__main__ import main
from helios_cp.model.transformer import HeliosTransformer


def generate(fault: str, rank: str, *arguments: str) -> int:
    """The exit code. The fault stays in this process."""
    from helios_cp.generate import run as runner  # it draws its bars with a package that a GPU's machine may lack

    HeliosTransformer.forward = faulty(HeliosTransformer.forward, fault, os.environ["RANK"] == rank)
    if os.environ["RANK"] != rank:
        runner.PATIENCE = 60.0
    return main(list(arguments))


def faulty(forward: Callable, fault: str, is_here: bool) -> Callable:
    calls, when = 0, 2 if fault == "kill-once" else 8

    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == when:
            dist.barrier()
        if calls == when and is_here:
            print(f"fault at {time.time()}", flush=True)
            if fault == "raise":
                raise ArithmeticError("broken on purpose")
            if fault == "kill" or (fault == "kill-once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":
                time.sleep(1000)
        return forward(*args, **kwargs)

    return run
