"""What libraries read from the environment of a process, set before work starts.

Command lines call `prepare`; a Python program that makes videos by itself calls it too, before it loads a pipeline:
`prepare(execution, ranks, os.environ)`.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from helios_cp.config.execution import Execution

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Settings of PyTorch's allocator; the first that is there holds."""


def prepare(execution: Execution, ranks: int, environment: MutableMapping[str, str]) -> None:
    """Set what an execution on some ranks needs; what the user has set stays.

    `--compile-cache` is a folder that PyTorch's compilers learn of in no other way. NCCL registers the buffers of
    messages that a graph holds, and takes each for one piece of memory, which it is not in segments that grow: such a
    graph can hang (pytorch/pytorch issue 158029).
    """
    if execution.compile_cache is not None:
        from helios_cp.runtime.compilation import keep_in

        keep_in(execution.compile_cache, environment)
    settings = next((environment[name] for name in ALLOCATOR if name in environment), "")
    if execution.cuda_graphs and ranks > 1 and "expandable_segments:True" in settings.replace(" ", ""):
        environment.setdefault("NCCL_GRAPH_REGISTER", "0")
