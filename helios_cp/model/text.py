"""Prompts to text embeddings, as diffusers' Helios pipelines compute them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


def clean(prompt: str) -> str:
    """Repair broken Unicode, resolve HTML entities, also doubly escaped ones, and make all white space one blank."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    max_sequence_length: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """Embeddings `[B, max_sequence_length, text_dim]` in `dtype`, on `device`, by default where the encoder is.

    Longer prompts are cut. The places after a prompt's last token are zero vectors: the transformer attends to them
    like to any other, so they are part of the result.
    """
    tokens = tokenizer(
        [clean(prompt) for prompt in prompts],
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(device or text_encoder.device)
    states = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.to(dtype)
    return states.masked_fill(tokens.attention_mask.unsqueeze(-1) == 0, 0)


@dataclass(eq=False)
class PromptEncoder:
    """The text encoder on this rank. `helios_cp.pipeline.parallelize` has one that broadcasts from one rank.

    `device` is where it computes, by default where its weights are.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    device: torch.device | None = None

    def __call__(self, prompts: Sequence[str], max_sequence_length: int, dtype: torch.dtype) -> Tensor:
        """Embeddings `[B, max_sequence_length, text_dim]` in `dtype`.

        Each prompt is encoded alone, because in a batch the bits of one can depend on how many others there are.
        """
        alone = [
            encode_prompts(self.tokenizer, self.text_encoder, [prompt], max_sequence_length, dtype, self.device)
            for prompt in prompts
        ]
        return torch.cat(alone)
