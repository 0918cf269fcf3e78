"""`torch.compile` of what a chunk repeats: the blocks of the transformer, and the norms of the VAE.

All blocks share one compiled function. It is compiled twice for each pyramid stage: for the inner blocks, and for the
last, which drops the history. Shapes are static, and a graph break is an error, not a slow path. What computes in
another way when compiled asks `torch.compiler.is_compiling()`. Hooks stay outside: they bring weights beforehand.

In the VAE one function is compiled: norm and SiLU before a convolution, because memory bounds it, with the sums before
the norm that a card's convolutions leave to it. It is compiled once for each number of channels and kind of sum, for
all sizes of video. Convolutions stay with their libraries, and the exchange of rows between ranks stays outside.

A process that has compiled very many sizes drops its compiled code and starts over, from the cache if there is one.
"""

from __future__ import annotations

import logging
import os
import types
import warnings
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from helios_cp.model.layers import Block
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.kernels import fusible_norm_silu

logger = logging.getLogger(__name__)

Backend = str | Callable
MOST_COMPILED = 96
"""Of a function at a time; six of the blocks serve a size of video. PyTorch's own limit is 8."""


def compile_parts(
    transformer: HeliosTransformer, vae: Autoencoder | None, cache: str | None = None, backend: Backend = "inductor"
) -> None:
    """Compile a transformer's blocks, and the norms of a VAE where there is one.

    Compilation happens at the first run. `cache` is the folder that keeps compiled code for the next start. Warns where
    nobody has called `keep_in` with it in this process.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # it imports the compiler, which takes a second

    if cache is not None and os.path.realpath(cache) != os.path.realpath(cache_dir()):
        warnings.warn(
            f"compiled code goes to {cache_dir()} and not to {cache}: call "
            "helios_cp.pipeline.environment.prepare beforehand",
            stacklevel=2,
        )
    compile_blocks(transformer.blocks, backend)
    if vae is not None:
        compile_vae(vae, backend)


def compile_blocks(blocks: Iterable[Block], backend: Backend = "inductor") -> None:
    """Have all blocks run one compiled `Block.forward`."""
    forward = _compile(Block.forward, backend)
    for block in blocks:
        block.forward = types.MethodType(forward, block)


def compile_vae(vae: Autoencoder, backend: Backend = "inductor") -> None:
    """Have each norm of a VAE, with SiLU and sums, run as one compiled kernel, when it decodes and when it encodes."""
    compiled = _compile(fusible_norm_silu, backend, dynamic=True)

    def run(*tensors: Tensor | None, keep: bool = False) -> None:
        # data, else graphs depend on the sizes of what these are views of
        tensors = [None if tensor is None else tensor.data for tensor in tensors]
        for tensor in tensors:
            if tensor is not None:  # its channels, which a kernel goes over in one loop
                torch._dynamo.mark_static(tensor, tensor.dim() - 1)
        compiled(*tensors, keep=keep)

    vae.norm_silu = run


def keep_in(folder: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep compiled code in a folder from now on, and look for it there first. Call it when a process starts.

    PyTorch's compilers read the folder from the environment, and from nowhere else.
    """
    environment["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch._inductor.config.fx_graph_cache = True


def _compile(function: Callable, backend: Backend, dynamic: bool = False) -> Callable:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_COMPILED)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)

    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return compiled(*arguments, **options)
        except FailOnRecompileLimitHit:  # before anything was computed
            logger.warning("%d graphs are compiled; all are dropped, to compile anew what is asked for", MOST_COMPILED)
            torch.compiler.reset()
            return compiled(*arguments, **options)

    return run
