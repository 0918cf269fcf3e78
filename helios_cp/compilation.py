"""`torch.compile` of what a chunk repeats: the blocks of the transformer, and the VAE's decoder.

All blocks share one compiled function, so that it is compiled once for each shape: for each pyramid stage, once for
the blocks inside and once for the last, which drops the history. The decoder is compiled as diffusers calls it, latent
frame by latent frame with a cache of features: for the first frame, the second, and all that follow. Shapes are static,
and graphs are whole: a break in one is an error, not a slow path. What a layer or a sequence-parallel algorithm
computes otherwise when it is compiled, it decides itself by `torch.compiler.is_compiling()`.

Hooks of the blocks stay outside, so that weights which are sharded are gathered before the compiled code is called.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from helios_cp.layers import Block

if TYPE_CHECKING:
    from helios_cp.pipeline import Pipeline

Backend = str | Callable
MOST_GRAPHS = 96
"""Of a function in one process; six serve a size of video. PyTorch's own limit is 8, beyond which it raises."""


def compile_pipeline(pipeline: Pipeline, cache: str | None = None, backend: Backend = "inductor") -> None:
    """Compile a loaded pipeline's blocks, and its decoder where the VAE is not split over ranks.

    Nothing is compiled before it first runs. `cache` is a folder that keeps compiled code for the next start.
    """
    if cache is not None:
        keep_in(cache)
    compile_blocks(pipeline.transformer.blocks, backend)
    if pipeline.codec.vae is not None and pipeline.codec.is_local:
        compile_decoder(pipeline.codec.vae, backend)


def compile_blocks(blocks: Iterable[Block], backend: Backend = "inductor") -> None:
    """Have all blocks run one compiled `Block.forward`."""
    forward = _compile(Block.forward, backend)
    for block in blocks:
        block.forward = types.MethodType(forward, block)


def compile_decoder(vae: nn.Module, backend: Backend = "inductor") -> None:
    """Have `vae.decode` run compiled code for each latent frame."""
    vae.decoder.forward = _compile(vae.decoder.forward, backend)


def keep_in(folder: str) -> None:
    """Keep compiled code in a folder from now on, and look for it there first.

    PyTorch's compilers learn of it through the environment alone.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch._inductor.config.fx_graph_cache = True


def _compile(function: Callable, backend: Backend) -> Callable:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
