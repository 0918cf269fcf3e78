"""The worker that encodes prompts."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from helios_cp.config.imports import import_text_encoder
from helios_cp.config.request import Request
from helios_cp.pipeline.prompts import texts_from
from launchers.messages.arrays import Array
from launchers.messages.messages import ActorInfo, Clock, Text
from launchers.workers.watched import Watched, own_info

KEPT = 32
"""Embeddings of the latest texts, so that a change of prompt encodes one text alone: 4 MB each at 14B."""


class TextEncoder(Watched):
    """Prompts to embeddings. `device` is "cuda" or "cpu", which need not be that of the denoiser; `dtype` is its."""

    def __init__(self, model: str, device: str, dtype: str, cache: Path | None = None) -> None:
        self.model = model
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.cache = cache
        self._embedding = lru_cache(KEPT)(self._encode)

    def load(self) -> ActorInfo:
        from helios_cp.model.text import PromptEncoder
        from helios_cp.weights.load import load_text_encoder, resolve

        checkpoint = resolve(self.model, self.cache, weights=("text_encoder",))
        import_text_encoder()
        self.encoder = PromptEncoder(*load_text_encoder(checkpoint, self.device, self.dtype))
        return own_info()

    def encode(self, request: Request, is_guided: bool, first: int = 0) -> Text:
        """The texts of a request; of a schedule, those from entry `first` on."""
        clock, length = Clock(), request.max_sequence_length
        prompts = torch.cat([self._embedding(text, length) for text in texts_from(request, first)])
        negative = Array.of(self._embedding(request.negative_prompt, length)) if is_guided else None
        clock.part("text")
        return Text(Array.of(prompts), negative, clock.span(), first)

    @torch.no_grad()
    def _encode(self, text: str, length: int) -> Tensor:
        """`[1, length, text_dim]`, on the CPU."""
        return self.encoder([text], length, self.dtype).cpu()
