"""Unit, without a cluster: the worker that encodes prompts."""

from __future__ import annotations

import pytest
import torch

from helios_cp.config.request import Request
from helios_cp.model.text import PromptEncoder
from helios_cp.weights.load import load_text_encoder, resolve
from launchers.workers.text_encoder import KEPT, TextEncoder

FOX = Request(prompt=("a fox",), num_frames=4 * 33, max_sequence_length=64, negative_prompt="blurry")


@pytest.fixture
def worker(presets, cache):
    """With `encoded`, the texts that it has encoded."""
    checkpoint = resolve(str(presets["random-mid"]), cache, weights=("text_encoder",))
    worker = TextEncoder(checkpoint.source, "cpu", "float32")
    encoder, worker.encoded = PromptEncoder(*load_text_encoder(checkpoint, "cpu", torch.float32)), []
    worker.encoder = lambda texts, *rest: (worker.encoded.extend(texts), encoder(texts, *rest))[1]
    return worker


def test_a_change_encodes_one_text(worker):
    """Of a schedule only the entries that are still shown travel, and bits do not depend on those beside them."""
    fox = worker.encode(FOX, True)
    owl = worker.encode(FOX.with_change(1, "an owl", 2), True)
    assert worker.encoded == ["a fox", "blurry", "an owl"]
    both = owl.prompts.tensor()
    assert both[:1].equal(fox.prompts.tensor()) and owl.negative.tensor().equal(fox.negative.tensor())
    alone = worker.encode(FOX.with_change(1, "an owl"), False, 1)
    assert alone.first == 1 and alone.negative is None and alone.prompts.tensor().equal(both[1:])
    assert worker.encoded == ["a fox", "blurry", "an owl"]


def test_old_embeddings_go(worker):
    for number in range(KEPT + 1):
        worker.encode(Request(prompt=(str(number),), max_sequence_length=8), False)
    worker.encode(Request(prompt=("0",), max_sequence_length=8), False)
    assert worker.encoded[-1] == "0" and len(worker.encoded) == KEPT + 2
