"""How loaded parts are made ready to run by an execution: cached, offloaded, compiled, captured."""

from __future__ import annotations

import torch
from torch import nn

from helios_cp.config.execution import Execution
from helios_cp.model.block_cache import BlockCache, Total, own_total
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.runtime.offload import Card, offload


def prepare_parts(
    execution: Execution,
    transformer: HeliosTransformer,
    vae: Autoencoder | None,
    text_encoder: nn.Module | None,
    device: torch.device,
    total: Total = own_total,
) -> tuple[Card | None, BlockCache | None]:
    """Prepare loaded parts, in the one order that works.

    Returns the card that offloaded weights come to, and the cache of blocks, which `total` is for. The transformer was
    loaded adapted and quantised; `execution` is checked already.
    """
    block_cache = card = None
    if execution.block_cache is not None:
        transformer.body = block_cache = BlockCache(execution.block_cache, total)
    if execution.offload != "none":
        card = offload(execution.offload, device, text_encoder, transformer, vae)
    if execution.compile:
        from helios_cp.runtime.compilation import compile_parts  # it loads all of PyTorch's compiler

        compile_parts(transformer, vae, execution.compile_cache)
    if execution.cuda_graphs:
        from helios_cp.runtime.cuda_graphs import capture_forwards

        capture_forwards(transformer, device)
    return card, block_cache
