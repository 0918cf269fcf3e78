"""Weights that stay in host memory while they are not needed, so that a small card holds a large model.

`model`: text encoder, transformer and VAE are each on the card while they work, and stay there while all fit. `group`:
the layers of the transformer and of the text encoder pass through two buffers, one at work and the next on its way; no
other part is on the card meanwhile. Weights never change on the card, so nothing is copied back.

`diffusers.hooks.apply_group_offloading` does not serve: it hooks forwards of blocks alone, but a layer of each encodes
prompts outside of these; it pins every tensor rounded up to a power of two; and the host waits for each block's copies.

Each rank keeps its own weights in the memory of its host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helios_cp.device.device import has_streams
from helios_cp.device.memory import MARGIN, MemoryMeter, grow_segments
from helios_cp.device.streams import wait_for
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.runtime.device_weights import Copies, MemoryCounter, Resident, Streamed
from helios_cp.runtime.host_weights import HostWeights, Place, places, tensors_at


@dataclass(eq=False)
class Part:
    """Weights that are on the card together: those of a model, or of half of the VAE.

    `working` are the bytes that it needs beside its weights, if they were measured.
    """

    name: str
    held: Sequence[Resident | Streamed]
    is_here: bool = False
    working: int | None = None

    @property
    def device_bytes(self) -> int:
        return sum(each.device_bytes for each in self.held)

    def enter(self) -> None:
        """Bring the weights; where that fails, all of them stay away."""
        try:
            for each in self.held:
                each.enter()
        except BaseException:
            self.leave()
            raise
        self.is_here = True

    def leave(self) -> None:
        for each in self.held:
            each.leave()
        self.is_here = False


class Card:
    """Decides which parts have their weights on the device.

    With a `meter`, other parts stay beside the one at work if they fit, once it is measured what that one needs beside
    its weights. Without a meter there is one part at a time.
    """

    def __init__(self, device: torch.device, copies: Copies | None = None, meter: MemoryMeter | None = None) -> None:
        self.device = device
        self.counter = MemoryCounter()
        self.copies = copies or Copies(device)
        self.meter = meter
        self.parts: dict[str, Part] = {}
        self._at_work: Part | None = None
        self._needed: dict[str, int] = {}

    def add(self, name: str, held: Sequence[Resident | Streamed], entrances: Sequence[nn.Module]) -> Part:
        """A part whose work begins with a call of one of `entrances`."""
        part = self.parts[name] = Part(name, held)
        self._trim()
        for module in entrances:
            module.register_forward_pre_hook(lambda *_: self.use(part))
        return part

    def use(self, part: Part) -> None:
        """Have a part's weights on the device, and those of others away where there is no room for both."""
        if self._at_work is part:
            return
        self._stop_work()
        others = [other for other in self.parts.values() if other.is_here and other is not part]
        if others and not self._fits_beside(part):
            for other in others:
                other.leave()
            self._trim()
        if not part.is_here:
            part.enter()
        self._at_work = part
        if self.meter is not None:
            self.meter.begin()

    def expect(self, working: Mapping[str, int]) -> None:
        """Tell what parts need beside their weights from now on, in bytes by name, as `measured` told after a video of
        this size. Parts that are left out are unknown. `measured` starts anew.
        """
        self._stop_work()
        self._needed = {}
        for name, part in self.parts.items():
            part.working = working.get(name)

    def measured(self) -> dict[str, int]:
        """Bytes that parts have needed beside their weights since `expect`, by name; between chunks."""
        self._stop_work()
        return dict(self._needed)

    def rest(self) -> None:
        """Take everything off the device, as before weights on the host are changed."""
        self._stop_work()
        for part in self.parts.values():
            if part.is_here:
                part.leave()

    def resting(self, model: nn.Module) -> dict[str, Tensor]:
        """The host memory of a model's parameters, by name, once all is off the device; it can be written to."""
        self.rest()
        paths = {module: path for path, module in model.named_modules()}
        stored = [(place, tensor) for place, tensor in self.stored() if place.module in paths]
        return {f"{paths[place.module]}.{place.name}": tensor for place, tensor in stored}

    def stored(self) -> Iterator[tuple[Place, Tensor]]:
        """Where every parameter and buffer rests on the host. Call `rest` first to write there."""
        for part in self.parts.values():
            for held in part.held:
                for weights in held.weights:
                    yield from weights.stored()

    def resident(self, found: Sequence[Place]) -> Resident:
        return Resident(HostWeights(found, self.device), self.device, self.counter)

    def streamed(self, layers: Sequence[list[Place]], following: Sequence[int]) -> Streamed:
        weights = [HostWeights(found, self.device) for found in layers]
        return Streamed(weights, following, self.device, self.counter, self.copies)

    def _stop_work(self) -> None:
        """No part is at work from now on. So if bringing weights fails, no part is taken to be in place."""
        part, self._at_work = self._at_work, None
        if part is not None and self.meter is not None:
            self._needed[part.name] = max(self._needed.get(part.name, 0), self.meter.needed())

    def _trim(self) -> None:
        """Have PyTorch's allocator give back to the driver what nobody holds.

        With segments that grow it waits for the work of the current device, as in another thread, and not for that of
        the one whose memory it takes (pytorch/pytorch issue 196258).
        """
        if has_streams(self.device):
            wait_for(self.device)
            torch.accelerator.empty_cache()

    def _fits_beside(self, part: Part) -> bool:
        if self.meter is None or part.working is None:
            return False
        free = self.meter.free()
        return free is not None and free >= MARGIN * (part.working + (0 if part.is_here else part.device_bytes))


def offload(
    how: str,
    device: torch.device,
    text_encoder: nn.Module | None,
    transformer: HeliosTransformer,
    vae: nn.Module | None,
    card: Card | None = None,
) -> Card:
    """Take weights, which are in host memory, into the care of a card: `how` is "model" or "group".

    What they compute, to the bit, stays the same. Parameters read as on the device from now on, but hold values only
    while their part is at work; `Card.stored` has them.
    """
    grow_segments(device)
    if card is None:
        card = Card(device, meter=MemoryMeter(device) if how == "model" else None)
    with torch.no_grad():
        if text_encoder is not None:
            _add_text_encoder(card, text_encoder, how)
        _add_transformer(card, transformer, how)
        if vae is not None:
            card.add("encoder", [card.resident(places([vae.encoder, vae.quant_conv]))], [vae.encoder])
            card.add("decoder", [card.resident(places([vae.decoder, vae.post_quant_conv]))], [vae.post_quant_conv])
    return card


def _add_transformer(card: Card, transformer: HeliosTransformer, how: str) -> None:
    blocks, text_embedder = transformer.blocks, transformer.condition_embedder.text_embedder
    entrances = [transformer, text_embedder]
    entrances += [module for name, module in transformer.named_children() if name.startswith("patch_")]
    if how == "model":
        card.add("transformer", [card.resident(places([transformer]))], entrances)
        return
    layers, rest = transformer_layers(transformer)
    before_blocks = [text_embedder, *(block.attn2.to_kv for block in blocks)]
    streamed = card.streamed(layers, [*range(1, len(layers)), len(before_blocks)])
    card.add("transformer", [card.resident(rest), streamed], entrances)
    _fetch_for([*before_blocks, *blocks], streamed)


def transformer_layers(transformer: HeliosTransformer) -> tuple[list[list[Place]], list[Place]]:
    """What passes through the buffers together, in order; and what does not.

    Before the blocks comes what encodes a prompt, as a forward never needs that.
    """
    blocks = transformer.blocks
    text = [places([block.attn2.to_kv, block.attn2.norm_k]) for block in blocks]
    layers = [places([transformer.condition_embedder.text_embedder]), *text]
    layers += [places([block], tensors_at(own)) for block, own in zip(blocks, text, strict=True)]
    return layers, places([transformer], tensors_at(itertools.chain.from_iterable(layers)))


def _add_text_encoder(card: Card, text_encoder: nn.Module, how: str) -> None:
    """Its table of words stays on the host, where the few rows of a prompt are looked up."""
    stack = text_encoder.encoder
    table = stack.embed_tokens
    table.register_forward_pre_hook(lambda _, inputs: tuple(ids.to(table.weight.device) for ids in inputs))
    table.register_forward_hook(lambda _, inputs, rows: rows.to(card.device))
    kept = [*table.parameters(), *text_encoder.shared.parameters()]
    if how == "model":
        card.add("text encoder", [card.resident(places([text_encoder], kept))], [text_encoder])
        return
    layers = [places([layer]) for layer in stack.block]
    rest = places([text_encoder], [*kept, *tensors_at(itertools.chain.from_iterable(layers))])
    streamed = card.streamed(layers, [*range(1, len(layers)), 0])
    card.add("text encoder", [card.resident(rest), streamed], [text_encoder])
    _fetch_for(stack.block, streamed)


def _fetch_for(layers: Iterable[nn.Module], streamed: Streamed) -> None:
    """Before a layer runs its weights are fetched, by a hook: compiled code knows nothing of offloading."""
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: streamed.fetch(index))
