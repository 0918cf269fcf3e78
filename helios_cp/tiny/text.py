"""The embedded text encoder: a small UMT5 on bytes, trained alone to name what a caption says, then frozen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helios_cp.tiny.captions import caption, disturbed
from helios_cp.tiny.world import COLOURS, DIRECTIONS, GROUNDS, SUBJECTS, TIMES, draw_scene

CONFIG = {
    "vocab_size": 384,  # what ByT5Tokenizer has: bytes, special tokens and sentinels
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
LABELS = {"ground": GROUNDS, "time": TIMES, "subject": SUBJECTS, "colour": COLOURS, "direction": DIRECTIONS}
NEIGHBOURS = ((-1, -2, -3, 1), (-4, 3, -2, -6))
"""Which byte each head of the first two layers looks at to begin with. Bytes make words, and gradients alone find that
late: without this, colours stay at 60 %."""


class Reader(nn.Module):
    """The encoder with a classifier for each label, whose last class is "not said"."""

    def __init__(self) -> None:
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        self.encoder = UMT5EncoderModel(UMT5Config(**CONFIG))
        self.heads = nn.ModuleDict({key: nn.Linear(CONFIG["d_model"], len(v) + 1) for key, v in LABELS.items()})
        with torch.no_grad():
            for block, offsets in zip(self.encoder.encoder.block, NEIGHBOURS, strict=False):
                table = block.layer[0].SelfAttention.relative_attention_bias.weight  # [32 buckets, heads]
                for head, offset in enumerate(offsets):
                    table[offset + 16 if offset > 0 else -offset, head] += 5

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States `[B, L, D]` of tokens `[B, L]`."""
        return self.encoder(ids, mask).last_hidden_state

    def name(self, states: Tensor) -> dict[str, Tensor]:
        """Scores `[B, classes]` of each label from states `[B, D]`."""
        return {key: head(states) for key, head in self.heads.items()}


def is_matrix(name: str) -> bool:
    """Linear layers of the encoder, without embeddings and position tables."""
    return name.startswith("encoder.encoder.block") and "bias" not in name and "norm" not in name


def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[B, L]` as ByT5Tokenizer's: bytes + 3, then </s> = 1, then padding 0."""
    rows = [[byte + 3 for byte in text.encode()] + [1] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, (torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]).long()


def draw_texts(generator: random.Random, count: int, held_out: bool = False) -> tuple[list[str], dict[str, Tensor]]:
    """Captions and for each label the classes `[B]` that they name; the last class where they name none."""
    texts: list[str] = []
    classes: dict[str, list[int]] = {key: [] for key in LABELS}
    for _ in range(count):
        text, named = caption(draw_scene(generator, held_out), generator)
        if generator.random() < 0.04:
            text, named = "", dict.fromkeys(named)
        texts.append(disturbed(text, generator))
        for key, values in LABELS.items():
            classes[key].append(len(values) if named[key] is None else values.index(named[key]))
    return texts, {key: torch.tensor(values) for key, values in classes.items()}


def training_loss(reader: Reader, generator: random.Random, count: int = 32) -> tuple[Tensor, dict[str, float]]:
    """Every label must be read from the mean of the states and from any single one, which is what attention takes."""
    texts, classes = draw_texts(generator, count)
    ids, mask = tokenize(texts)
    device = next(reader.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    states = reader(ids, mask)
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    place = (torch.rand(count, device=device) * mask.sum(1)).long()
    single = states[torch.arange(count, device=device), place]
    loss = 0.02 * (states.square() * mask[..., None]).sum() / mask.sum() / states.shape[-1]  # keeps the scale near 1
    figures = {}
    for (key, whole), part in zip(reader.name(mean).items(), reader.name(single).values(), strict=True):
        target = classes[key].to(device)
        loss = loss + F.cross_entropy(whole, target) + F.cross_entropy(part, target)
        figures[key] = (whole.argmax(-1) == target).float().mean().item()
    return loss, figures


@torch.no_grad()
def accuracy(reader: Reader, count: int = 400, seed: int = 1) -> dict[str, float]:
    """The share of labels read right from captions of held-out combinations."""
    texts, classes = draw_texts(random.Random(seed), count, held_out=True)
    ids, mask = tokenize(texts)
    states = reader(ids, mask)
    named = reader.name((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return {key: (named[key].argmax(-1) == classes[key]).float().mean().item() for key in LABELS}
