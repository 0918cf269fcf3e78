"""Adapters from files to updates of a model's weights: LoRA, DoRA, LoHa, LoKr, and plain differences.

An update is computed in fp32, by PEFT's formulas. The scale is PEFT's: alpha / rank, or alpha / √rank where
`use_rslora` is set. Alpha is the tensor `….alpha`, or what PEFT's configuration says, or the rank. An adapter that
cannot be merged exactly is refused by the name of its kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import Adapter
from helios_cp.model.transformer import empty_model
from helios_cp.weights.adapter_files import MERGED_KINDS, Entry, find_adapter_file, read_adapter_file

KINDS = ("LORA", "LOHA", "LOKR")
"""What `peft_type` may be."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Allowed `init_lora_weights`, beside true and false. Others change the model's own weights before training."""
VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
VARIANTS += ("velora_config", "layer_replication")
"""Settings of PEFT that turn a LoRA into a kind that is not merged here."""

Entries = Mapping[str, Entry]
"""The tensors of one layer in a file, by what they are (`adapter_files.WORDS`)."""

FACTORS: Sequence[tuple[tuple[tuple[str, str], ...], Callable[..., Tensor]]] = (
    ((("lora_B", "lora_A"),), lambda side: side),
    ((("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")), torch.mul),
    ((("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")), torch.kron),
)
"""The sides of an `Update` of each kind, and how they are joined."""
WHOLE = {"lokr_w1_a": "lokr_w1", "lokr_w2_a": "lokr_w2"}
"""The word of a side that is one matrix in place of two."""


@dataclass(frozen=True)
class Update:
    """Adds `scale · join(sides)` to a weight. `scale` holds the strength that the user asked for.

    A side is one matrix, or two to multiply, `[N, r]` and `[r, K]`. A plain difference has one side of one matrix, and
    LoRA one of two, up · down (Hu et al., arXiv 2106.09685). LoHa multiplies two sides element by element
    (Hyeon-Woo et al., arXiv 2108.06098), and LoKr takes their Kronecker product (Yeh et al., arXiv 2309.14859).

    With DoRA the rows of the sum get the lengths `magnitude` `[N]` (Liu et al., arXiv 2402.09353). The factor of a row
    comes from the checkpoint's weight and this update alone. It scales what earlier updates added too, as in PEFT while
    adapters are not merged. So the order of adapters matters where one of them is a DoRA.
    """

    sides: tuple[tuple[Tensor, ...], ...]
    scale: float
    join: Callable[..., Tensor] = lambda side: side
    magnitude: Tensor | None = None

    def product(self, like: Tensor) -> Tensor:
        """What is added, in fp32, with the shape and on the device of `like`. Raises `RuntimeError` if it cannot be."""
        sides = []
        for side in self.sides:
            first, *others = (factor.to(like.device, torch.float32).flatten(1) for factor in side)
            sides.append(first @ others[0] if others else first)
        joined = self.join(*sides)
        return self.scale * (joined.unflatten(1, like.shape[1:]) if like.ndim > 1 else joined.flatten())


def merged(weight: Tensor, updates: Iterable[Update]) -> Tensor:
    """A whole weight of the checkpoint after all updates, in fp32."""
    weight = weight.float()
    total = weight
    for update in updates:
        product = update.product(weight)
        total = total + product
        if update.magnitude is not None:
            lengths = (weight + product).flatten(1).norm(dim=1).clamp(min=1e-12)  # a row of zeros stays one
            factors = update.magnitude.to(weight.device, torch.float32) / lengths
            total = factors.view(-1, *[1] * (weight.ndim - 1)) * total
    return total


def read_updates(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Update]]:
    """The updates of all adapters for a model of these shapes, by the parameter's name in diffusers.

    Raises `RequestError`, which names file and key, for an adapter that does not fit the model or cannot be read.
    """
    updates: dict[str, list[Update]] = {}
    for adapter in adapters:
        path = Path(adapter.path)
        try:
            layers, config = read_adapter_file(find_adapter_file(path), shapes)
            check_config(config)
            for layer, found in layers.items():
                for name, update in _layer_updates(layer, found, config, shapes, adapter.weight):
                    updates.setdefault(name, []).append(update)
        except CheckpointError as error:
            raise RequestError(f"--lora {path}: {error}") from None
    return updates


def check_adapters(adapters: Sequence[Adapter], config: TransformerConfig) -> None:
    """Raises `RequestError` as `read_updates` does, without the model's weights."""
    if adapters:
        read_updates(adapters, shapes_of(empty_model(config, torch.float32)))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor of a model, by the names of diffusers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_config(config: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where PEFT's configuration asks for something that cannot be merged."""
    kind = config.get("peft_type") or "LORA"
    if kind not in KINDS:
        raise CheckpointError(f"its kind (peft_type) is {kind}; allowed are {', '.join(KINDS)}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise CheckpointError(
            f"its kind (init_lora_weights) is {start}, which changes the model's own weights; save it again as a plain "
            "LoRA, with PEFT's path_initial_model_for_weight_conversion"
        )
    for name in VARIANTS:
        if config.get(name):
            raise CheckpointError(f"{name} is set; merged are {MERGED_KINDS}")


def _layer_updates(
    layer: str, found: Entries, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], strength: float
) -> Iterator[tuple[str, Update]]:
    """The updates of one layer, each with the name of the parameter that it changes."""
    weight, bias = layer if layer in shapes else f"{layer}.weight", f"{layer}.bias"
    differences = {"diff", "diff_b"} & found.keys()
    if not differences or found.keys() - differences - {"alpha"}:
        update = _matrix_update(layer, found, config, shapes[weight], strength)
        yield weight, update
        if "lora_B.bias" in found:
            yield bias, _difference(found["lora_B.bias"], shapes.get(bias), update.scale)
    if "diff" in found:
        yield weight, _difference(found["diff"], shapes[weight], strength)
    if "diff_b" in found:
        yield bias, _difference(found["diff_b"], shapes.get(bias), strength)


def _matrix_update(
    layer: str, found: Entries, config: Mapping[str, Any], shape: tuple[int, ...], strength: float
) -> Update:
    """What the factors of a layer make of its weight."""
    kinds = [
        (sides, join) for sides, join in FACTORS if any({*side, WHOLE.get(side[0])} & found.keys() for side in sides)
    ]
    if not kinds:
        raise CheckpointError(f"{_first_key(found)} has no lora_A.weight beside it")
    if len(shape) < 2:
        raise CheckpointError(f"{_first_key(found)} belongs to no layer of the model whose weight is a matrix")
    if len(kinds) > 1:
        raise CheckpointError(f"{_first_key(found)} is of a layer with adapters of two kinds; one a layer is allowed")
    names, join = kinds[0]
    sides = tuple(_side(found, side) for side in names)
    try:
        rank = next((side[1].shape[0] for side in sides if len(side) == 2), None)
        update = Update(sides, strength * _scale(layer, found, config, rank), join)
        fits = update.product(torch.empty(shape, device="meta")).shape == shape
    except (IndexError, RuntimeError):  # the shapes do not go together
        fits = False
    if not fits:
        factors = [entry for word, entry in found.items() if word.startswith(("lora_A", "lora_B", "hada_", "lokr_"))]
        sizes = ", ".join(f"{entry.key} {tuple(entry.tensor.shape)}" for entry in factors)
        raise CheckpointError(f"{sizes}: these shapes make no weight {shape}")
    magnitude = _magnitude(found, shape)
    if magnitude is None and config.get("use_dora"):
        raise CheckpointError(f"{_first_key(found)} has no lora_magnitude_vector beside it, though use_dora is set")
    return replace(update, magnitude=magnitude)


def _side(found: Entries, words: Sequence[str]) -> tuple[Tensor, ...]:
    words = (WHOLE[words[0]],) if WHOLE.get(words[0]) in found else words
    for word in words:
        if word not in found:
            ending = ".weight" if word.startswith("lora_") else ""
            raise CheckpointError(f"{_first_key(found)} has no {word}{ending} beside it")
    return tuple(found[word].tensor for word in words)


def _difference(entry: Entry, shape: tuple[int, ...] | None, scale: float) -> Update:
    if shape is None:
        raise CheckpointError(f"{entry.key} is for the bias of a layer that has none")
    if tuple(entry.tensor.shape) != shape:
        raise _wrong_shape(entry, str(shape))
    return Update(((entry.tensor.reshape(shape[0], -1),),), scale)


def _magnitude(found: Entries, shape: tuple[int, ...]) -> Tensor | None:
    """The lengths `[N]` of a DoRA: PEFT's `lora_magnitude_vector`, or `dora_scale` `[N, 1]` of LyCORIS and ComfyUI.

    LyCORIS can also scale columns, `[1, K]`, which PEFT cannot.
    """
    for word in ("lora_magnitude_vector", "dora_scale"):
        if word not in found:
            continue
        entry = found[word]
        lengths = [size for size in entry.tensor.shape if size != 1]
        is_of_columns = word == "dora_scale" and entry.tensor.ndim > 1 and entry.tensor.shape[0] != shape[0]
        if is_of_columns:
            raise CheckpointError(f"{entry.key}: the kind is DoRA of columns; only DoRA of rows, as PEFT's, is merged")
        if lengths != [shape[0]]:
            raise _wrong_shape(entry, f"({shape[0]},)")
        return entry.tensor.flatten()
    return None


def _scale(layer: str, found: Entries, config: Mapping[str, Any], rank: int | None) -> float:
    """alpha / rank. A LoKr of two whole matrices tells no rank: then it is PEFT's, or the scale is 1 as in LyCORIS."""
    if rank is None:
        rank = _setting(layer, config, "rank_pattern", ("r",))
    if rank is None:
        return 1.0
    alpha = _setting(layer, config, "alpha_pattern", ("lora_alpha", "alpha"))
    if rank == 0:
        raise CheckpointError(f"{_first_key(found)} is of rank 0")
    if "alpha" in found:
        entry = found["alpha"]
        if entry.tensor.numel() != 1:
            raise CheckpointError(f"{entry.key} has shape {tuple(entry.tensor.shape)}; it must be one number")
        alpha = float(entry.tensor)
    alpha = float(rank if alpha is None else alpha)
    if not math.isfinite(alpha):
        raise CheckpointError(f"{_first_key(found)} has an alpha of {alpha}; a finite number is needed")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(layer: str, config: Mapping[str, Any], patterns: str, names: tuple[str, ...]) -> Any:
    """A setting of one layer. As in PEFT, a pattern matches the end of the layer's name."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer):
            return value
    return next((config[name] for name in names if config.get(name) is not None), None)


def _first_key(found: Entries) -> str:
    return next(iter(found.values())).key


def _wrong_shape(entry: Entry, needed: str) -> CheckpointError:
    return CheckpointError(f"{entry.key} has shape {tuple(entry.tensor.shape)}; it must be {needed}")
