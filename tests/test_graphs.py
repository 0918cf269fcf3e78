"""Unit: buffers, keys and limits of replayed forwards, where a replay runs the function again on the static inputs.

On such a replay nothing is computed but what the graph computes from its buffers, so a stale or foreign buffer shows in
the output. Results equal eager ones bitwise: the same operations run on copies. GPU: real graphs, bitwise as well, and
with compiled blocks within 1e-2 of the range in bf16 (8 bits of mantissa; compiled code rounds less often).
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from helios_cp.config import Checkpoint, Request, RequestError
from helios_cp.execution import Execution
from helios_cp.graphs import GraphedForward, StaticInputs, capture_forwards
from helios_cp.pipeline import Pipeline
from helios_cp.transformer import HeliosTransformer, History
from helios_cp.weights import load_transformer

INDICES = tuple(range(20, 29))


class Captures:
    """Stands in for `CudaCapture`; counts captures and replays."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, function):
        self.captures += 1
        output = function().clone()

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return replay, output


@pytest.fixture
def transformer(presets) -> HeliosTransformer:
    return load_transformer(Checkpoint.read(presets["tiny-mid"]), torch.float32)


@pytest.fixture
def captures() -> Captures:
    return Captures()


def text_of(transformer, seed: int):
    return transformer.encode_text(torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(seed)))


def history_of(transformer, seed: int):
    generator = torch.Generator().manual_seed(seed)
    short, mid = (torch.randn(1, 16, 2, 4, 4, generator=generator) for _ in range(2))
    return transformer.encode_history(History(short, (0, 19), mid, (17, 18)))


def latents_of(seed: int, size: int = 4) -> Tensor:
    return torch.randn(1, 16, 9, size, size, generator=torch.Generator().manual_seed(seed))


def test_replays_are_the_forwards(transformer, captures):
    """Two stages, two prompts, two histories in turn, no history, other frames: each as eager, whatever came before."""
    graphed = GraphedForward(transformer, captures)
    texts, histories = ([make(transformer, seed) for seed in (0, 1)] for make in (text_of, history_of))
    calls = [
        (latents_of(seed, size), torch.tensor([100 * seed + 50]), texts[seed % 2], history, indices)
        for seed in range(4)
        for size in (2, 4)
        for history, indices in ((histories[seed // 2], INDICES), (None, None))
    ]
    kept = [graphed(*call) for call in calls]
    for call, output in zip(calls, kept, strict=True):
        assert torch.equal(output, transformer.forward(*call))
    assert captures.captures == 4, "a stage, with and without history"
    assert captures.replays == len(calls)


def test_conditions_are_copied_when_they_change_only(transformer, captures, monkeypatch):
    """All stages share one buffer of the text and one of the history."""
    graphed = GraphedForward(transformer, captures)
    copied = []
    fill = StaticInputs.fill

    def watched(buffer, value):
        before = [tensor._version for tensor in buffer.tensors]
        fill(buffer, value)
        if before != [tensor._version for tensor in buffer.tensors]:
            copied.append(type(value).__name__)

    monkeypatch.setattr(StaticInputs, "fill", watched)
    text, history = text_of(transformer, 0), history_of(transformer, 0)
    for size in (2, 4, 2, 4):
        graphed(latents_of(0, size), torch.tensor([700]), text, history, INDICES)
    assert copied.count("TextCondition") == copied.count("HistoryCondition") == 1
    assert copied.count("Tensor") == 2 * 4
    graphed(latents_of(0), torch.tensor([700]), text_of(transformer, 1), history, INDICES)
    assert copied.count("TextCondition") == 2 and copied.count("HistoryCondition") == 1


def test_a_stale_buffer_shows(transformer, captures, monkeypatch):
    """What `test_replays_are_the_forwards` would see if a changed prompt were not copied."""
    graphed = GraphedForward(transformer, captures)
    call = latents_of(0), torch.tensor([700])
    graphed(*call, text_of(transformer, 0))
    monkeypatch.setattr(StaticInputs, "fill", lambda *_: None)
    other = text_of(transformer, 1)
    assert (graphed(*call, other) - transformer.forward(*call, other)).abs().max() > 1e-2


@pytest.mark.parametrize("change", ["a parameter elsewhere", "t = 0 forgotten"])
def test_captures_anew_when_what_it_reads_moves(transformer, captures, change):
    graphed = GraphedForward(transformer, captures)
    call = latents_of(0), torch.tensor([700]), text_of(transformer, 0), history_of(transformer, 0), INDICES
    before = graphed(*call)
    if change == "a parameter elsewhere":
        weight = transformer.proj_out.weight
        weight.data = weight.data * 2
    else:
        embedder = transformer.condition_embedder.time_proj
        transformer.load_state_dict(
            {**transformer.state_dict(), "condition_embedder.time_proj.bias": embedder.bias * 2}
        )
    after = graphed(*call)
    assert captures.captures == 2 and len(graphed.captured) == 1
    assert torch.equal(after, transformer.forward(*call)) and not torch.equal(before, after)


def test_changes_in_place_need_no_capture(transformer, captures):
    """As when an adapter is merged into the weights between two requests."""
    graphed = GraphedForward(transformer, captures)
    call = latents_of(0), torch.tensor([700]), text_of(transformer, 0)
    graphed(*call)
    transformer.proj_out.weight.mul_(2)
    assert torch.equal(graphed(*call), transformer.forward(*call)) and captures.captures == 1


def test_memory_is_bounded(transformer, captures):
    """The least recently used graph goes, with buffers that no other uses."""
    graphed = GraphedForward(transformer, captures, most=2)
    text = text_of(transformer, 0)

    def run(size: int) -> None:
        graphed(latents_of(0, size), torch.tensor([700]), text)

    run(2)
    first = weakref.ref(next(iter(graphed.captured.values())).inputs[0])
    shared = weakref.ref(next(iter(graphed.captured.values())).inputs[2])
    run(4)
    run(2)
    run(6)
    gc.collect()
    assert len(graphed.captured) == 2 and first() is not None, "2 was used after 4"
    run(4)
    gc.collect()
    assert first() is None and shared() is not None
    assert captures.captures == 4


def test_whole_video(presets, captures):
    """Two chunks of guided Mid: both branches replay the same graphs, one for each stage."""
    pipeline = Pipeline.from_pretrained(Checkpoint.read(presets["tiny-mid"]), dtype=torch.float32)
    steps = {"pyramid_num_inference_steps_list": (3, 2, 2), "guidance_scale": 3.0}
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=66, **steps)
    eager = [chunk.latents for chunk in pipeline.stream(request, output_type="latent")]
    pipeline.transformer.forward = GraphedForward(pipeline.transformer, captures)
    replayed = [chunk.latents for chunk in pipeline.stream(request, output_type="latent")]
    assert all(torch.equal(*pair) for pair in zip(eager, replayed, strict=True))
    assert captures.captures == 3
    assert captures.replays == 2 * 2 * (1 + 2 + 2), "CFG-Zero* leaves out two steps a chunk"


@pytest.mark.parametrize(
    ("backend", "ranks", "sharded", "message"),
    [
        ("gloo", 2, False, "--cuda-graphs with --backend gloo: give --backend nccl; a graph cannot hold"),
        ("nccl", 2, True, "--cuda-graphs with --shard-weights: give one of the two;"),
    ],
)
def test_refused(backend, ranks, sharded, message):
    execution = Execution(cuda_graphs=True)
    with pytest.raises(RequestError, match=message) as raised:
        execution.check_graphs(backend, ranks, sharded)
    assert "\n" not in str(raised.value)
    execution.check_graphs("gloo", 1, False)
    execution.check_graphs("nccl", 2, False)
    Execution().check_graphs("gloo", 2, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_card(presets, compiled):
    """Whole videos on a card, replayed against launched one by one; and the memory of dropped graphs is used again."""
    checkpoint = Checkpoint.read(presets["tiny-mid"])
    request = Request(
        prompt=("a fox",),
        height=64,
        width=64,
        num_frames=66,
        pyramid_num_inference_steps_list=(3, 2, 2),
        guidance_scale=3.0,
    )
    eager = Pipeline.from_pretrained(checkpoint, dtype=torch.bfloat16, device="cuda")
    wanted = torch.cat([chunk.latents for chunk in eager.stream(request, output_type="latent")])
    execution = Execution(compile=compiled, cuda_graphs=True)
    graphed = Pipeline.from_pretrained(checkpoint, dtype=torch.bfloat16, device="cuda", execution=execution)
    got = torch.cat([chunk.latents for chunk in graphed.stream(request, output_type="latent")])
    if compiled:
        assert (got - wanted).abs().max() <= 1e-2 * (wanted.max() - wanted.min())
    else:
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_on_a_card(presets):
    """PyTorch's own watch over calls that make the host wait; the first chunk builds what is kept."""
    pipeline = Pipeline.from_pretrained(Checkpoint.read(presets["tiny-mid"]), dtype=torch.bfloat16, device="cuda")
    capture_forwards(pipeline)
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=66, pyramid_num_inference_steps_list=(3, 2, 2))
    seen = []

    def forward(*arguments, wrapped=pipeline.transformer.forward):
        torch.cuda.set_sync_debug_mode("error" if len(seen) > 10 else "default")
        try:
            seen.append(None)
            return wrapped(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipeline.transformer.forward = forward
    assert len(list(pipeline.stream(request, output_type="latent"))) == 2
