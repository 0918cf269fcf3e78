"""A pipeline spread over ranks: the one file that knows both Helios and groups of ranks.

Every rank runs the same request in step. Tokens are sharded on entry to the transformer and gathered on exit; the two
branches of guidance, the feed-forward weights and the VAE are spread by the other axes of the mesh. Text encoding and
media reading happen on rank 0, and frames end there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from helios_cp.config.checkpoint import WEIGHT_STEMS, Checkpoint
from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.device.device import make_current
from helios_cp.model.layers import FeedForward, TokenOperations, gelu_tanh
from helios_cp.model.sequence import TokenSequence
from helios_cp.model.text import PromptEncoder
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.prepare import prepare_parts
from helios_cp.pipeline.prompts import Branches
from helios_cp.pipeline.split_codec import SplitCodec
from helios_cp.pipeline.start import Inputs, initial_state, pixels_to_encode
from helios_cp.sampling.state import ChunkState
from helios_cp.weights.check import check_execution
from helios_cp.weights.load import resolve
from helios_cp.weights.loader import Loader
from helios_cp.weights.placement import Placement
from parallel.collectives import Group
from parallel.engines import sequence_attention
from parallel.mesh import Mesh
from parallel.segments import SegmentPlan
from parallel.tensor import feed_forward


def load_parallel(
    model: str | Checkpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    attention: str = "native",
    cache: Path | None = None,
    shard_weights: bool = False,
    denoise_only: bool = False,
    execution: Execution | None = None,
    parts: Loader = Loader(),
) -> ParallelPipeline:
    """Load this rank's part of a checkpoint; every rank of the mesh calls it.

    The text encoder is loaded on rank 0 only, the VAE on the ranks that share it with rank 0, and of the feed-forward
    weights only this rank's slice. With `shard_weights` every rank keeps an equal share of the blocks' weights (see
    `weights.placement`), and text is encoded on the CPU, as there is no room for the encoder. A mesh of one rank
    gives the plain pipeline. Raises `ValueError` for `shard_weights` where the mesh splits the feed-forward weights
    already, and for an `attention` engine that cannot run here, and `RequestError` for an `execution` that cannot.
    """
    weights = ("transformer",) if denoise_only else WEIGHT_STEMS
    checkpoint = model if isinstance(model, Checkpoint) else resolve(model, cache, weights=weights)
    device, layout = torch.device(device), Layout(mesh.degrees, attention, shard_weights)
    backend = dist.get_backend() if mesh.world.size > 1 else None
    execution = check_execution(checkpoint, execution or Execution(), device, dtype, layout, backend=backend)
    make_current(device)
    home = execution.home(device)
    sequence = ShardedSequence(mesh, attention, device)
    transformer, adapters = parts.transformer(checkpoint, dtype, device, execution, placement_of(mesh, shard_weights))
    transformer.sequence = sequence
    encodes, decodes = mesh.rank == 0 and not denoise_only, 0 in mesh.vae.ranks and not denoise_only
    text_home, text_device = (torch.device("cpu"),) * 2 if shard_weights else (home, device)
    encoder = PromptEncoder(*parts.text_encoder(checkpoint, text_home, dtype), text_device) if encodes else None
    codec = SplitCodec(parts.vae(checkpoint, home) if decodes else None, mesh.vae, execution)
    total = functools.partial(prompt_total, mesh=mesh)
    text_encoder = None if encoder is None else encoder.text_encoder
    card, block_cache = prepare_parts(execution, transformer, codec.vae, text_encoder, device, total)
    return ParallelPipeline(
        checkpoint,
        transformer,
        BroadcastPromptEncoder(encoder, mesh.world, checkpoint.transformer.text_dim, device),
        codec,
        parts.scheduler(checkpoint),
        SplitBranches(mesh.cfg) if mesh.cfg.size > 1 else Branches(),
        device,
        mesh=mesh,
        card=card,
        block_cache=block_cache,
        adapters=adapters,
    )


def placement_of(mesh: Mesh, shard_weights: bool) -> Placement:
    """Which parts of the transformer's weights this rank holds. Raises `ValueError` if both options split them."""
    if shard_weights and mesh.ffn_tp.size > 1:
        raise ValueError("shard_weights and ffn_tp: give one of the two, because both split the feed-forward weights")
    return Placement(shards=mesh.world) if shard_weights else Placement(mesh.ffn_tp)


class ShardedSequence(TokenSequence):
    """Each rank of the sequence group holds an equal part of every segment, history and noisy tokens alike."""

    def __init__(self, mesh: Mesh, attention: str = "native", device: str | torch.device = "cpu") -> None:
        self.mesh = mesh
        self.attention = sequence_attention(attention, mesh.ulysses, mesh.ring, device)
        self.operations = functools.lru_cache(maxsize=64)(self._operations)

    @property
    def group(self) -> Group:
        return self.mesh.sequence

    def shard(self, tokens: Tensor, dim: int, before: int) -> Tensor:
        return self._plan(tokens.shape[dim], before).shard(tokens, dim, self.group.rank)

    def gather(self, tokens: Tensor, dim: int, length: int, before: int) -> Tensor:
        plan = self._plan(length, before)
        return plan.unshard(self.group.all_gather(tokens, plan.local_lengths, dim), dim)

    def _operations(self, lengths: tuple[int, ...]) -> tuple[TokenOperations, TokenOperations]:
        plan = SegmentPlan(lengths, self.group.size)
        every, last = plan.local_lengths, plan.only(len(lengths) - 1).local_lengths
        return self._for_queries(every, every), self._for_queries(last, every)

    def _for_queries(self, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> TokenOperations:
        attention = self.attention(query_lengths, key_lengths)
        group = self.mesh.ffn_tp
        first = self.group.rank - group.rank
        lengths = tuple(query_lengths[first : first + group.size])

        def feed(layer: FeedForward, states: Tensor) -> Tensor:
            if group.size == 1:
                return layer(states)
            return feed_forward(states, layer.net[0].proj, gelu_tanh, layer.net[2], group, lengths)

        return TokenOperations(attention, feed)

    def _plan(self, length: int, before: int) -> SegmentPlan:
        # The surplus goes on where that of the segments before ended, as it does in one plan of all segments.
        return SegmentPlan((length,), self.group.size, before % self.group.size)


class SplitBranches(Branches):
    """One branch of guidance on each of two ranks, which exchange their velocities once a step."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.own = (group.rank,)

    def exchange(self, velocities: list[Tensor]) -> tuple[Tensor, Tensor]:
        (own,) = velocities
        prompt, negative = self.group.all_gather(own, [own.shape[0]] * 2, 0)
        return prompt, negative


@dataclass(eq=False)
class BroadcastPromptEncoder:
    """Text is encoded on rank 0 and broadcast."""

    encoder: PromptEncoder | None
    group: Group
    text_dim: int
    device: torch.device

    def __call__(self, prompts: Sequence[str], max_sequence_length: int, dtype: torch.dtype) -> Tensor:
        if self.encoder is not None:
            embeds = self.encoder(prompts, max_sequence_length, dtype).to(self.device)
        else:
            embeds = torch.empty(len(prompts), max_sequence_length, self.text_dim, dtype=dtype, device=self.device)
        return self.group.broadcast(embeds)


@dataclass(eq=False, repr=False, kw_only=True)
class ParallelPipeline(Pipeline):
    """A pipeline whose start is computed on rank 0 and broadcast, where there is a picture or clip to read."""

    mesh: Mesh

    def initial_state(self, request: Request, inputs: Inputs | None = None) -> ChunkState:
        inputs = inputs or Inputs()
        if self.mesh.world.size == 1 or not inputs.has_anchor:
            return super().initial_state(request, inputs)
        reads = self.mesh.rank == 0
        videos, hidden = pixels_to_encode(request, inputs) if reads else ([], 0)
        world, channels = self.mesh.world, self.checkpoint.transformer.in_channels
        count = int(world.broadcast(torch.tensor([len(videos)], device=self.device)))
        posteriors = self.codec.encode(videos if reads else [None] * count)
        state = None
        if reads:
            state = initial_state(request, inputs, self.codec, posteriors, hidden, channels, self.device)
        return self._broadcast(request, state)

    def share_state(self, request: Request, state: ChunkState | None) -> ChunkState | None:
        """Rank 0's saved state of a resolved request on every rank; `None` where it has none."""
        world = self.mesh.world
        if world.size == 1:
            return state
        index = int(world.broadcast(torch.tensor([0 if state is None else state.index], device=self.device)))
        return replace(self._broadcast(request, state), index=index) if index else None

    def _broadcast(self, request: Request, state: ChunkState | None) -> ChunkState:
        world = self.mesh.world
        if state is None:  # of the right shapes; what is in it is overwritten
            channels = self.checkpoint.transformer.in_channels
            state = initial_state(request, Inputs(), self.codec, [], 0, channels, self.device)
        anchor = None if state.anchor is None else world.broadcast(state.anchor)
        generators = world.broadcast(state.generators.to(self.device)).cpu()
        return ChunkState(state.index, world.broadcast(state.history), anchor, generators)


def prompt_total(sums: Tensor, mesh: Mesh) -> Tensor:
    """Sums `[N]` over each rank's tokens to those over all tokens of the prompt's branch, equal on every rank."""
    group = mesh.sequence
    return mesh.cfg.broadcast(torch.stack(group.all_gather(sums, [len(sums)] * group.size, 0)).sum(0))
