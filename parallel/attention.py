"""Attention on one rank, with or without the log-sum-exp of its scores, and the merge of partial results.

Tensors are `[B, S, H, D]`; scores are scaled by `D ** -0.5` and nothing is masked. Engines:

- `native`: torch's scaled dot product attention. With log-sum-exp, on cpu and cuda only: the flash kernel of the CPU
  (any float dtype); on CUDA the flash kernel for fp16 and bf16, the memory-efficient one for fp32.
- `cudnn`: cuDNN's kernels through torch, fp16 and bf16 on CUDA.
- `flash`: flash-attn 3 where it is installed and the card is a Hopper, else flash-attn 2; fp16 and bf16 on CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

ENGINES = ("native", "cudnn", "flash")
HALF = (torch.float16, torch.bfloat16)  # dtypes that flash kernels take

# (query, key, value) → out, or out and log-sum-exp: what the sequence-parallel algorithms take for local attention
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
AttentionWithLse = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def unavailable(engine: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str | None:
    """Why an engine cannot run here, in one line, or None where it can.

    `dtype` is that of query, key and value, where known. Raises `ValueError` for an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r}: allowed are {', '.join(ENGINES)}")
    device = torch.device(device)
    if engine == "native":
        return None
    if device.type != "cuda":
        return f"{engine} attention needs a CUDA device, not {device.type}; use native"
    if dtype is not None and dtype not in HALF:
        return f"{engine} attention takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}; use native"
    if engine == "cudnn" and not torch.backends.cudnn.is_available():
        return "cudnn attention needs a torch built with cuDNN; use native"
    if engine == "flash" and not _installed("flash_attn") and not _installed("flash_attn_interface"):
        return "flash attention needs the package flash-attn (2 or 3), which is not installed; use native"
    return None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, engine: str = "native") -> torch.Tensor:
    """Attention of a query `[B, Sq, H, D]` over key and value `[B, Sk, H, D]`: `[B, Sq, H, D]`.

    No keys at all give zeros.
    """
    if query.numel() == 0 or key.shape[1] == 0:
        return torch.zeros_like(query)
    if engine != "native":
        return attend_with_lse(query, key, value, engine)[0]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def attend_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, engine: str = "native"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, with the log-sum-exp of each query's scaled scores, `[B, H, Sq]` in fp32 (fp64 for fp64).

    No keys at all give zeros and a log-sum-exp of -inf.
    """
    if query.numel() == 0 or key.shape[1] == 0:
        batch, queries, heads, _ = query.shape
        lse = query.new_full((batch, heads, queries), -torch.inf, dtype=_accumulator(query))
        return torch.zeros_like(query), lse
    if engine == "flash":
        return _flash_attn_function(query.device)(query, key, value)[:2]
    out, lse = _torch_with_lse(*(t.transpose(1, 2) for t in (query, key, value)), engine)
    return out.transpose(1, 2), lse


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two sets of keys, from the attention over each.

    `out` is `[B, Sq, H, D]`, `lse` `[B, H, Sq]`; both results are in fp32 (fp64 for fp64). With ℓ = log(e^ℓa + e^ℓb),
    out = e^(ℓa − ℓ)·out_a + e^(ℓb − ℓ)·out_b: the softmax's denominators e^ℓa and e^ℓb, left out when each part was
    normalised, are put back as weights (Milakov and Gimelshein, arXiv 1805.02867, equation 4; Liu et al., Ring
    Attention, arXiv 2310.01889). A part without keys, of log-sum-exp -inf, weighs nothing.
    """
    accumulator = _accumulator(out_a)
    lse = torch.logaddexp(lse_a, lse_b)
    weight = torch.exp(lse_b - lse).masked_fill(lse == -torch.inf, 0)
    weight = weight.transpose(1, 2).unsqueeze(-1).to(accumulator)
    return torch.lerp(out_a.to(accumulator), out_b.to(accumulator), weight), lse


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _torch_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, engine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, H, S, D]` in and out, by the ATen operators behind scaled dot product attention."""
    aten = torch.ops.aten
    if engine == "cudnn":
        # cuDNN gives wrong results for views that are not contiguous; some torch versions give lse a trailing 1.
        query, key, value = (t.contiguous() for t in (query, key, value))
        out, lse = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
        return out, lse.view(query.shape[:3])
    if not query.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    if query.dtype in HALF:
        return aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    out, lse = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    return out, lse[..., : query.shape[2]]  # the kernel rounds the rows of lse up to a whole block


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _flash_attn_function(device: torch.device) -> Callable:
    """flash-attn's function for a card, asked for the log-sum-exp. Looked up once: a forward calls it in each block."""
    if _installed("flash_attn_interface") and torch.cuda.get_device_capability(device)[0] == 9:
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    # flash-attn 3 had versions that always return the log-sum-exp and know no such argument
    if "return_attn_probs" not in inspect.signature(flash_attn_func).parameters:
        return flash_attn_func
    return functools.partial(flash_attn_func, return_attn_probs=True)
