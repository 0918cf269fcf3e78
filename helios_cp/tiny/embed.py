"""Trained weights as the package carries them: a safetensors file a part in bf16, its config in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helios_cp.files.whole_files import write_tensors
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.tiny import initial, text, vae


def write_embedded(
    folder: Path,
    text_encoder: nn.Module,
    codec: nn.Module,
    mean: Tensor,
    std: Tensor,
    transformers: Mapping[str, HeliosTransformer],
    classifier: nn.Module,
) -> None:
    """Write `judge`, `text_encoder`, `vae` with `mean` and `std` `[C]` of its latents, and a file a transformer."""
    _write(folder / "judge.safetensors", classifier, {})
    _write(folder / "text_encoder.safetensors", text_encoder, text.CONFIG)
    statistics = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    _write(folder / "vae.safetensors", codec, {**vae.CONFIG, **statistics})
    for name, transformer in transformers.items():
        _write(folder / f"{name}.safetensors", transformer, initial.CONFIG)


def _write(path: Path, module: nn.Module, config: dict[str, Any]) -> None:
    state = module.state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # UMT5's, tied to `shared.weight`
    tensors = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in state.items()}
    write_tensors(path, tensors, {"config": json.dumps(config)})
    print(f"{path.stat().st_size:>10,}  {path}", flush=True)
