"""The worker that encodes prompts."""

from __future__ import annotations

from pathlib import Path

import torch

from helios_cp.config.request import Request
from launchers.messages.arrays import Array
from launchers.messages.messages import ActorInfo, Clock, Text
from launchers.workers.watched import Watched, own_info


class TextEncoder(Watched):
    """Prompts to embeddings. `device` is "cuda" or "cpu", which need not be that of the denoiser; `dtype` is its."""

    def __init__(self, model: str, device: str, dtype: str, cache: Path | None = None) -> None:
        self.model = model
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.cache = cache

    def load(self) -> ActorInfo:
        from helios_cp.model.text import PromptEncoder
        from helios_cp.weights.load import load_text_encoder, resolve

        checkpoint = resolve(self.model, self.cache, weights=("text_encoder",))
        self.encoder = PromptEncoder(*load_text_encoder(checkpoint, self.device, self.dtype))
        return own_info()

    @torch.no_grad()
    def encode(self, request: Request, is_guided: bool) -> Text:
        clock = Clock()
        length, dtype = request.max_sequence_length, self.dtype
        texts = tuple(entry.prompt for entry in request.prompt_schedule) or request.prompt
        prompts = Array.of(self.encoder(texts, length, dtype))
        negative = Array.of(self.encoder([request.negative_prompt], length, dtype)) if is_guided else None
        clock.part("text")
        return Text(prompts, negative, clock.span())
