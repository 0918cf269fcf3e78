"""Whether a checkpoint can run as it is asked to, before any of its weights are read."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import Execution, Target
from helios_cp.config.layout import Layout
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.device.device import capability, dtype_name
from helios_cp.weights.lora import check_adapters
from helios_cp.weights.quantize import stored_quantization
from parallel.engines import unavailable_engine
from parallel.tensor import shard_sizes


def check_execution(
    checkpoint: Checkpoint,
    execution: Execution,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout | None = None,
    *,
    backend: str | None = None,
    sequences: Iterable[Sequence[int]] = (),
    target: Target | None = None,
) -> Execution:
    """The execution with the quantisation that the weights have already. Raises `RequestError` for all that is refused.

    `backend` is that of several ranks. `sequences` has the tokens of the segments of every sequence to come, where they
    are known. `target` is what the work is done on, where that is not `device`, as with a cluster's cards seen from a
    machine without one; what is installed there is not known.
    """
    stored = _stored(checkpoint)
    layout, config, is_here = layout or Layout(), checkpoint.transformer, target is None
    target = target or Target(device.type, capability(device))
    agreed = with_stored_quantization(checkpoint, execution)
    features = [("the model's width", config.dim), ("ffn_dim", config.ffn_dim)]
    if (ranks := layout.degrees.ffn_tp) > 1:
        features += [(f"ffn_dim over --ffn-tp {ranks}", size) for size in shard_sizes(config.ffn_dim, ranks)]
    unavailable = _without_library(agreed.quantize, target)
    if is_here:
        reason = unavailable_engine(
            layout.attention, device, dtype, layout.degrees, sequences, config.num_attention_heads, backend
        )
        unavailable |= {} if reason is None else {f"--attention {layout.attention}": reason}
    check_setting(
        Setting(
            execution,
            layout,
            target,
            backend,
            dtype_name(dtype),
            checkpoint.is_distilled,
            checkpoint.folder,
            stored,
            tuple(features),
            unavailable,
        )
    )
    check_adapters(execution.lora, config)
    return agreed


def check_lora(checkpoint: Checkpoint, requests: Iterable[Request]) -> None:
    """Raises `RequestError` for adapters of requests that are missing, do not fit, or cannot be merged."""
    for adapters in {request.lora for request in requests if request.lora}:
        check_setting(Setting(Execution(lora=adapters), folder=checkpoint.folder, stored=_stored(checkpoint)))
        check_adapters(adapters, checkpoint.transformer)


def with_stored_quantization(checkpoint: Checkpoint, execution: Execution) -> Execution:
    """The execution, quantised as the checkpoint's weights are already. Raises `RequestError` for a foreign kind."""
    return replace(execution, quantize=execution.quantize or _stored(checkpoint))


def _stored(checkpoint: Checkpoint) -> str | None:
    try:
        return stored_quantization(checkpoint.folder)
    except CheckpointError as error:
        raise RequestError(f"--model {checkpoint.folder}: {error}") from None


def _without_library(kind: str | None, target: Target) -> dict[str, str]:
    if kind is not None and importlib.util.find_spec("torchao") is None:
        return {f"--quantize {kind}": "it needs torchao; run `pip install torchao`"}
    if kind == "fp8" and target.kind == "cpu" and not _cpu_scales_by_row():
        return {"--quantize fp8": f"torch {torch.__version__} has no such product on a CPU; use int8 or int4"}
    return {}


@functools.cache
def _cpu_scales_by_row() -> bool:
    """Products of float8 with a scale a row are in some releases of torch only."""
    a, b = (torch.zeros(16, 16).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(a, b.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True
