"""Loads the transformer from its files, in part, quantised, with adapters merged; and exchanges adapters later.

Each weight is computed from the files, never from what was in the model before. So a model whose adapters were
exchanged has the bits of one that was loaded with them. For this the files stay mapped into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helios_cp.config.checkpoint import WEIGHT_STEMS, Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter, Execution
from helios_cp.files.tensor_files import Reader, Slices, StoredTensor, check_fit, open_file, read, stored_tensors
from helios_cp.model.fused import stored_names
from helios_cp.model.transformer import HeliosTransformer, empty_model
from helios_cp.weights.load import allocate
from helios_cp.weights.lora import Update, merged, read_updates, shapes_of
from helios_cp.weights.placement import Destination, Moved, Placement
from helios_cp.weights.quantize import (
    assemble,
    check_stored,
    empty_components,
    is_block_linear,
    part_of_component,
    quantise,
    stored_quantization,
    with_components,
)

STEM = WEIGHT_STEMS["transformer"]
IGNORED_KEY = "norm_added_q"  # in some checkpoints, used by no Helios; diffusers leaves it out too

Read = Callable[[str, Slices], Tensor]
Updates = Mapping[str, Sequence[Update]]


def load_adaptable(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    execution: Execution = Execution(),
    placement: Placement = Placement(),
) -> tuple[HeliosTransformer, AdapterState]:
    """The transformer in `dtype`, apart from what it keeps in fp32, ready for inference; and what exchanges adapters.

    It computes on `device`. `execution` says where its weights lie meanwhile, how they are quantised and which adapters
    are merged into them; `placement` which parts of them this rank holds. No other part is read. Memory is allocated
    once; then tensors come into place one at a time.

    Raises `CheckpointError`, before anything is allocated, if files or keys are missing, left over or of the wrong
    shape, `RequestError` for an `execution` that does not fit the checkpoint, and `ValueError` for quantised weights
    that are to be sharded.
    """
    device = torch.device(device)
    home = torch.device(execution.home(device))
    stored = stored_transformer(checkpoint)
    stored_kind = stored_quantization(checkpoint.folder)
    kind = execution.quantize or stored_kind
    if kind is not None and placement.is_sharded:
        raise ValueError("quantised and sharded weights: give one of the two; FSDP gathers no quantised weights")
    model = empty_model(checkpoint.transformer, dtype)
    shapes = shapes_of(model)
    check_transformer(checkpoint, stored, shapes, quantised_layers(model), stored_kind)
    updates = read_updates(execution.lora, shapes)
    assert not list(model.buffers()), "buffers are not part of a checkpoint and would stay empty"

    placement.shrink(model, home)
    _allocate(model, home, kind)
    is_stored_quantised = stored_kind is not None
    state = AdapterState(model, placement, Reader(stored), shapes, kind, is_stored_quantised, device)
    _fill_all(state, updates)
    state.current, state.touched = execution.lora, frozenset(updates)
    return model.eval().requires_grad_(False), state


@dataclass
class AdapterState:
    """The adapters in a loaded transformer's weights, and what it takes to exchange them.

    `shapes` are those of all weights, by name. Weights of the blocks are of `kind`, in the files already if
    `is_stored_quantised`. They are computed on `device`. `touched` are the weights that the `current` adapters change;
    `current` is `None` after an interruption.
    """

    model: HeliosTransformer
    placement: Placement
    read: Reader
    shapes: Mapping[str, tuple[int, ...]]
    kind: str | None
    is_stored_quantised: bool
    device: torch.device
    current: tuple[Adapter, ...] | None = ()
    touched: frozenset[str] = frozenset()

    @torch.no_grad()
    def fill(self, destination: Destination, updates: Updates, read: Read | None = None) -> None:
        """Make what lies at `destination` anew, through `read` if that is given."""
        read = read or self.read
        name, part, memory = destination.name, destination.part, destination.memory
        if not isinstance(memory, dict) and name not in updates:
            memory.copy_(read(name, part))
            return
        # All of it first: a row is quantised whole, and a product of a part of two factors might round elsewhere.
        whole = merged(read(name, ()).to(self.device), updates.get(name, ()))
        if not isinstance(memory, dict):
            memory.copy_(whole[part] if part else whole)
            return
        for component, values in quantise(whole, self.kind).items():
            own = part_of_component(part, component, self.kind)
            memory[component].copy_(values[own] if own else values)

    def exchange(self, adapters: Iterable[Adapter], moved: Moved | None = None) -> None:
        """Have the transformer run with these adapters and no others.

        Weights that neither the adapters until now nor the new ones touch are left alone; the others are made anew out
        of the checkpoint's files, in the memory where they are, so that compiled code and captured graphs stay valid.
        `moved` is the memory of parameters that do not lie in the model. Every rank calls this.

        Costs no memory. Time: the touched weights are read from the page cache, or from disk where that was too small.
        Raises `RequestError` for adapters that do not fit, before anything is changed.
        """
        adapters = tuple(adapters)
        if adapters == self.current:
            return
        if self.is_stored_quantised:
            kind = self.kind
            raise RequestError(f"--lora {adapters[0].path}: the weights are stored as {kind}, so none can be merged")
        updates = read_updates(adapters, self.shapes)
        touched = self.touched | frozenset(updates)
        self.current, self.touched = None, touched  # if this is interrupted, the next call makes all of them anew
        for destination in self.placement.destinations(self.model, moved or {}):
            if destination.name in touched:
                self.fill(destination, updates)
        self.current, self.touched = adapters, frozenset(updates)
        if any(name.startswith("condition_embedder.") for name in touched):
            self.model.weights_changed()


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
    allocate(model, device)
    for module, (shape, dtype) in zip(quantised, weights, strict=True):
        weight = assemble(empty_components(*shape, kind, device), kind, dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)


def _fill_all(state: AdapterState, updates: Updates) -> None:
    """File after file, none of which stays mapped once it was read: what is mapped and read counts as memory used."""
    stored = state.read.stored
    found = {destination.name: destination for destination in _stored_destinations(state)}
    own = [name for name in stored if name in found]
    for file, names in itertools.groupby(own, key=lambda name: stored[name].file):
        with open_file(file) as shard:
            for name in names:
                state.fill(found[name], updates, lambda name, part, shard=shard: read(shard, name, part))


def _stored_destinations(state: AdapterState) -> Iterator[Destination]:
    """One for each tensor of the files. Of weights that are stored quantised, each component is one."""
    for destination in state.placement.destinations(state.model, {}):
        if not state.is_stored_quantised or not isinstance(destination.memory, dict):
            yield destination
            continue
        for component, memory in destination.memory.items():
            part = part_of_component(destination.part, component, state.kind)
            yield Destination(f"{destination.name}.{component}", part, memory)
