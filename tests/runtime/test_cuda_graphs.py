"""Unit: buffers and limits of replayed forwards, where a replay runs the function again on the static inputs.

On such a replay nothing is computed but what the graph computes from its buffers, so a stale or foreign buffer shows in
the output. Results equal eager ones bitwise: the same operations run on copies. GPU: real graphs, bitwise as well, and
with compiled blocks in fp32 within 1e-4 of the range, as whole videos in `tests/test_compilation.py`.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helios_cp.config.call import Call
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution, Target
from helios_cp.config.layout import Layout
from helios_cp.config.refusals import Setting, check_setting
from helios_cp.config.request import Request
from helios_cp.generate.__main__ import build_parser
from helios_cp.generate.check import check
from helios_cp.model.conditions import History, TextCondition
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.environment import prepare
from helios_cp.pipeline.parallelize import load_parallel
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.world import Ranks, World
from helios_cp.runtime.cuda_graphs import CudaCapture, GraphedForward, StaticInput, capture_forwards
from parallel.mesh import Degrees, Mesh
from tests.loading import load_transformer

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
    return load_transformer(Checkpoint.read(presets["random-mid"]), torch.float32)


@pytest.fixture
def captures() -> Captures:
    return Captures()


def text_of(transformer, seed: int, number: int = 0):
    return transformer.encode_text(torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(seed)), number)


def history_of(transformer, seed: int):
    generator = torch.Generator().manual_seed(seed)
    short, mid = (torch.randn(1, 16, 2, 4, 4, generator=generator) for _ in range(2))
    return transformer.encode_history(History(short, (0, 19), mid, (17, 18)))


def latents_of(seed: int, size: int = 4) -> Tensor:
    return torch.randn(1, 16, 9, size, size, generator=torch.Generator().manual_seed(seed))


def test_replays_are_the_forwards(transformer, captures):
    """Two stages, three texts, two histories in turn, no history, other frames: as eager, whatever came before."""
    graphed = GraphedForward(transformer, captures)
    texts = [text_of(transformer, seed, number) for seed, number in enumerate((0, 1, 0))]
    histories = [history_of(transformer, seed) for seed in range(2)]
    calls = [
        (latents_of(seed, size), torch.tensor([100 * seed + 50]), texts[seed % 3], history, indices)
        for seed in range(6)
        for size in (2, 4)
        for history, indices in ((histories[seed // 3], INDICES), (None, None))
    ]
    kept = [graphed(*call) for call in calls]
    for call, output in zip(calls, kept, strict=True):
        assert torch.equal(output, transformer.forward(*call))
    assert captures.captures == 8, "a stage, with and without history, in two buffers of texts"
    assert captures.replays == len(calls)


@pytest.fixture
def copied(monkeypatch):
    """What has been copied into buffers, in order."""
    values = []
    fill = StaticInput.fill

    def versions(static) -> list[int]:
        tensors = [static.value] if isinstance(static.value, Tensor) else static.value.tensors
        return [tensor._version for tensor in tensors]

    def watched(static, value):
        before = versions(static)
        fill(static, value)
        if before != versions(static):
            values.append(value)

    monkeypatch.setattr(StaticInput, "fill", watched)
    return values


def test_conditions_are_copied_when_they_change_only(transformer, captures, copied):
    """All stages share one buffer of the text and one of the history."""
    graphed = GraphedForward(transformer, captures)
    text, history = text_of(transformer, 0), history_of(transformer, 0)
    for size in (2, 4, 2, 4):
        graphed(latents_of(0, size), torch.tensor([700]), text, history, INDICES)
    kinds = Counter(type(value).__name__ for value in copied)
    assert kinds == {"TextCondition": 1, "HistoryCondition": 1, "Tensor": 2 * 4}
    graphed(latents_of(0), torch.tensor([700]), text_of(transformer, 1), history, INDICES)
    kinds = Counter(type(value).__name__ for value in copied)
    assert kinds["TextCondition"] == 2 and kinds["HistoryCondition"] == 1


def test_the_texts_of_a_guided_video_are_copied_once(transformer, captures, copied):
    """Prompt and negative prompt take turns; when the prompt changes, the new one takes the place of the old."""
    graphed = GraphedForward(transformer, captures)
    prompt, negative = text_of(transformer, 0), text_of(transformer, 1, number=1)
    for _ in range(3):
        for text in (prompt, negative):
            graphed(latents_of(0), torch.tensor([700]), text)
    assert [text for text in copied if isinstance(text, TextCondition)] == [prompt, negative]
    for seed in (2, 3):
        copied.clear()
        prompt = text_of(transformer, seed)
        for text in (prompt, negative):
            call = latents_of(0), torch.tensor([700]), text
            assert torch.equal(graphed(*call), transformer.forward(*call))
        assert [text for text in copied if isinstance(text, TextCondition)] == [prompt]
        assert captures.captures == 2


@pytest.mark.parametrize("holds", [False, True])
def test_who_still_holds_a_text_does_not_matter(transformer, captures, holds):
    """Ranks must capture and replay in step, whatever garbage each has: one that did not would wait for ever."""
    graphed, held = GraphedForward(transformer, captures), []
    for seed in range(4):
        for number in (0, 1):
            text = text_of(transformer, 2 * seed + number, number)
            graphed(latents_of(0), torch.tensor([700]), text)
            held += [text] if holds else []
    assert captures.captures == 2 and captures.replays == 8


def test_a_text_is_not_kept_by_its_buffer(transformer, captures):
    """Its keys and values go when the pipeline lets go of them, before the next ones are made."""
    graphed = GraphedForward(transformer, captures)
    text = text_of(transformer, 0)
    key = weakref.ref(text.keys_values[0][0])
    graphed(latents_of(0), torch.tensor([700]), text)
    del text
    assert key() is None


def test_a_replay_looks_at_no_weights(transformer, captures, monkeypatch):
    """There are 870 of them at 14B; that they move is told, and not looked for at each forward."""
    graphed, call = GraphedForward(transformer, captures), (latents_of(0), torch.tensor([700]), text_of(transformer, 0))
    graphed(*call)
    monkeypatch.setattr(transformer, "parameters", lambda *_: pytest.fail("it goes through all parameters"))
    graphed(*call)
    assert captures.replays == 2


def test_a_stale_buffer_shows(transformer, captures, monkeypatch):
    """What `test_replays_are_the_forwards` would see if a changed prompt were not copied."""
    graphed = GraphedForward(transformer, captures)
    call = latents_of(0), torch.tensor([700])
    graphed(*call, text_of(transformer, 0))
    monkeypatch.setattr(StaticInput, "fill", lambda *_: None)
    other = text_of(transformer, 1)
    assert (graphed(*call, other) - transformer.forward(*call, other)).abs().max() > 1e-2


@pytest.mark.parametrize("change", ["moved", "loaded", "cast"])
def test_captures_anew_when_weights_change(transformer, captures, change):
    """Elsewhere, or where the embedding of t = 0 was computed from others."""
    graphed = GraphedForward(transformer, captures)
    call = latents_of(0), torch.tensor([700]), text_of(transformer, 0), history_of(transformer, 0), INDICES
    before = graphed(*call)
    if change == "moved":
        transformer._apply(lambda tensor: tensor * 2)
    elif change == "loaded":
        bias = "condition_embedder.time_proj.bias"
        transformer.load_state_dict({**transformer.state_dict(), bias: transformer.get_parameter(bias) * 2})
    else:
        transformer.proj_out.weight.data = transformer.proj_out.weight.double() * 2
        transformer.cast(torch.float32)
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


@pytest.mark.parametrize("change", ["one too many", "weights elsewhere"])
def test_no_graph_is_dropped_alone(transformer, captures, change):
    """All go, with their buffers; on a card the others would lose memory that they work in."""
    graphed = GraphedForward(transformer, captures, most=3)
    text = text_of(transformer, 0)

    def run(size: int) -> None:
        call = latents_of(0, size), torch.tensor([700]), text
        assert torch.equal(graphed(*call), transformer.forward(*call))

    for size in (2, 4, 6, 2):
        run(size)
    assert len(graphed.captured) == captures.captures == 3
    held = [weakref.ref(buffer) for graph in graphed.captured.values() for buffer in graph.inputs]
    if change == "one too many":
        run(8)
    else:
        transformer._apply(lambda tensor: tensor * 2)
        run(4)
    gc.collect()
    assert len(graphed.captured) == 1 and captures.captures == 4
    assert all(buffer() is None for buffer in held)
    run(2)
    assert len(graphed.captured) == 2 and captures.captures == 5


@pytest.mark.parametrize("is_collecting", [True, False])
def test_no_garbage_is_collected_during_a_capture(monkeypatch, is_collecting):
    """Of a card there is nothing here but the order of calls: two to warm up, and the captured one."""
    stream = SimpleNamespace(device=None, wait_stream=lambda other: None)
    stand_ins = {"Stream": stream, "current_stream": stream, "MemPool": SimpleNamespace(id=(0, 1))}
    stand_ins |= {
        "CUDAGraph": SimpleNamespace(replay=None),
        **dict.fromkeys(("device", "stream", "graph"), nullcontext()),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, stand_in=stand_in, **__: stand_in)
    seen = []
    try:
        if not is_collecting:
            gc.disable()
        CudaCapture(torch.device("cuda"))(lambda: seen.append(gc.isenabled()))
        assert seen == [is_collecting, is_collecting, False] and gc.isenabled() == is_collecting
    finally:
        gc.enable()


def test_graphs_go_before_the_process_groups(presets, captures, monkeypatch):
    """Else NCCL waits for ever for graphs that hold its messages. One rank, with a store as several have."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    world = World(Ranks(), 60)
    monkeypatch.setattr(world, "_store", dist.HashStore())
    left, leave = [], dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (left.append(graph()), leave()))

    def capture() -> weakref.ref:
        transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.float32)
        transformer.forward = GraphedForward(transformer, captures)
        transformer(latents_of(0), torch.tensor([700]), text_of(transformer, 0))
        return weakref.ref(*transformer.forward.captured.values())

    gc.disable()  # by chance it would come between
    try:
        with world.connected("gloo", torch.device("cpu")):
            graph = capture()
            assert graph() is not None, "it lies in a cycle"
    finally:
        gc.enable()
    assert left == [None]


def test_whole_video(presets, captures):
    """Two chunks of guided Mid: each branch has a graph for each stage."""
    pipeline = Pipeline.from_pretrained(Checkpoint.read(presets["random-mid"]), dtype=torch.float32)
    steps = {"pyramid_num_inference_steps_list": (3, 2, 2), "guidance_scale": 3.0}
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=66, **steps)
    eager = [chunk.latents for chunk in pipeline.stream(request, output_type="latent")]
    pipeline.transformer.forward = GraphedForward(pipeline.transformer, captures)
    replayed = [chunk.latents for chunk in pipeline.stream(request, output_type="latent")]
    assert all(torch.equal(*pair) for pair in zip(eager, replayed, strict=True))
    assert captures.captures == 3 * 2
    assert captures.replays == 2 * 2 * (1 + 2 + 2), "CFG-Zero* leaves out two steps a chunk"


@pytest.mark.parametrize(
    ("backend", "ranks", "sharded", "attention", "message"),
    [
        ("gloo", 2, False, "native", "--cuda-graphs with --backend gloo: give --backend nccl; a graph cannot hold"),
        ("nccl", 2, True, "native", "--cuda-graphs with --shard-weights: give one of the two;"),
        ("nccl", 2, False, "yunchang", "--cuda-graphs with --attention yunchang: allowed are native, cudnn, flash;"),
        ("nccl", 2, False, "xfuser", "--cuda-graphs with --attention xfuser: allowed are native, cudnn, flash;"),
    ],
)
def test_refused_by_layout(backend, ranks, sharded, attention, message):
    def check(graphs: bool, backend: str, ranks: int, sharded: bool = False, attention: str = "native") -> None:
        layout = Layout(Degrees(ulysses=ranks), attention, sharded)
        check_setting(Setting(Execution(cuda_graphs=graphs), layout, backend=backend))

    with pytest.raises(RequestError, match=message) as raised:
        check(True, backend, ranks, sharded, attention)
    assert "\n" not in str(raised.value)
    check(True, "gloo", 1)
    check(True, "nccl", 2, attention="flash")
    check(False, "gloo", 2, True, "xfuser")


AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)


@pytest.mark.parametrize(
    ("fields", "target", "is_distilled", "message"),
    [
        (
            {"quantize": "fp8"},
            Target("cuda", AMPERE),
            True,
            "--quantize fp8: this card has compute capability 8.0, ",
        ),
        ({"quantize": "fp8"}, Target("cuda", ADA), True, "--quantize fp8: this card has compute capability 8.9, "),
        ({"quantize": "fp8"}, Target("cuda", HOPPER), True, None),
        ({"quantize": "fp8"}, Target("cuda", BLACKWELL), True, None),
        ({"quantize": "fp8"}, Target("cuda"), True, None),
        ({"quantize": "int8"}, Target("cuda", AMPERE), True, None),
        ({"quantize": "int4"}, Target("cuda", ADA), True, None),
        ({"cuda_graphs": True}, Target("cuda", AMPERE), True, None),
        ({"cuda_graphs": True}, Target("cpu"), True, "--cuda-graphs: not on cpu; only --device cuda has them"),
        ({"cuda_graphs": True}, Target("mps"), True, "--cuda-graphs: not on mps; only --device cuda has them"),
        (
            {"cuda_graphs": True, "offload": "group"},
            Target("cuda", HOPPER),
            True,
            "--cuda-graphs with --offload group: give one of the two;",
        ),
        (
            {"cuda_graphs": True, "offload": "model"},
            Target("cuda", HOPPER),
            True,
            "--cuda-graphs with --offload model: give one of the two;",
        ),
        (
            {"cuda_graphs": True, "block_cache": 0.1},
            Target("cuda", HOPPER),
            False,
            "--cuda-graphs with --block-cache 0.1: give one of the two; a graph skips no block",
        ),
        ({"block_cache": 0.1}, Target("cuda", HOPPER), True, "--block-cache 0.1: Helios-Distilled has too few steps"),
        ({"block_cache": 0.1}, Target("cuda", HOPPER), False, None),
        ({"cuda_graphs": True, "compile": True, "quantize": "fp8"}, Target("cuda", HOPPER), True, None),
        ({"quantize": "fp4"}, Target("cuda", HOPPER), True, "--quantize fp4: allowed are fp8, int8, int4"),
        ({"offload": "disk"}, Target("cuda", HOPPER), True, "--offload disk: allowed are none, model, group"),
    ],
)
def test_what_goes_together_on_which_card(fields, target, is_distilled, message):
    """Cards by their compute capability, none of which needs to be here."""
    execution = Execution(**fields)
    if message is None:
        check_setting(Setting(execution, target=target, is_distilled=is_distilled))
        return
    with pytest.raises(RequestError) as raised:
        check_setting(Setting(execution, target=target, is_distilled=is_distilled))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("preset", "execution", "message"),
    [
        ("random-mid", Execution(cuda_graphs=True), "--cuda-graphs: not on cpu"),
        ("random-distilled", Execution(block_cache=0.1), "--block-cache 0.1: Helios-Distilled has too few steps"),
        ("random-mid", Execution(quantize="fp4"), "--quantize fp4: allowed are"),
        ("random-mid", Execution(offload="disk"), "--offload disk: allowed are"),
    ],
    ids=str,
)
def test_refused_from_python_too(presets, no_weights, preset, execution, message):
    """Before weights are loaded, on one rank and several."""
    checkpoint = Checkpoint.read(presets[preset])
    with pytest.raises(RequestError, match=message):
        Pipeline.from_pretrained(checkpoint, execution=execution)
    with pytest.raises(RequestError, match=message):
        load_parallel(checkpoint, Mesh.build(Degrees()), execution=execution)


@pytest.mark.parametrize(
    ("arguments", "capability", "expected"),
    [
        ("--cuda-graphs", (9, 0), None),
        ("--cuda-graphs --backend gloo --ulysses 2", (9, 0), "--cuda-graphs with --backend gloo"),
        ("--cuda-graphs --ulysses 2", (9, 0), None),
        ("--cuda-graphs --offload group", (9, 0), "--cuda-graphs with --offload group"),
        ("--quantize fp8", (8, 9), "this card has compute capability 8.9"),
        ("--quantize fp8 --dtype float16", (9, 0), "--quantize fp8 with --dtype float16: on CUDA only bfloat16"),
    ],
)
def test_cards_of_a_cluster_are_checked_from_elsewhere(cache, tmp_path, monkeypatch, arguments, capability, expected):
    """As a driver does for the cards of its nodes: the call is checked for them and not for this machine."""
    monkeypatch.chdir(tmp_path)
    size = "--model random-mid --prompt fox --height 64 --width 64 --num-frames 33 --device cpu"
    parsed = Call.of(build_parser().parse_args([*size.split(), *arguments.split()]))
    ranks = Ranks(size=2 if "--ulysses" in arguments else 1)
    target = Target("cuda", capability)
    if expected is None:
        assert check(parsed, cache, ranks, target).execution.cuda_graphs
        with pytest.raises(RequestError, match="--cuda-graphs: not on cpu"):
            check(parsed, cache, ranks)
    else:
        with pytest.raises(RequestError, match=expected):
            check(parsed, cache, ranks, target)


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, 2, None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, 1, None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, 2, "0"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128,expandable_segments: True"}, 2, "0"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, 2, None),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            2,
            None,
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "1"}, 2, "1"),
    ],
)
def test_nccl_registers_no_buffers_in_segments_that_grow(environment, ranks, expected):
    found = dict(environment)
    prepare(Execution(), ranks, found)
    assert found == environment
    prepare(Execution(cuda_graphs=True), ranks, found)
    assert found.get("NCCL_GRAPH_REGISTER") == expected
    assert {name: found[name] for name in environment} == environment


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_card(presets, compiled):
    """Whole videos on a card, replayed against launched one by one."""
    checkpoint = Checkpoint.read(presets["random-mid"])
    request = Request(
        prompt=("a fox",),
        height=64,
        width=64,
        num_frames=66,
        pyramid_num_inference_steps_list=(3, 2, 2),
        guidance_scale=3.0,
    )
    options = {"dtype": torch.float32 if compiled else torch.bfloat16, "device": "cuda"}
    eager = Pipeline.from_pretrained(checkpoint, **options)
    wanted = torch.cat([chunk.latents for chunk in eager.stream(request, output_type="latent")])
    execution = Execution(compile=compiled, cuda_graphs=True)
    graphed = Pipeline.from_pretrained(checkpoint, **options, execution=execution)
    got = torch.cat([chunk.latents for chunk in graphed.stream(request, output_type="latent")])
    if compiled:
        assert (got - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())
    else:
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_only_graph_is_dropped_and_another_captured_on_a_card(presets):
    """With room for one graph, three sizes in turn, twice; memory stays that of one."""
    device = torch.device("cuda", torch.cuda.current_device())
    transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.bfloat16, device)
    graphed = GraphedForward(transformer, CudaCapture(device), most=1)
    words = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(0))
    text = transformer.encode_text(words.to(device, torch.bfloat16))
    held = []
    for _ in range(2):
        for size in (2, 4, 6):
            call = latents_of(0, size).to(device), torch.tensor([700], device=device), text
            assert torch.equal(graphed(*call), transformer.forward(*call))
            assert len(graphed.captured) == 1
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated(device))
    assert held[0] == held[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_stay_right_after_others_were_dropped_on_a_card(presets):
    """With room for two graphs, three sizes in turn; memory that was freed goes to others and stays as they left it."""
    device = torch.device("cuda", torch.cuda.current_device())
    transformer = load_transformer(Checkpoint.read(presets["random-mid"]), torch.bfloat16, device)
    graphed = GraphedForward(transformer, CudaCapture(device), most=2)
    words = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(0))
    text = transformer.encode_text(words.to(device, torch.bfloat16))
    others = []
    for size in (2, 4, 6, 2, 4, 6, 4, 2):
        call = latents_of(0, size).to(device), torch.tensor([700], device=device), text
        assert torch.equal(graphed(*call), transformer.forward(*call))
        torch.cuda.empty_cache()
        others.append(torch.full((64 << 20,), 255, dtype=torch.uint8, device=device))
    assert all((other == 255).all() for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_garbage_spoils_no_capture_on_a_card():
    """A graph that nobody has any more, in a cycle, when the next one is captured and much is allocated."""
    device, calls, thresholds = torch.device("cuda", torch.cuda.current_device()), [], gc.get_threshold()

    def function() -> Tensor:
        calls.append(None)
        if len(calls) == 3:
            gc.set_threshold(1)
        return torch.stack([torch.ones(3, device=device) for _ in range(100)]).sum(0)

    garbage = [CudaCapture(device)(lambda: torch.ones(1, device=device))]
    garbage.append(garbage)
    del garbage
    try:
        replay, output = CudaCapture(device)(function)
    finally:
        gc.set_threshold(*thresholds)
    replay()
    assert output.tolist() == [100] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_on_a_card(presets):
    """PyTorch's own watch over calls that make the host wait; the first chunk builds what is kept."""
    pipeline = Pipeline.from_pretrained(Checkpoint.read(presets["random-mid"]), dtype=torch.bfloat16, device="cuda")
    capture_forwards(pipeline.transformer, pipeline.device)
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
