"""`helios_cp.generate` with a fault: `python -m tests.generate.faulty FAULT RANK ARGUMENT…`, under torchrun.

On the given rank the eighth forward of the transformer, in the second chunk, raises, kills its process, or hangs. By
then the others are in it too, where they miss that rank before they look for a signal; and they have time to say so.
With `kill-once` it is the second forward, and only before torchrun starts the ranks again.
"""

import os
import signal
import sys
import time

import torch.distributed as dist

from helios_cp.generate import run as runner
from helios_cp.generate.__main__ import main
from helios_cp.model.transformer import HeliosTransformer

FAULT, RANK, *ARGUMENTS = sys.argv[1:]
WHEN = 2 if FAULT == "kill-once" else 8


def faulty(forward):
    calls = 0

    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == WHEN:
            dist.barrier()
        if calls == WHEN and os.environ["RANK"] == RANK:
            print(f"fault at {time.time()}", flush=True)
            if FAULT == "raise":
                raise ArithmeticError("broken on purpose")
            if FAULT == "kill" or (FAULT == "kill-once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
                os.kill(os.getpid(), signal.SIGKILL)
            if FAULT == "hang":
                time.sleep(1000)
        return forward(*args, **kwargs)

    return run


if __name__ == "__main__":
    HeliosTransformer.forward = faulty(HeliosTransformer.forward)
    if os.environ["RANK"] != RANK:
        runner.PATIENCE = 60.0
    sys.exit(main(ARGUMENTS))
