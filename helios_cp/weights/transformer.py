"""The transformer out of its files: in place, in part, quantised, with adapters merged; and adapters exchanged later.

A stored tensor goes to one place of the model, at any time and in any order: `_fill` computes all of what lies there
from the files, never from what was there before. So a model whose adapters were exchanged has the bits of one that was
loaded with them. Nothing is kept for it but the files, mapped into memory and not read before they are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.execution import Adapter
from helios_cp.files.tensor_files import (
    Part,
    Reader,
    StoredTensor,
    check_fit,
    open_file,
    read,
    stored_tensors,
)
from helios_cp.model.layers import stored_names
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.lora import Updates, read_updates, shapes_of
from helios_cp.weights.quantize import (
    Components,
    assemble,
    check_quantization,
    check_stored,
    components,
    empty_components,
    is_block_linear,
    is_quantised,
    part_of_component,
    quantise,
    stored_quantization,
    with_components,
)

if TYPE_CHECKING:
    from parallel.collectives import Group

STEM = "diffusion_pytorch_model"
IGNORED_KEY = "norm_added_q"  # in some checkpoints, used by no Helios; diffusers leaves it out too

Place = Tensor | Components
"""Where a stored tensor goes: the memory of a parameter or of some of its rows, or of the components of these."""

Read = Callable[[str, Part], Tensor]


@dataclass(frozen=True)
class Source:
    """What a model's weights were loaded from, and how. It changes no more, so copies of the model share it.

    `parts` says which part of a stored tensor a rank holds; `shard_over` is set where FSDP decides that. Weights of the
    blocks are of `kind`, in the files already if `is_stored_quantised`. They are computed on `device`.
    """

    read: Read
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Part]
    shard_over: Group | None
    kind: str | None
    is_stored_quantised: bool
    device: torch.device

    def __deepcopy__(self, memo: object) -> Source:
        return self


def load_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    narrow: Callable[[HeliosTransformer], Mapping[str, Part]] | None = None,
    shard_over: Group | None = None,
    *,
    quantize: str | None = None,
    adapters: Sequence[Adapter] = (),
    compute_on: str | torch.device | None = None,
) -> HeliosTransformer:
    """The transformer in `dtype`, apart from what it keeps in fp32, ready for inference.

    `narrow` makes parameters smaller before memory is allocated, and says which part of a stored tensor each of them
    takes; no other part is read. `shard_over` is the group of all ranks, for the blocks' weights to be sharded over
    (`helios_cp.weights.sharded`). Memory is allocated once, on the device; tensors are then copied into place one at a
    time, `adapters` merged and `quantize`d one at a time too, on the device `compute_on` (by default, `device`).

    Raises `CheckpointError`, before anything is allocated, if files or keys are missing, left over or of the wrong
    shape, `RequestError` for adapters that do not fit, and `ValueError` for `shard_over` together with `narrow` or
    quantised weights.
    """
    if narrow is not None and shard_over is not None:
        raise ValueError("narrow and shard_over: give one of the two, as each decides which part of a tensor is read")
    folder = checkpoint.folder / "transformer"
    stored = stored_transformer(checkpoint)
    stored_kind = stored_quantization(checkpoint.folder)
    if stored_kind is not None and quantize not in (None, stored_kind):
        raise CheckpointError(f"{folder}: the weights are {stored_kind} already; they cannot become {quantize}")
    if stored_kind is not None and adapters:
        raise CheckpointError(f"{folder}: the weights are {stored_kind} already; adapters cannot be merged into them")
    kind = stored_kind or quantize
    if kind is not None and shard_over is not None and shard_over.size > 1:
        raise ValueError("quantize and shard_over: give one of the two; FSDP gathers no quantised weights")
    with torch.device("meta"):
        model = HeliosTransformer(checkpoint.transformer)
    shapes = shapes_of(model)
    check_transformer(checkpoint, stored, shapes, quantised_layers(model), stored_kind)
    check_quantization(kind, checkpoint.transformer, dtype=dtype, device=torch.device(compute_on or device))
    updates = read_updates(adapters, shapes)
    parts = narrow(model) if narrow is not None else {}
    assert not list(model.buffers()), "buffers are not part of a checkpoint and would stay empty"
    model.cast(dtype)
    if shard_over is not None:
        from helios_cp.weights.sharded import own_rows, shard_weights

        shard_weights(model, shard_over, torch.device(device))
    _allocate(model, torch.device(device), kind)
    if shard_over is not None:
        _, parts = own_rows(model, shard_over)
    device = torch.device(compute_on or device)
    source = Source(Reader(stored), shapes, parts, shard_over, kind, stored_kind is not None, device)
    _fill_all(model, source, stored, updates)
    model.source, model.adapters, model.adapted = source, tuple(adapters), frozenset(updates)
    return model.eval().requires_grad_(False)


def stored_transformer(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors in the transformer's files. Raises `CheckpointError`."""
    stored = stored_tensors(checkpoint.folder / "transformer", STEM)
    return {name: where for name, where in stored.items() if IGNORED_KEY not in name}


def quantised_layers(model: HeliosTransformer) -> set[str]:
    """The stored weights that `--quantize` changes."""
    return {
        name
        for path, module in model.named_modules()
        if is_block_linear(path, module)
        for name in stored_names(path, module, "weight")
    }


def check_transformer(
    checkpoint: Checkpoint,
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    layers: set[str],
    kind: str | None,
) -> None:
    """Raises `CheckpointError` unless the files hold the transformer, with `layers` of a quantised kind if there is
    one."""
    expected = with_components(shapes, layers, kind) if kind is not None else shapes
    check_fit(checkpoint.folder / "transformer", stored, expected)
    if kind is not None:
        check_stored(stored, layers, kind)


def _allocate(model: HeliosTransformer, device: torch.device, kind: str | None) -> None:
    """Give a model on the meta device memory; that of the blocks' weights for `kind`."""
    quantised = [module for path, module in model.named_modules() if kind and is_block_linear(path, module)]
    weights = [(tuple(module.weight.shape), module.weight.dtype) for module in quantised]
    for module in quantised:
        module.weight = None
    model.to_empty(device=device)
    for module, (shape, dtype) in zip(quantised, weights, strict=True):
        weight = assemble(empty_components(*shape, kind, device), kind, dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)


def _fill_all(model: HeliosTransformer, source: Source, stored: Mapping[str, StoredTensor], updates: Updates) -> None:
    """File after file, none of which stays mapped once it was read: what is mapped and read counts as memory used."""
    found = _places(model, source)
    if source.is_stored_quantised:
        found = {
            name: place
            for layer, at in found.items()
            for name, place in ({f"{layer}.{c}": at[c] for c in at} if isinstance(at, dict) else {layer: at}).items()
        }
    own = [name for name in stored if name in found]
    for file, names in itertools.groupby(own, key=lambda name: stored[name].file):
        with open_file(file) as shard:
            for name in names:
                _fill(found[name], name, lambda name, part, shard=shard: read(shard, name, part), source, updates)


@torch.no_grad()
def _fill(place: Place, name: str, read: Read, source: Source, updates: Updates) -> None:
    part = source.parts.get(name, ())
    if isinstance(place, dict):
        weight = read(name, ()).to(source.device, torch.float32)
        if name in updates:
            weight = weight + updates.of(name, source.device)
        for component, values in quantise(weight, source.kind).items():
            own = part_of_component(part, component, source.kind)
            place[component].copy_(values[own] if own else values)
    elif name in updates:
        # All of it first, as a product of a part of the factors might round elsewhere than that of all.
        whole = read(name, ()).to(source.device, torch.float32) + updates.of(name, source.device)
        place.copy_(whole[part] if part else whole)
    else:
        layer, _, component = name.rpartition(".")
        if source.is_stored_quantised and layer in source.parts:
            part = part_of_component(source.parts[layer], component, source.kind)
        place.copy_(read(name, part))


def _places(model: HeliosTransformer, source: Source, at: Mapping[tuple[int, str], Tensor] | None = None):
    """Where each stored tensor goes, by name, without those that have no place on this rank.

    `at` has the memory of parameters that lie elsewhere than in the model, by the module's identity and their name.
    """
    if source.shard_over is not None:
        from helios_cp.weights.sharded import own_rows

        return own_rows(model, source.shard_over)[0]
    return dict(_whole_places(model, at or {}))


def _whole_places(model: HeliosTransformer, at: Mapping[tuple[int, str], Tensor]) -> Iterator[tuple[str, Place]]:
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            tensor = at.get((id(module), kind), parameter).detach()
            names = stored_names(path, module, kind)
            height = tensor.shape[0] // len(names)
            for index, name in enumerate(names):
                rows = slice(index * height, (index + 1) * height)
                if is_quantised(tensor):
                    yield name, {c: values[rows] for c, values in components(tensor).items()}
                else:
                    yield name, tensor[rows]


def set_adapters(
    model: HeliosTransformer, adapters: Iterable[Adapter], at: Mapping[tuple[int, str], Tensor] | None = None
) -> None:
    """Have a loaded transformer run with these adapters and no others. See `Pipeline.set_adapters`.

    Weights that neither the adapters until now nor the new ones touch are left alone; the others are made anew out of
    the checkpoint's files, in the memory where they are, so that compiled code and captured graphs stay valid. The
    result has the bits of a model that was loaded with these adapters; `[]` gives the checkpoint itself. With several
    ranks every one of them calls it. `at` has the memory of parameters that lie elsewhere than in the model, by the
    module's identity and their name.

    Costs no memory. Time: the touched weights are read from the page cache, or from disk where that was too small.
    Raises `RequestError` for adapters that do not fit, before anything is changed.
    """
    adapters = tuple(adapters)
    if adapters == getattr(model, "adapters", ()):
        return
    source: Source | None = getattr(model, "source", None)
    if source is None:
        raise RequestError(f"--lora {adapters[0].path}: these weights came from no checkpoint, so none can be merged")
    if source.is_stored_quantised:
        raise RequestError(f"--lora {adapters[0].path}: the weights are stored as {source.kind}, so none can be merged")
    updates = read_updates(adapters, source.shapes)
    touched = model.adapted | frozenset(updates)
    model.adapters, model.adapted = None, touched  # should this be interrupted, the next call makes all of them anew
    for name, place in _places(model, source, at).items():
        if name in touched:
            _fill(place, name, source.read, source, updates)
    model.adapters, model.adapted = adapters, frozenset(updates)
    if any(name.startswith("condition_embedder.") for name in touched):
        model._forget(None)  # the modulation of t = 0, which it computed once
