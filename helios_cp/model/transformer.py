"""The Helios transformer: latents, a timestep, text and history in, velocity out.

What does not change from step to step is computed apart and passed in: `encode_text` once per prompt, `encode_history`
once per chunk. The model knows nothing of ranks: attention and the sharding of the sequence are injected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.conditions import History, HistoryCondition, TextCondition
from helios_cp.model.embedders import ConditionEmbedder, PatchEmbedding
from helios_cp.model.layers import Block, TokenOperations, modulated_norm
from helios_cp.model.rope import RotaryTables, pad_to_multiple
from helios_cp.model.sequence import TokenSequence

KEPT_IN_FP32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "history_key_scale")


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks of one forward take beside the residual stream; see `Block.forward`.

    `keys_values` has a pair for each block, of the text of number `text`; `inner` are the operations of all blocks but
    the last, which takes `last`.
    """

    modulation: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    rotary: Tensor
    history: int
    inner: TokenOperations
    last: TokenOperations
    text: int = 0

    def run(self, blocks: Iterable[Block], states: Tensor, first: int = 0) -> Tensor:
        """Call consecutive blocks, of which the first is number `first` of the model.

        The model's last block returns its noisy tokens alone.
        """
        for index, block in enumerate(blocks, first):
            prunes = index + 1 == len(self.keys_values)
            operations = self.last if prunes else self.inner
            pair = self.keys_values[index]
            states = block(states, self.modulation, pair, self.rotary, self.history, operations, prune_history=prunes)
        return states


Body = Callable[[nn.ModuleList, Tensor, BlockInputs], Tensor]
"""From the residual stream `[B, S, dim]` that enters the blocks to that of the noisy tokens that leaves them."""


def run_blocks(blocks: nn.ModuleList, states: Tensor, inputs: BlockInputs) -> Tensor:
    """The body of every forward that skips nothing."""
    return inputs.run(blocks, states)


class HeliosTransformer(nn.Module):
    """`HeliosTransformer3DModel` with the same parameter names and none of the repeated work."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.rotary = RotaryTables(config.rope_dim, config.rope_theta)
        self.sequence = TokenSequence()
        self.body: Body = run_blocks
        self.on_changed_weights: list[Callable[[], None]] = []
        self._zero_timestep: tuple[Tensor, Tensor] | None = None

        self.patch_embedding = PatchEmbedding(config.in_channels, dim, config.patch_size)
        if config.has_multi_term_memory_patch:
            for name, factor in (("short", 1), ("mid", 2), ("long", 4)):
                size = tuple(factor * p for p in config.patch_size)
                self.add_module(f"patch_{name}", PatchEmbedding(config.in_channels, dim, size))
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = OutputNorm(dim, config.eps)
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(config.patch_size))
        self.register_load_state_dict_post_hook(lambda model, _: model.weights_changed())

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        """Whether the parameter stays in fp32 whatever the dtype of the model."""
        return any(part in KEPT_IN_FP32 for part in name.split("."))

    def _apply(self, function, recurse: bool = True) -> HeliosTransformer:
        super()._apply(function, recurse)
        self.weights_changed()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.proj_out.weight.device

    def cast(self, dtype: torch.dtype) -> HeliosTransformer:
        """Change the dtype of all parameters that are not kept in fp32."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if self.keeps_fp32(name) else dtype)
        self.weights_changed()
        return self

    def weights_changed(self) -> None:
        """Call this when parameters lie elsewhere, or when those that embed the timestep have new values.

        It drops what was computed from them, and calls `on_changed_weights`, for whoever remembers where they lay.
        """
        self._zero_timestep = None
        for call in self.on_changed_weights:
            call()

    def encode_text(self, prompt_embeds: Tensor, number: int = 0) -> TextCondition:
        """Keys and values of every block for `[B, L, text_dim]`; once per prompt. `number` as in `TextCondition`."""
        text = self.condition_embedder.text_embedder(prompt_embeds.to(self.dtype))
        return TextCondition(tuple(block.attn2.keys_values(text) for block in self.blocks), number)

    def encode_history(self, history: History) -> HistoryCondition:
        """Embed the history frames; once per chunk.

        Raises `ValueError` if the checkpoint has no history patches.
        """
        if not self.config.has_multi_term_memory_patch:
            raise ValueError("has_multi_term_memory_patch is off in this checkpoint: it takes no history")
        rows, columns = self.patch_short.grid(history.short)[1:]
        device = history.short.device
        parts = (
            (self.patch_long, history.long, history.long_indices, 4),
            (self.patch_mid, history.mid, history.mid_indices, 2),
            (self.patch_short, history.short, history.short_indices, 1),
        )
        tokens, tables, lengths = [], [], []
        for embedding, latents, indices, pool in parts:
            if latents is None:
                continue
            if pool > 1:
                latents = pad_to_multiple(latents, embedding.patch_size)
            patches = embedding.patches(latents.to(self.dtype))
            table = self.rotary.table(indices, rows, columns, device, pool)
            tokens.append(embedding(self.sequence.shard(patches, 1, sum(lengths))))
            tables.append(self.sequence.shard(table, 0, sum(lengths)))
            lengths.append(patches.shape[1])
        return HistoryCondition(torch.cat(tokens, 1), torch.cat(tables), tuple(lengths))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextCondition,
        history: HistoryCondition | None = None,
        frame_indices: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Velocity `[B, C, T, h, w]` of noisy `latents` of that shape.

        `timestep` is `[1]` or `[B]`, in training steps (0–1000). `frame_indices` places the noisy frames in time, by
        default 0, 1, 2, ….
        """
        grid = self.patch_embedding.grid(latents)
        lengths = () if history is None else history.lengths
        before, noisy = sum(lengths), math.prod(grid)
        rotary = self.sequence.shard(self._noisy_table(latents, frame_indices), 0, before)
        patches = self.patch_embedding.patches(latents.to(self.dtype))
        states = self.patch_embedding(self.sequence.shard(patches, 1, before))
        history_tokens = 0
        if history is not None:
            history_tokens = history.tokens.shape[1]
            states = torch.cat([history.tokens, states], 1)
            rotary = torch.cat([history.rotary, rotary])

        temb, modulation = self.condition_embedder(timestep)
        at_zero = self._at_zero(modulation.device)[1] if self.config.zero_history_timestep else modulation
        modulation = torch.stack([at_zero.expand_as(modulation), modulation], 1).float()  # [R, 2, 6, dim]
        inner, last = self.sequence.operations((*lengths, noisy))
        states = self.body(
            self.blocks,
            states,
            BlockInputs(
                modulation, text.keys_values, torch.view_as_real(rotary), history_tokens, inner, last, text.number
            ),
        )
        out = self.proj_out(self.norm_out(states, temb))
        return self._unpatchify(self.sequence.gather(out, 1, noisy, before), grid)

    def reads_besides(self, latents: Tensor, frame_indices: tuple[int, ...] | None = None) -> Iterator[Tensor]:
        """The tensors that a forward of such latents reads beside its arguments: parameters, and tables it keeps."""
        yield from self.parameters()
        yield from self.buffers()
        yield self._noisy_table(latents, frame_indices)
        if self.config.zero_history_timestep:
            yield from self._at_zero(latents.device)

    def _noisy_table(self, latents: Tensor, frame_indices: tuple[int, ...] | None) -> Tensor:
        frames, rows, columns = self.patch_embedding.grid(latents)
        return self.rotary.table(frame_indices or tuple(range(frames)), rows, columns, latents.device)

    def _at_zero(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The embedding of t = 0 and its modulation rows, which history tokens take; computed once."""
        if self._zero_timestep is None:
            self._zero_timestep = self.condition_embedder(torch.zeros(1, device=device))
        return self._zero_timestep

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        time, rows, columns = grid
        pt, ph, pw = self.config.patch_size
        patches = tokens.view(tokens.shape[0], time, rows, columns, pt, ph, pw, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class OutputNorm(nn.Module):
    """LayerNorm of the noisy tokens, modulated by the timestep embedding."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, states: Tensor, temb: Tensor) -> Tensor:
        """`[B, S, dim]` and `[R, dim]` to `[B, S, dim]`."""
        rows = (self.scale_shift_table + temb.float().unsqueeze(1)).unsqueeze(1)  # [R, 1, 2, dim]
        shift, scale = rows.expand(-1, 2, -1, -1).unbind(2)
        return modulated_norm(states, shift, 1 + scale, 0, self.eps)


def empty_model(config: TransformerConfig, dtype: torch.dtype) -> HeliosTransformer:
    """A transformer of shapes alone, on the meta device, made in milliseconds; cast as the engine casts it."""
    with torch.device("meta"), _NoValues():
        model = HeliosTransformer(config)
    return model.cast(dtype)


class _NoValues(TorchFunctionMode):
    """Leaves out random initial values, because to scale them on the meta device torch loads its compiler: 1 s."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.Tensor.div, torch.Tensor.__truediv__):
            return args[0]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))
