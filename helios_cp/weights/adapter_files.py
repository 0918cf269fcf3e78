"""Files of adapters: which file a path means, and which layer each key belongs to, under the names of diffusers.

All are safetensors files. A key is a prefix, the name of a layer, and a word that says what the tensor is:
`transformer.blocks.0.attn1.to_q.lora_A.weight`. Layers have the names of diffusers and PEFT or those of Wan, which
ComfyUI and other trainers use; musubi-tuner and LyCORIS write `_` in place of each dot.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.files.tensor_files import PICKLES, open_file, read_json

WEIGHT_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"

PREFIXES = ("base_model.model.", "transformer.", "model.", "diffusion_model.")
PREFIXES += ("lora_unet_", "lora_transformer_", "lycoris_")

MERGED_KINDS = "LoRA, DoRA, LoHa, LoKr and .diff"

SAME_WORDS = "lora_A lora_B lora_magnitude_vector dora_scale hada_w1_a hada_w1_b hada_w2_a hada_w2_b alpha diff diff_b "
SAME_WORDS += "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b"
OTHER_WORDS = {"lora_down": "lora_A", "lora_up": "lora_B", "w_norm": "diff", "b_norm": "diff_b"}
WORDS = {word: word for word in SAME_WORDS.split()} | OTHER_WORDS
"""The role of a tensor, by the word in its key. Two words of the same meaning become one."""

OTHER_KINDS = {
    "lora_mid": "LoRA with a Tucker core",
    "lora_embedding_": "LoRA of an embedding",
    "hada_t": "LoHa with a Tucker core",
    "lokr_t": "LoKr with a Tucker core",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "hra_": "HRA",
    "vera_": "VeRA",
    "fourierft_": "FourierFT",
    "bone_": "Bone",
    "miss_": "MiSS",
    "diff_m": "a difference named .diff_m",
    "set_weight": "a weight that replaces the model's",
}
"""Kinds that are refused, by how the word in their keys begins."""

WAN_IN_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN_IN_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{wan}" for ours, wan in WAN_IN_ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{wan}" for ours, wan in WAN_IN_ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
WAN_OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "norm_out.scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
"""Names of diffusers, and of the same layers in Wan (as diffusers' scripts/convert_wan_to_diffusers.py has them)."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file and its key there."""

    key: str
    tensor: Tensor


def read_adapter_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Mapping[str, Mapping[str, Entry]], Mapping[str, Any]]:
    """Of each layer of a file, by its name in diffusers, the tensors by role; and PEFT's configuration.

    The model's parameters have these shapes. Raises `CheckpointError` for a damaged file, and for a key of an unknown
    kind or of a layer that the model lacks.
    """
    with open_file(file) as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 - no mapping
        metadata = (shard.metadata() or {}).get(METADATA_KEY)
    names = layer_names(shapes)
    layers: dict[str, dict[str, Entry]] = {}
    for key, tensor in tensors.items():
        layer, word = _split(key, shapes)
        if layer not in names:
            raise CheckpointError(f"{key} belongs to no layer of the model")
        found = layers.setdefault(names[layer], {})
        if word in found:
            raise CheckpointError(f"{key} says the same as {found[word].key}; one of the two is needed")
        found[word] = Entry(key, tensor)
    if not layers:
        raise CheckpointError("holds no adapter; keys that end in lora_A.weight are needed")
    return layers, _config(file, metadata)


def layer_names(parameters: Iterable[str]) -> dict[str, str]:
    """The names by which files may call each layer of a model, and its name in diffusers.

    A parameter that is neither a `weight` nor a `bias` counts as a layer.
    """
    names = {}
    for parameter in parameters:
        layer, _, kind = parameter.rpartition(".")
        layer = layer if kind in ("weight", "bias") else parameter
        for name in (layer, _wan_name(layer)):
            names[name] = names[name.replace(".", "_")] = layer
    return names


def _wan_name(layer: str) -> str:
    if not layer.startswith("blocks."):
        return WAN_OUTSIDE.get(layer, layer)
    _, index, inner = layer.split(".", 2)
    return f"blocks.{index}.{WAN_IN_BLOCK.get(inner, inner)}"


def _split(key: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """`transformer.blocks.0.attn1.to_q.lora_A.weight` -> `blocks.0.attn1.to_q`, `lora_A`.

    PEFT may write the name of the adapter behind the word. The bias of `lora_B` is the word `lora_B.bias`.
    """
    if _without_prefix(key) in shapes:
        raise CheckpointError(f"{key} is a whole parameter (modules_to_save or bias of PEFT); only updates are merged")
    parts = key.split(".")
    for part in parts:
        kind = next((kind for start, kind in OTHER_KINDS.items() if part.startswith(start)), None)
        if kind is not None:
            raise CheckpointError(f"{key}: the kind is {kind}; merged are {MERGED_KINDS}")
    at = next((index for index, part in enumerate(parts) if part in WORDS), None)
    if at is None:
        raise CheckpointError(
            f"{key} belongs to no layer of the model, or is of an unknown kind; merged are {MERGED_KINDS}"
        )
    word, rest = WORDS[parts[at]], parts[at + 1 :]
    is_bias = rest[-1:] == ["bias"]
    if len(rest) > 2 or (is_bias and word != "lora_B"):
        raise CheckpointError(f"{key} belongs to no layer of the model")
    return _without_prefix(".".join(parts[:at])), "lora_B.bias" if is_bias else word


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _config(file: Path, metadata: str | None) -> Mapping[str, Any]:
    """PEFT's configuration: what diffusers keeps in the file's header, or the `adapter_config.json` beside it."""
    if metadata is None:
        beside = file.parent / CONFIG_NAME
        return read_json(beside) if beside.is_file() else {}
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(metadata).items()}
    except (ValueError, AttributeError):
        raise CheckpointError(f"{METADATA_KEY} in its header is no JSON object") from None


def find_adapter_file(path: Path) -> Path:
    """The safetensors file that a path stands for. Raises `RequestError` where there is none, or more than one."""
    files = [path] if path.is_file() else []
    if path.is_dir():
        named = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
        pickles = sorted(file for file in path.glob("*") if file.suffix in PICKLES)
        files = named[:1] or sorted(path.glob("*.safetensors")) or pickles[:1]
        if len(files) != 1:
            count = f"{len(files)} .safetensors files are in this folder"
            raise RequestError(f"--lora {path}: {count}; give the one to use")
    if not files:
        raise RequestError(f"--lora {path}: there is no such file or folder")
    if files[0].suffix in PICKLES:
        reason = f"{files[0].name} is a pickle, which could run code and is never read; give a .safetensors file"
        raise RequestError(f"--lora {path}: {reason}")
    return files[0]
