"""LoRA adapters: low-rank updates of linear layers, `W + scale · B A` (Hu et al., arXiv 2106.09685), from files.

Formats, all safetensors: that of diffusers (`transformer.blocks.0.attn1.to_q.lora_A.weight`), a file or folder of PEFT
(`base_model.model.…`), and those of other trainers that diffusers converts (`diffusion_model.…`, `lora_unet_…`). The
scale is that of PEFT: alpha / rank, or alpha / √rank where `use_rslora` is set; alpha is the tensor `….alpha`, or what
the file's metadata or `adapter_config.json` say, or the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import Adapter
from helios_cp.files.tensor_files import PICKLES, and_others, open_file, read_json

WEIGHT_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
PREFIXES = ("transformer.", "base_model.model.")
OTHER_PREFIXES = ("diffusion_model.", "lora_unet_")
KEY = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<factor>A|B|down|up)(?:\.(?!weight$|bias$)[^.]+)?\.(?P<kind>weight|bias)|(?P<alpha>alpha))"
)


@dataclass(frozen=True)
class LowRank:
    """An update `scale · up · down` of a weight, `[N, r]` and `[r, K]`, and `scale · bias` `[N]` of its bias."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float


@dataclass
class Updates(Mapping[str, list[tuple[float, Tensor, Tensor | None]]]):
    """What adapters add to the parameters of a model, by name: factors, up and down (a bias has up alone)."""

    shapes: Mapping[str, tuple[int, ...]]
    _terms: dict[str, list[tuple[float, Tensor, Tensor | None]]] = field(default_factory=dict)

    def add(self, layer: str, update: LowRank, weight: float) -> None:
        factor = weight * update.scale
        self._terms.setdefault(f"{layer}.weight", []).append((factor, update.up, update.down))
        if update.bias is not None:
            self._terms.setdefault(f"{layer}.bias", []).append((factor, update.bias, None))

    def of(self, name: str, device: torch.device) -> Tensor:
        """The sum of all updates of a parameter, in its shape, in fp32."""
        total = torch.zeros(self.shapes[name], device=device)
        for factor, up, down in self._terms[name]:
            up = up.to(device, torch.float32)
            if down is None:
                total.add_(up, alpha=factor)
            else:
                product = up.flatten(1) @ down.to(device, torch.float32).flatten(1)
                total.add_(product.view(total.shape), alpha=factor)
        return total

    def __getitem__(self, name: str) -> list[tuple[float, Tensor, Tensor | None]]:
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)


def read_updates(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> Updates:
    """What the adapters add to a model whose parameters have these shapes, by the names of diffusers.

    Raises `RequestError`, which names file and key, for what does not fit the model or cannot be read.
    """
    updates = Updates(shapes)
    for adapter in adapters:
        for layer, update in read_adapter(Path(adapter.path), shapes).items():
            updates.add(layer, update, adapter.weight)
    return updates


def check_adapters(adapters: Sequence[Adapter], config: TransformerConfig) -> None:
    """Raises `RequestError` as `read_updates` does, without the model's weights."""
    if adapters:
        from helios_cp.model.transformer import HeliosTransformer

        with torch.device("meta"):
            model = HeliosTransformer(config)
        read_updates(adapters, shapes_of(model))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor of a model, by the names of diffusers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """The updates in a file or folder, by layer. Raises `RequestError` as `read_updates` does."""
    file = _find(path)
    try:
        tensors, config = _read(file)
    except CheckpointError as error:
        raise RequestError(f"--lora {path}: {error}") from None
    factors: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        layer = match["layer"] if match else ""
        for prefix in PREFIXES:
            layer = layer.removeprefix(prefix)
        if not match or f"{layer}.weight" not in shapes or len(shapes[f"{layer}.weight"]) < 2:
            unknown.append(key)
            continue
        name = "alpha" if match["alpha"] else {"down": "A", "up": "B"}.get(match["factor"], match["factor"])
        name += " bias" if match["kind"] == "bias" else ""
        if name == "A bias":
            unknown.append(key)
            continue
        factors.setdefault(layer, {})[name] = key, tensor
    if unknown:
        raise RequestError(f"--lora {path}: {file}: {unknown[0]} belongs to no layer of the model{and_others(unknown)}")
    if not factors:
        raise RequestError(f"--lora {path}: {file}: holds no adapter; keys that end in lora_A.weight are needed")
    return {layer: _low_rank(path, file, layer, found, shapes, config) for layer, found in factors.items()}


def _low_rank(
    path: Path,
    file: Path,
    layer: str,
    found: Mapping[str, tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> LowRank:
    def refuse(key: str, reason: str) -> RequestError:
        return RequestError(f"--lora {path}: {file}: {key} {reason}")

    some_key = next(iter(found.values()))[0]
    for name in ("A", "B"):
        if name not in found:
            raise refuse(some_key, f"has no lora_{name}.weight beside it")
    (down_key, down), (up_key, up) = found["A"], found["B"]
    rows, *columns = shapes[f"{layer}.weight"]
    rank = down.shape[0] if down.ndim else 0
    if rank == 0 or tuple(down.shape[1:]) != tuple(columns):
        raise refuse(down_key, f"has shape {tuple(down.shape)}; it must be (rank, {', '.join(map(str, columns))})")
    if up.ndim < 2 or up.numel() != rows * rank or up.shape[:2] != (rows, rank):
        raise refuse(up_key, f"has shape {tuple(up.shape)}; it must be {(rows, rank)}, of the rank of lora_A")
    bias = None
    if "B bias" in found:
        bias_key, bias = found["B bias"]
        if tuple(bias.shape) != shapes.get(f"{layer}.bias"):
            raise refuse(bias_key, f"has shape {tuple(bias.shape)}; it must be {shapes.get(f'{layer}.bias')}")
    alpha = _alpha(layer, config, rank)
    if "alpha" in found:
        alpha_key, value = found["alpha"]
        if value.numel() != 1:
            raise refuse(alpha_key, f"has shape {tuple(value.shape)}; it must be one number")
        alpha = float(value)
    if not math.isfinite(alpha):
        raise refuse(some_key, f"has an alpha of {alpha}; a finite number is needed")
    return LowRank(down, up, bias, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """As PEFT looks it up: a pattern matches the end of a layer's name."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer):
            return float(alpha)
    alpha = config.get("lora_alpha")
    return float(rank if alpha is None else alpha)


def _find(path: Path) -> Path:
    """The safetensors file that a path stands for."""
    if path.is_dir():
        named = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
        files = named or sorted(path.glob("*.safetensors"))
        if len(files) == 1 or named:
            return files[0]
        pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
        if not files and pickles:
            raise RequestError(f"--lora {path}: {_is_pickle(pickles[0])}")
        raise RequestError(f"--lora {path}: {len(files)} .safetensors files are in this folder; give the one to use")
    if not path.is_file():
        raise RequestError(f"--lora {path}: there is no such file or folder")
    if path.suffix in PICKLES:
        raise RequestError(f"--lora {path}: {_is_pickle(path.name)}")
    return path


def _is_pickle(name: str) -> str:
    return f"{name} is a pickle, which could run code and is never read; give a .safetensors file"


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a file in the words of diffusers, and what is known of its configuration."""
    with open_file(file) as shard:
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 - no mapping
        metadata = (shard.metadata() or {}).get(METADATA_KEY)
    if any(key.startswith(OTHER_PREFIXES) for key in tensors):
        return _converted(file, tensors), {}
    config: Mapping[str, Any] = {}
    if metadata is not None:
        try:
            config = {key.removeprefix("transformer."): value for key, value in json.loads(metadata).items()}
        except (ValueError, AttributeError):
            raise CheckpointError(f"{file}: {METADATA_KEY} in its header is no JSON object") from None
    elif (file.parent / CONFIG_NAME).is_file():
        config = read_json(file.parent / CONFIG_NAME)
    if config.get("use_dora"):
        raise CheckpointError(f"{file}: use_dora is set; only plain LoRA is supported")
    return tensors, config


def _converted(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers import HeliosPipeline

    try:
        return HeliosPipeline.lora_state_dict(tensors)
    except Exception as error:  # its conversions fail in ways of their own where a key is missing or new
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{file}: diffusers cannot convert it ({reason})") from None
