"""Adapters from files to updates of a model's weights: LoRA, DoRA, LoHa, LoKr, and plain differences.

The scale is PEFT's: alpha / rank, or alpha / √rank where `use_rslora` is set. Alpha is the tensor `….alpha`, or what
PEFT's configuration says, or the rank. An adapter that cannot be merged exactly is refused by the name of its kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import Adapter
from helios_cp.model.transformer import empty_model
from helios_cp.weights.adapter_files import MERGED_KINDS, Entry, find_adapter_file, read_adapter_file
from helios_cp.weights.updates import Decomposed, Difference, Factors, Update

KINDS = ("LORA", "LOHA", "LOKR")
"""What `peft_type` may be."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Allowed `init_lora_weights`, beside true and false. Others change the model's own weights before training."""
VARIANTS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
VARIANTS += ("velora_config", "layer_replication")
"""Settings of PEFT that turn a LoRA into a kind that is not merged here."""

Entries = Mapping[str, Entry]
"""The tensors of one layer in a file, by what they are (`adapter_files.WORDS`)."""
Scale = Callable[[int | None], float]
"""From the rank, if the tensors tell it, to the factor of an update."""


def read_updates(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Update]]:
    """The updates of all adapters for a model of these shapes, by the parameter's name in diffusers.

    Raises `RequestError`, which names file and key, for an adapter that does not fit the model or cannot be read.
    """
    updates: dict[str, list[Update]] = {}
    for adapter in adapters:
        path = Path(adapter.path)
        try:
            file = read_adapter_file(find_adapter_file(path), shapes)
            check_config(file.config)
            for layer, found in file.layers.items():
                for name, update in _layer_updates(layer, found, file.config, shapes, adapter.weight):
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
    layer: str,
    found: Entries,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    strength: float,
) -> Iterator[tuple[str, Update]]:
    """The updates of one layer, each with the name of the parameter that it changes."""
    weight, bias = layer if layer in shapes else f"{layer}.weight", f"{layer}.bias"
    differences = {"diff", "diff_b"} & found.keys()
    if not differences or found.keys() - differences - {"alpha"}:
        update = _matrix_update(found, shapes[weight], lambda rank: strength * _scale(layer, found, config, rank))
        magnitude = _magnitude(found, shapes[weight])
        if magnitude is None and config.get("use_dora"):
            raise CheckpointError(f"{_first_key(found)} has no lora_magnitude_vector beside it, though use_dora is set")
        yield weight, update if magnitude is None else Decomposed(update, magnitude)
        if "lora_B.bias" in found:
            yield bias, _difference(found["lora_B.bias"], shapes.get(bias), update.scale)
    if "diff" in found:
        yield weight, _difference(found["diff"], shapes[weight], strength)
    if "diff_b" in found:
        yield bias, _difference(found["diff_b"], shapes.get(bias), strength)


def _matrix_update(found: Entries, shape: tuple[int, ...], scale: Scale) -> Factors:
    """What the factors of a layer add to its weight."""
    makers = [make for words, make in MAKERS if words & found.keys()]
    if not makers:
        raise CheckpointError(f"{_first_key(found)} has no lora_A.weight beside it")
    if len(shape) < 2:
        raise CheckpointError(f"{_first_key(found)} belongs to no layer of the model whose weight is a matrix")
    if len(makers) > 1:
        raise CheckpointError(f"{_first_key(found)} is of a layer with adapters of two kinds; one a layer is allowed")
    try:
        update = makers[0](found, scale)
        fits = update.product(torch.empty(shape, device="meta")).shape == shape
    except (IndexError, RuntimeError):  # the shapes do not go together
        fits = False
    if not fits:
        factors = [entry for word, entry in found.items() if word.startswith(("lora_A", "lora_B", "hada_", "lokr_"))]
        sizes = ", ".join(f"{entry.key} {tuple(entry.tensor.shape)}" for entry in factors)
        raise CheckpointError(f"{sizes}: these shapes make no weight {shape}")
    return update


def _low_rank(found: Entries, scale: Scale) -> Factors:
    down, up = _factors(found, "lora_A", "lora_B", ending=".weight")
    return Factors(((up, down),), scale(down.shape[0]))


def _hadamard(found: Entries, scale: Scale) -> Factors:
    a, b, c, d = _factors(found, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return Factors(((a, b), (c, d)), scale(b.shape[0]), torch.mul)


def _kronecker(found: Entries, scale: Scale) -> Factors:
    left, right = (
        _factors(found, name) if name in found else _factors(found, f"{name}_a", f"{name}_b")
        for name in ("lokr_w1", "lokr_w2")
    )
    ranks = [side[1].shape[0] for side in (left, right) if len(side) == 2]
    return Factors((left, right), scale(ranks[0] if ranks else None), torch.kron)


MAKERS: Sequence[tuple[set[str], Callable[[Entries, Scale], Factors]]] = (
    ({"lora_A", "lora_B"}, _low_rank),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, _hadamard),
    ({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}, _kronecker),
)


def _factors(found: Entries, *words: str, ending: str = "") -> tuple[Tensor, ...]:
    for word in words:
        if word not in found:
            raise CheckpointError(f"{_first_key(found)} has no {word}{ending} beside it")
    return tuple(found[word].tensor for word in words)


def _difference(entry: Entry, shape: tuple[int, ...] | None, scale: float) -> Difference:
    if shape is None:
        raise CheckpointError(f"{entry.key} is for the bias of a layer that has none")
    if tuple(entry.tensor.shape) != shape:
        raise _wrong_shape(entry, str(shape))
    return Difference(entry.tensor, scale)


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
