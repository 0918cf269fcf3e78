"""Multi-rank gloo, unit, and GPU: weights that rest in host memory, against the same model without.

Offloading moves weights and changes no sum, so results are compared bitwise, and bytes and copies are exact counts. On
a CPU the buffers, and the copies into them, are as real as on a card. `Late` copies come at the last moment that is
allowed and those of a CPU at the first: what is right with both is right with any stream between them.
"""

from __future__ import annotations

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.ranks.pool import shared_pool
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.__main__ import main
from helios_cp.model.conditions import History
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs
from helios_cp.runtime import device_weights
from helios_cp.runtime import offload as engine
from helios_cp.runtime.compilation import compile_blocks
from helios_cp.runtime.device_weights import Copies, MemoryCounter, Streamed
from helios_cp.runtime.host_weights import HostWeights, places
from helios_cp.runtime.offload import Card, offload
from parallel.mesh import Degrees, Mesh

HOW = ("model", "group")
CPU = torch.device("cpu")
SIZE = "--prompt fox --height 64 --width 64 --num-frames 33"
FIELDS = {
    "random-base": {"num_inference_steps": 2, "guidance_scale": 3.0},
    "random-mid": {"pyramid_num_inference_steps_list": (3, 1, 1), "guidance_scale": 3.0},
    "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)},
}
PARTS = ("text encoder", "transformer", "encoder", "decoder")


def direct() -> Copies:
    """Copies at the first moment."""
    return Copies(CPU)


class Late:
    """Copies at the last moment: when somebody waits for them."""

    def start(self, target, source):
        return [(target, source)]

    def wait(self, ticket):
        while ticket:
            target, source = ticket.pop()
            target.copy_(source)


class NobodyWaits:
    """Copies that come only when the next one starts, as nobody waits for them."""

    last = None

    def start(self, target, source):
        if self.last is not None:
            self.last[0].copy_(self.last[1])
        self.last = target, source

    def wait(self, ticket):
        pass


def request_of(name: str) -> Request:
    prompts = (ScheduledPrompt("a fox", 1), ScheduledPrompt("an owl", 1))
    return Request(prompt_schedule=prompts, interpolation_steps=1, height=64, width=64, num_frames=66, **FIELDS[name])


def video(pipeline: Pipeline, request: Request, inputs: Inputs | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = list(pipeline.stream(request, inputs))
    return torch.cat([chunk.latents for chunk in chunks], 2), torch.cat([chunk.frames for chunk in chunks], 1)


def load(folder: str, how: str = "none", dtype: torch.dtype = torch.float32, card: Card | None = None) -> Pipeline:
    pipeline = Pipeline.from_pretrained(
        folder, dtype=dtype, execution=Execution(offload=how if card is None else "none")
    )
    if card is not None:
        offload_parts(pipeline, how, card)
    return pipeline


def offload_parts(pipeline: Pipeline, how: str, card: Card | None = None) -> None:
    parts = pipeline.prompt_encoder.text_encoder, pipeline.transformer, pipeline.codec.vae
    pipeline.card = offload(how, pipeline.device, *parts, card)


@pytest.fixture(scope="module")
def plain(folders, astronaut):
    """Videos from a picture, with prompts that change, without offloading."""
    cases = [(name, torch.float32) for name in FIELDS] + [("random-mid", torch.bfloat16)]
    return {
        (name, dtype): video(load(folders[name], dtype=dtype), request_of(name), Inputs(image=astronaut))
        for name, dtype in cases
    }


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FIELDS)
def test_bits_and_bytes(folders, astronaut, plain, name, how):
    pipeline = load(folders[name], how)
    counter, parts = pipeline.card.counter, pipeline.card.parts
    assert counter.bytes == 0
    result = video(pipeline, request_of(name), Inputs(image=astronaut))
    assert all(map(torch.equal, result, plain[name, torch.float32]))
    assert tuple(parts) == PARTS
    assert [part.is_here for part in parts.values()] == [False, False, False, True]
    assert counter.bytes == parts["decoder"].device_bytes
    assert counter.peak_bytes == max(part.device_bytes for part in parts.values())
    whole = sum(parameter.nbytes for parameter in pipeline.transformer.parameters())
    if how == "group":
        blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in pipeline.transformer.blocks]
        assert parts["transformer"].device_bytes < whole - sum(blocks) + 2 * blocks[0]
    else:
        assert whole <= parts["transformer"].device_bytes < whole * 1.01


@pytest.mark.parametrize("copies", [direct, Late])
def test_order_of_copies_does_not_matter(folders, astronaut, plain, copies):
    pipeline = load(folders["random-mid"], "group", torch.bfloat16, Card(CPU, copies()))
    result = video(pipeline, request_of("random-mid"), Inputs(image=astronaut))
    assert all(map(torch.equal, result, plain["random-mid", torch.bfloat16]))


def test_not_waiting_shows(folders, astronaut, plain):
    pipeline = load(folders["random-mid"], "group", torch.float32, Card(CPU, NobodyWaits()))
    result = video(pipeline, request_of("random-mid"), Inputs(image=astronaut))
    assert not torch.equal(result[0], plain["random-mid", torch.float32][0])


def test_bringing_a_layer_into_the_buffer_at_work_shows(folders, astronaut, plain, monkeypatch):
    def fetch(self, layer):
        self._bring(layer)
        self.copies.wait(self._content[layer % 2][1])
        self._bring((layer + 2) % len(self.weights))

    monkeypatch.setattr(Streamed, "fetch", fetch)
    pipeline = load(folders["random-mid"], "group", torch.float32, Card(CPU))
    result = video(pipeline, request_of("random-mid"), Inputs(image=astronaut))
    assert not torch.equal(result[0], plain["random-mid", torch.float32][0])


def layers_of(count: int) -> list[nn.Linear]:
    layers = [nn.Linear(2, 1 + number % 3) for number in range(count)]
    for number, layer in enumerate(layers):
        nn.init.constant_(layer.weight, number)
        nn.init.constant_(layer.bias, -number)
    return layers


def test_layers_run_in_any_order():
    """Whatever is thought to follow; 6 stands for leaving the device and coming back."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(
        following=st.lists(st.integers(0, 5), min_size=6, max_size=6),
        calls=st.lists(st.integers(0, 6), max_size=20),
        copies=st.sampled_from([direct, Late]),
    )
    def check(following, calls, copies):
        layers = layers_of(6)
        streamed = Streamed(
            [HostWeights(places([layer]), CPU) for layer in layers], following, CPU, MemoryCounter(), copies()
        )
        streamed.enter()
        for layer in calls:
            if layer == 6:
                streamed.leave()
                streamed.enter()
                continue
            streamed.fetch(layer)
            assert (layers[layer].weight == layer).all()
            assert (layers[layer].bias == -layer).all()

    check()


def test_each_layer_is_brought_once_a_round():
    layers = layers_of(4)
    counter = MemoryCounter()
    weights = [HostWeights(places([layer]), CPU) for layer in layers]
    streamed = Streamed(weights, [1, 2, 3, 0], CPU, counter, Late())
    streamed.enter()
    for _ in range(5):
        for number in range(4):
            streamed.fetch(number)
    assert [counter.brought[id(each)] for each in weights] == [6, 5, 5, 5]  # and the first once more, ahead
    assert streamed.device_bytes == counter.peak_bytes == 2 * 512


def test_weights_that_are_away_are_no_numbers(folders):
    """So that whatever reads them there by mistake shows in every other test."""
    pipeline = load(folders["random-mid"], "group")
    video(pipeline, request_of("random-mid"))
    assert all(parameter.isnan().all() for parameter in pipeline.transformer.parameters())
    assert not any(parameter.isnan().any() for parameter in pipeline.codec.vae.decoder.parameters())


def test_what_is_loaded_goes_to_the_host_and_never_as_a_whole_to_the_device(folders, monkeypatch):
    """The device here is meta: it has no memory at all, so every byte that is there came from the host."""
    taken = []
    take = device_weights.DeviceMemory.take
    monkeypatch.setattr(device_weights.DeviceMemory, "take", lambda self: (taken.append(self.size), take(self)))
    pipeline = Pipeline.from_pretrained(
        folders["random-mid"], dtype=torch.float32, device="meta", execution=Execution(offload="group")
    )
    assert pipeline.transformer.device == pipeline.codec.vae.device == torch.device("meta")
    assert taken == []
    stored = {id(place.tensor): tensor for place, tensor in pipeline.card.stored()}
    whole = load(folders["random-mid"])
    for name, parameter in whole.transformer.named_parameters():
        assert torch.equal(stored[id(pipeline.transformer.get_parameter(name))], parameter), name


def test_everything_is_computed_on_the_device(folders):
    """On meta, where a tensor that was left on the host by mistake is refused by the operation that it meets."""
    device = torch.device("meta")
    pipeline = Pipeline.from_pretrained(
        folders["random-mid"], dtype=torch.float32, device=device, execution=Execution(offload="group")
    )
    words = torch.empty(1, 4, 32, device=device)  # looked up on the host, which meta gives nothing back to
    states = pipeline.prompt_encoder.text_encoder(inputs_embeds=words).last_hidden_state
    text = pipeline.transformer.encode_text(states)
    latents, short = (torch.empty(1, 16, frames, 8, 8, device=device) for frames in (9, 2))
    history = pipeline.transformer.encode_history(History(short, (0, 19)))
    out = pipeline.transformer(latents, torch.ones(1, device=device), text, history, tuple(range(20, 29)))
    frames = pipeline.codec.decode(out, "uint8")
    assert (states.device, out.device, frames.device) == (device,) * 3
    assert frames.shape == (1, 33, 64, 64, 3)


class Meter:
    """A card with `room` bytes, on which every part needs 10 beside its weights."""

    def __init__(self, room: int) -> None:
        self.room = room

    def begin(self) -> None:
        pass

    def needed(self) -> int:
        return 10

    def free(self) -> int:
        return self.room


def test_other_parts_stay_where_there_is_room(folders):
    """Once it is measured what they need, on the first chunk of a size; all of them then stay."""
    meter = Meter(room=10**9)
    pipeline = load(folders["random-mid"], "model", card=Card(CPU, meter=meter))
    parts, counter = pipeline.card.parts, pipeline.card.counter
    brought = lambda: [counter.brought[id(parts[name].held[0].weights[0])] for name in PARTS]  # noqa: E731
    here = lambda: [part.is_here for part in parts.values()]  # noqa: E731
    video(pipeline, request_of("random-mid"))  # of two chunks
    assert here() == [False, True, False, True]
    assert brought() == [1, 2, 0, 1]
    video(pipeline, request_of("random-mid"))
    assert here() == [True, True, False, True]  # nothing was encoded
    assert brought() == [2, 2, 0, 1]
    assert counter.bytes == counter.peak_bytes == sum(parts[name].device_bytes for name in PARTS if name != "encoder")
    meter.room = 0
    video(pipeline, request_of("random-mid"))
    assert here() == [False, False, False, True]


def test_a_part_stays_only_beside_what_was_measured(folders):
    """Its weights and what it needs have to fit, with a margin; a larger video is measured anew."""
    pipeline = load(folders["random-mid"], "model", card=Card(CPU, meter=Meter(0)))
    card, parts = pipeline.card, pipeline.card.parts
    video(pipeline, request_of("random-mid"))
    assert [part.working for part in parts.values()] == [10, 10, None, 10]
    for room, stays in ((parts["transformer"].device_bytes + 10, False), (2 * parts["transformer"].device_bytes, True)):
        card.meter.room = room
        card.rest()
        card.use(parts["decoder"])
        card.use(parts["transformer"])
        assert parts["decoder"].is_here is stays
    assert card.measured().keys() == {"transformer", "decoder"}
    card.expect({})
    assert [part.working for part in parts.values()] == [None] * 4


@pytest.mark.parametrize("how", HOW)
def test_a_failure_to_bring_weights_is_no_video_of_others(folders, monkeypatch, how):
    """As when the card is full: the next video, which begins with the transformer, has its weights in place."""
    name = "random-distilled"
    pipeline, request = load(folders[name], how), replace(request_of(name), prompt_schedule=())
    inputs = Inputs(prompt_embeds=torch.ones(1, 8, 32))
    expected = video(pipeline, request, inputs)
    card, enter = pipeline.card, device_weights.Resident.enter

    def full(self) -> None:
        enter(self)
        raise MemoryError

    decoder = pipeline.card.parts["decoder"]
    card.rest()
    with monkeypatch.context() as patch:
        patch.setattr(decoder.held[0], "enter", full.__get__(decoder.held[0]))
        with pytest.raises(MemoryError):
            video(pipeline, request, inputs)
    assert card.counter.bytes == 0 and not decoder.is_here
    assert all(map(torch.equal, video(pipeline, request, inputs), expected))


def test_a_layer_whose_copy_failed_is_brought_again():
    """What was in its buffer before is not taken to be there."""
    layers = layers_of(4)

    class Broken(Copies):
        is_broken = False

        def start(self, target, source):
            target.zero_()
            if self.is_broken:
                raise MemoryError
            super().start(target, source)

    copies = Broken(CPU)
    streamed = Streamed(
        [HostWeights(places([layer]), CPU) for layer in layers], [1, 2, 3, 0], CPU, MemoryCounter(), copies
    )
    streamed.enter()
    streamed.fetch(1)
    copies.is_broken = True
    with pytest.raises(MemoryError):
        streamed.fetch(3)
    copies.is_broken = False
    streamed.fetch(1)
    assert (layers[1].weight == 1).all()


def test_quantised_layers(folders):
    """Their weights are made of several tensors."""
    quantization = pytest.importorskip("torchao.quantization")
    results = []
    for card in (None, Card(CPU, Late())):
        pipeline = load(folders["random-distilled"])
        for block in pipeline.transformer.blocks:
            quantization.quantize_(block.ffn, quantization.Int8WeightOnlyConfig())
        if card is not None:
            offload_parts(pipeline, "group", card)
        results.append(video(pipeline, request_of("random-distilled"))[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], video(load(folders["random-distilled"]), request_of("random-distilled"))[0])


def test_weights_changed_on_the_host_are_those_of_the_next_video(folders):
    whole, pipeline = load(folders["random-distilled"]), load(folders["random-distilled"], "group")
    request = request_of("random-distilled")
    video(pipeline, request)
    pipeline.card.rest()
    changed = pipeline.transformer.blocks[1].attn1.to_qkv.weight
    next(tensor for place, tensor in pipeline.card.stored() if place.tensor is changed).mul_(0.5)
    whole.transformer.blocks[1].attn1.to_qkv.weight.mul_(0.5)
    assert torch.equal(video(pipeline, request)[0], video(whole, request)[0])


def test_compiled_blocks_are_compiled_once(folders):
    """One graph for all inner blocks and one for the last, with weights in buffers and with blocks skipped."""
    results, counts, skipped = [], [], []
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=33, num_inference_steps=3, guidance_scale=3.0)
    for how in ("none", "group"):
        torch._dynamo.reset()
        execution = Execution(offload=how, block_cache=1e9)
        pipeline = Pipeline.from_pretrained(folders["random-base"], dtype=torch.float32, execution=execution)
        counter = CompileCounterWithBackend("aot_eager")
        compile_blocks(pipeline.transformer.blocks, counter)
        (chunk,) = pipeline.stream(request, output_type="latent")
        results.append(chunk.latents)
        skipped.append(chunk.skipped)
        counts.append(counter.frame_count)
    assert counts == [2, 2]
    assert skipped == [(1, 2)] * 2
    assert torch.equal(*results)


LAYOUTS = [
    ("random-mid", Degrees(cfg=2)),
    ("random-distilled", Degrees(ulysses=2, vae=2)),
    ("random-mid", Degrees(ring=2, ffn_tp=2)),
]


@torch.no_grad()
def compare(rank: int, folder: str, degrees: Degrees, request: Request, image) -> list[bool]:
    from helios_cp.pipeline.parallelize import load_parallel

    videos = []
    for how in ("none", *HOW):
        pipeline = load_parallel(folder, Mesh.build(degrees), dtype=torch.float32, execution=Execution(offload=how))
        videos.append(list(pipeline.stream(request, Inputs(image=image))))
    same = []
    for chunks in videos[1:]:
        same += [torch.equal(mine.latents, other.latents) for mine, other in zip(chunks, videos[0], strict=True)]
        if rank == 0:
            same += [torch.equal(mine.frames, other.frames) for mine, other in zip(chunks, videos[0], strict=True)]
    return same


@pytest.mark.parametrize(("name", "degrees"), LAYOUTS, ids=str)
def test_layouts(pool, folders, astronaut, name, degrees):
    results = pool.run(compare, folders[name], degrees, request_of(name), astronaut, ranks=degrees.world)
    assert [len(same) for same in results] == [8, 4]
    assert all(all(same) for same in results)


@torch.no_grad()
def refuse_shards(rank: int, folder: str) -> str:
    from helios_cp.pipeline.parallelize import load_parallel

    with contextlib.suppress(ValueError):
        load_parallel(folder, Mesh.build(Degrees()), shard_weights=True, execution=Execution(offload="group"))
        return "loaded"
    return "refused"


def test_sharded_weights_are_refused(folders):
    assert refuse_shards(0, folders["random-mid"]) == "refused"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--offload group --shard-weights", ("--shard-weights with --offload group: ", "give one of the two")),
        ("--offload model --shard-weights", ("--shard-weights with --offload model: ", "give one of the two")),
        ("--offload disk", ("--offload", "'disk'", "group")),
    ],
)
def test_refusals(cache, no_weights, monkeypatch, capsys, tmp_path, arguments, parts):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments.split(), *SIZE.split()])
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert "\n" not in line
    assert all(part in line for part in parts), line


def test_command_line(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    arguments = f"--model random-distilled --pyramid-steps 1 1 1 {SIZE}".split()
    for how in ("none", "group"):
        files = ["--output", str(tmp_path / f"{how}.mp4"), "--save-latents", str(tmp_path / f"{how}.safetensors")]
        assert main([*arguments, *files, "--offload", how]) == 0
    first, second = ((tmp_path / f"{how}.safetensors").read_bytes() for how in ("none", "group"))
    assert first == second


def test_every_way_to_offload_has_segments_grow(folders, monkeypatch):
    """By hand, as here, or by a flag, or by what a resumed run says: all of them come to `offload`."""
    asked = []
    monkeypatch.setattr(engine, "grow_segments", asked.append)
    pipeline = load(folders["random-distilled"])
    assert asked == []
    offload_parts(pipeline, "group")
    assert asked == [CPU]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def test_a_card_is_done_before_its_memory_goes_back(monkeypatch):
    """PyTorch alone would wait for the card that is current, which may be another one."""
    device, seen = torch.device("cuda", 1), []
    monkeypatch.setattr(engine, "has_streams", lambda device: True)
    monkeypatch.setattr(engine, "wait_for", seen.append)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: seen.append("memory"))
    Card(device, direct()).add("any", [], [])
    assert seen == [device, "memory"]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FIELDS)
def test_bits_on_a_card(folders, astronaut, name, how):
    """Without `offload` the same kernels run on the same card."""
    results = []
    for execution in (Execution(), Execution(offload=how)):
        pipeline = Pipeline.from_pretrained(folders[name], device="cuda", execution=execution)
        results.append(video(pipeline, request_of(name), Inputs(image=astronaut)))
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_bits_in_a_thread_with_another_card(folders, astronaut):
    """The current card is one of each thread; a new thread begins with the first."""
    with torch.cuda.device(0):  # loading makes the other one current, which ends here
        pipelines = [
            Pipeline.from_pretrained(folders["random-mid"], device="cuda:1", execution=Execution(offload=how))
            for how in ("none", "model")
        ]
    with ThreadPoolExecutor(1) as threads:
        inputs = request_of("random-mid"), Inputs(image=astronaut)
        results = [threads.submit(video, pipeline, *inputs).result() for pipeline in pipelines]
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@GPU
def test_14b_in_7_gb_as_the_driver_counts_it():
    """At full size, with random weights and prompts that are embedded already, a chunk of 384 × 640."""
    from benchmarks.models.full_size import build_random, named_checkpoint, random_inputs

    shared_pool().close()  # the contexts of ranks that other tests have used on the card would count
    device = torch.device("cuda", torch.cuda.current_device())
    checkpoint = named_checkpoint("14b")
    pipeline = build_random(
        checkpoint, Mesh.build(Degrees()), dtype=torch.bfloat16, device=device, execution=Execution(offload="group")
    )
    steps = {"pyramid_num_inference_steps_list": (1, 1, 1)}
    request = Request(prompt=("any",), num_frames=33, **steps).resolve(checkpoint)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for chunk in pipeline.stream(request, random_inputs(checkpoint, request, torch.bfloat16)):
        assert chunk.latents.isfinite().all()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)  # the context, and whatever else runs on the card
    assert torch.cuda.max_memory_reserved(device) + others < 7e9


@pytest.mark.gpu
@GPU
def test_memory_as_the_driver_counts_it():
    """Blocks of full width: what the card holds grows by the buffers and not by the weights."""
    from helios_cp.config.checkpoint import TransformerConfig
    from helios_cp.model.transformer import HeliosTransformer

    device = torch.device("cuda", torch.cuda.current_device())
    config = TransformerConfig(num_layers=4)
    with torch.device("meta"):
        transformer = HeliosTransformer(config).cast(torch.bfloat16)
    transformer.to_empty(device="cpu")
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.02)
    gc.collect()  # what other tests have left would be given to this one later
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(device)[0]
    card = Card(device)
    with torch.no_grad():
        engine._add_transformer(card, transformer.requires_grad_(False), "group")
        part = card.parts["transformer"]
        card.use(part)
        torch.cuda.synchronize()
        held = before - torch.cuda.mem_get_info(device)[0]
        assert part.device_bytes <= held < part.device_bytes + 64 * 2**20
        assert part.device_bytes < 0.6 * sum(parameter.nbytes for parameter in transformer.parameters())
        card.rest()
        torch.cuda.empty_cache()
        assert before - torch.cuda.mem_get_info(device)[0] < 64 * 2**20
        assert all(weights.memory.is_pinned() for held in part.held for weights in held.weights)
