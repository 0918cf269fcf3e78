"""Multi-rank gloo, and unit: blocks' weights sharded over all ranks, against the same layout with whole weights.

Results are compared bitwise: sharding moves weights and changes no sum. Bytes and gathers are exact counts.
"""

from __future__ import annotations

import gc
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from helios_cp.config.checkpoint import Checkpoint, TransformerConfig
from helios_cp.config.execution import Execution
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.pipeline.start import Inputs
from helios_cp.weights.load import resolve
from helios_cp.weights.placement import Placement
from parallel.collectives import Group
from parallel.mesh import Degrees, Mesh
from tests.loading import load_transformer

CASES = [
    ("random-mid", Degrees(), torch.bfloat16),
    ("random-mid", Degrees(cfg=2), torch.float32),
    ("random-distilled", Degrees(ulysses=2, vae=2), torch.bfloat16),
    ("random-mid", Degrees(ulysses=3), torch.bfloat16),
    ("random-distilled", Degrees(ring=3), torch.float32),
]
STEPS = {
    "random-mid": {"pyramid_num_inference_steps_list": (3, 1, 1), "guidance_scale": 3.0},
    "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)},
}
DTYPES = (torch.float32, torch.bfloat16)


def load(folder: str, degrees: Degrees, dtype: torch.dtype = torch.float32, sharded: bool = True):
    """The transformer alone, on this rank."""
    from helios_cp.pipeline.parallelize import ShardedSequence, placement_of

    mesh = Mesh.build(degrees)
    transformer = load_transformer(resolve(folder), dtype, placement=placement_of(mesh, sharded))
    transformer.sequence = ShardedSequence(mesh)
    return transformer


def inputs_of_a_forward(transformer) -> tuple:
    from helios_cp.model.conditions import History

    generator = torch.Generator().manual_seed(0)
    latents, short = (torch.randn(1, 16, frames, 8, 8, generator=generator) for frames in (9, 2))
    text = transformer.encode_text(torch.randn(1, 11, 32, generator=generator))
    history = transformer.encode_history(History(short, (0, 19)))
    return latents, torch.tensor([700]), text, history, tuple(range(20, 29))


# The result is the same


@torch.no_grad()
def compare_videos(rank: int, folder: str, degrees: Degrees, dtype: torch.dtype, image, fields: dict) -> bool:
    """Whether two chunks, with a prompt each, come out the same."""
    from helios_cp.pipeline.parallelize import load_parallel

    prompts = (ScheduledPrompt("a fox", 1), ScheduledPrompt("an owl", 1))
    request = Request(prompt_schedule=prompts, height=64, width=64, num_frames=66, interpolation_steps=1, **fields)
    videos = []
    for sharded in (False, True):
        pipeline = load_parallel(folder, Mesh.build(degrees), dtype=dtype, shard_weights=sharded)
        videos.append(list(pipeline.stream(request, Inputs(image=image))))
    chunks = list(zip(*videos, strict=True))
    assert len(chunks) == 2
    return all(
        torch.equal(whole.latents, sharded.latents) and (rank > 0 or torch.equal(whole.frames, sharded.frames))
        for whole, sharded in chunks
    )


@pytest.mark.parametrize(("name", "degrees", "dtype"), CASES, ids=str)
def test_videos(pool, folders, astronaut, name, degrees, dtype):
    """With a picture and prompts that change, as then the branches of guidance encode text at different times."""
    assert all(pool.run(compare_videos, folders[name], degrees, dtype, astronaut, STEPS[name], ranks=degrees.world))


def order_of_calls(rank: int, folder: str, degrees: Degrees, image) -> list[str]:
    """What a rank does that takes all ranks when weights are sharded. They are whole here, so that nobody waits."""
    from helios_cp.pipeline.parallelize import load_parallel

    pipeline = load_parallel(folder, Mesh.build(degrees), dtype=torch.float32)
    calls: list[str] = []

    def noted(name: str, function):
        return lambda *arguments, **options: (calls.append(name), function(*arguments, **options))[1]

    pipeline.transformer.encode_text = noted("text", pipeline.transformer.encode_text)
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append("forward"))
    with mock.patch.object(Group, "broadcast", noted("broadcast", Group.broadcast)):
        prompts = (ScheduledPrompt("a fox", 1), ScheduledPrompt("an owl", 1))
        request = Request(prompt_schedule=prompts, height=64, width=64, interpolation_steps=1, **STEPS["random-mid"])
        for _ in pipeline.stream(request, Inputs(image=image)):
            pass
    return calls


def test_both_branches_encode_text_in_step(pool, folders, astronaut):
    """Were each to encode its own alone, they would wait for each other for ever: prompts change at other times."""
    first, second = pool.run(order_of_calls, folders["random-mid"], Degrees(cfg=2), astronaut, ranks=2)
    assert first == second
    assert first.count("text") == 3  # two prompts and the negative prompt


@torch.no_grad()
def run_in_any_order(rank: int, folder: str, degrees: Degrees, sharded: bool) -> list[torch.Tensor]:
    from helios_cp.model.conditions import History

    transformer = load(folder, degrees, torch.bfloat16, sharded)
    generator = torch.Generator().manual_seed(0)
    latents, short = (torch.randn(1, 16, frames, 8, 8, generator=generator) for frames in (9, 2))
    first, second = (torch.randn(1, 11, 32, generator=generator) for _ in range(2))
    condition = transformer.encode_history(History(short, (0, 19)))
    text = transformer.encode_text(first)
    other = transformer.encode_text(second)
    outputs = [transformer(latents, torch.tensor([700]), text, condition)]
    outputs.append(transformer(latents, torch.tensor([500]), other))
    text = transformer.encode_text(first)
    return [*outputs, transformer(latents, torch.tensor([300]), text)]


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(ring=2), Degrees(ulysses=3)], ids=str)
def test_text_history_and_forwards_in_any_order(pool, folders, degrees):
    arguments = run_in_any_order, folders["random-mid"], degrees
    whole, sharded = (pool.run(*arguments, is_sharded, ranks=degrees.world) for is_sharded in (False, True))
    for outputs, references in zip(sharded, whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(outputs, references, strict=True))


@torch.no_grad()
def run_with_swapped_rows(rank: int, folder: str, degrees: Degrees, swapped: bool) -> torch.Tensor:
    from helios_cp.weights import placement

    stored_names = placement.stored_names
    step = -1 if swapped else 1
    with mock.patch.object(placement, "stored_names", lambda *of: stored_names(*of)[::step]):
        transformer = load(folder, degrees)
    return transformer(*inputs_of_a_forward(transformer))


def test_wrong_rows_show(pool, folders):
    right, wrong = (
        pool.run(run_with_swapped_rows, folders["random-mid"], Degrees(ring=2), swapped, ranks=2)[0]
        for swapped in (False, True)
    )
    assert (right - wrong).abs().max() > 1e-2 * (right.max() - right.min())


# Every row is in its place


UNEVEN = TransformerConfig(
    num_attention_heads=2, attention_head_dim=6, rope_dim=(2, 2, 2), ffn_dim=7, num_layers=2, text_dim=5, freq_dim=4
)
"""12 rows, 36 of three fused layers and 24 of two, 7 of the feed-forward: some of 5 or 8 ranks have fewer, or none."""


@torch.no_grad()
def counted_bytes(transformer: HeliosTransformer) -> int:
    """Bytes of memory behind the parameters that the model has on this rank just now."""
    parameters = [each.to_local() if isinstance(each, DTensor) else each for each in transformer.parameters()]
    return sum(parameter.untyped_storage().nbytes() for parameter in parameters)


@torch.no_grad()
def compare_parameters(rank: int, folder: Path, degrees: Degrees, dtypes) -> list[str]:
    """Names of parameters that are not the stored ones after gathering, or that gathered nothing."""
    from helios_cp.weights.placement import predicted_bytes

    checkpoint = Checkpoint(folder, "base", False, UNEVEN)
    wrong = []
    for dtype in dtypes:
        whole = load_transformer(checkpoint, dtype)
        sharded = load_transformer(checkpoint, dtype, placement=Placement(shards=Mesh.build(degrees).world))
        expected = predicted_bytes(UNEVEN, dtype, degrees.world)
        if counted_bytes(sharded) != expected.resident:
            wrong.append(f"{counted_bytes(sharded)} bytes held, {expected.resident} expected")
        for block in sharded.blocks:
            block.attn2.to_kv.unshard()
            block.unshard()
        found = dict(sharded.named_parameters())
        for name, parameter in whole.named_parameters():
            if type(found[name]) is not nn.Parameter or not torch.equal(found[name], parameter):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_every_row_is_loaded(pool, tmp_path, ranks):
    torch.manual_seed(0)
    (tmp_path / "transformer").mkdir()
    tensors = {name: tensor.clone() for name, tensor in HeliosTransformer(UNEVEN).state_dict().items()}
    save_file(tensors, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert pool.run(compare_parameters, tmp_path, Degrees(ring=ranks), DTYPES, ranks=ranks) == [[]] * ranks


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 40))
def test_rows_of_stacked_tensors(heights, first, count):
    from helios_cp.weights.placement import stacked_rows

    rows = torch.arange(sum(heights))
    last = min(first + count, len(rows))
    tensors = rows.split(heights)
    found = torch.full((max(last - first, 0),), -1)
    for index, part, place in stacked_rows(heights, first, last):
        assert part.start < part.stop
        found[place] = tensors[index][part]
    assert torch.equal(found, rows[first : max(first, last)])


def test_quantised_weights_are_not_sharded(folders):
    group = Group(object(), (0, 1))  # refused before anything is sent
    with pytest.raises(ValueError, match="give one of the two"):
        load_transformer(
            resolve(folders["random-mid"]), torch.float32, "cpu", Execution(quantize="int8"), Placement(shards=group)
        )


# Memory and reading


@pytest.mark.parametrize(("ranks", "gigabytes"), [(1, 28.6), (2, 14.6), (4, 7.5), (8, 4.0)])
def test_bytes_of_the_14b_model(ranks, gigabytes):
    """Known per-rank sizes of the model in bf16; what is kept in fp32 adds 0.06 GB."""
    from helios_cp.weights.placement import predicted_bytes

    with torch.device("meta"):
        transformer = HeliosTransformer(TransformerConfig())
    in_fp32 = sum(p.numel() for name, p in transformer.named_parameters() if transformer.keeps_fp32(name))
    expected = predicted_bytes(TransformerConfig(), torch.bfloat16, ranks)
    assert round((expected.resident - 2 * in_fp32) / 1e9, 1) == gigabytes
    unit = sum(p.numel() for n, p in transformer.blocks[0].named_parameters() if p.dim() == 2 and "to_kv" not in n)
    assert expected.gathered == (0 if ranks == 1 else 2 * 2 * (unit + 6 * 5120 + 13824 + 2 * 5120 - 5120))


def live_bytes() -> int:
    """Memory behind all tensors of this process that have not been frozen."""
    gc.collect()  # now, and not when it would come by itself
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def watch_memory(folder: str, dtype: torch.dtype, group: Group | None) -> tuple[list[int], list[int]]:
    """Bytes of the parameters before and after a forward, and by how much the memory behind all tensors has grown at
    the start of each block and at the end."""
    transformer = load_transformer(
        resolve(folder), dtype, placement=Placement() if group is None else Placement(shards=group)
    )
    inputs = inputs_of_a_forward(transformer)
    transformer(*inputs)
    sizes: list[int] = []
    for block in transformer.blocks:
        block.register_forward_pre_hook(lambda *_: sizes.append(live_bytes()))
    gc.collect()
    before, held = live_bytes(), [counted_bytes(transformer)]
    transformer(*inputs)
    held.append(counted_bytes(transformer))
    return held, [size - before for size in (*sizes, live_bytes())]


def watch_gathered_memory(rank: int, folder: str, ranks: int, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Bytes of the parameters before and after a forward, and those gathered at the start of each block and at the end.

    What is gathered is what memory grows by, beyond what it does with whole weights. The other ranks are imaginary, as
    real ones let go of a message at some time after it has arrived: what is computed means nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    gc.collect()
    gc.freeze()  # what is here already need not be looked through every time
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    try:
        _, whole = watch_memory(folder, dtype, None)
        held, sharded = watch_memory(folder, dtype, Mesh.build(Degrees(ring=ranks)).world)
    finally:
        dist.destroy_process_group()
        gc.unfreeze()
    return held, [size - size_whole for size, size_whole in zip(sharded, whole, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_bytes_are_those_predicted(pool, folders, ranks, dtype):
    """Two blocks are gathered while there is a next one, then one, then none; 5 ranks have uneven shards."""
    from helios_cp.weights.placement import predicted_bytes

    config = resolve(folders["random-mid"]).transformer
    expected = predicted_bytes(config, dtype, ranks)
    ((held, gathered),) = pool.run(watch_gathered_memory, folders["random-mid"], ranks, dtype, ranks=1)
    assert held == [expected.resident] * 2
    assert gathered == [expected.gathered, expected.gathered, expected.gathered // 2, 0]


class CountedFile:
    """A safetensors file that counts the bytes read from it."""

    def __init__(self, file, counts: list[int]) -> None:
        self.opened = file
        self.counts = counts

    def keys(self):
        return self.opened.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._count(self.opened.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self.opened.get_slice(name), self._count)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.counts.append(tensor.nbytes)
        return tensor


class CountedSlice:
    def __init__(self, part, count) -> None:
        self.get_shape = part.get_shape
        self.get_dtype = part.get_dtype
        self.part = part
        self.count = count

    def __getitem__(self, index) -> torch.Tensor:
        return self.count(self.part[index])


def bytes_read(rank: int, folder: str, degrees: Degrees, sharded: bool) -> int:
    import safetensors

    safe_open = safetensors.safe_open
    counts: list[int] = []
    with mock.patch.object(safetensors, "safe_open", lambda *a, **k: CountedFile(safe_open(*a, **k), counts)):
        load(folder, degrees, torch.bfloat16, sharded)
    return sum(counts)


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(ulysses=2), Degrees(ring=5)], ids=str)
def test_only_own_rows_are_read(pool, folders, degrees):
    """Stored in fp32: all ranks together read what is sharded once, and each what is not."""

    whole = load_transformer(resolve(folders["random-mid"]), torch.float32)
    linear = [m for m in whole.blocks.modules() if isinstance(m, nn.Linear)]
    shared_out = sum(p.nbytes for module in linear for p in module.parameters())
    total = sum(p.nbytes for p in whole.parameters())
    arguments = bytes_read, folders["random-mid"], degrees
    assert pool.run(*arguments, False, ranks=degrees.world) == [total] * degrees.world
    read = pool.run(*arguments, True, ranks=degrees.world)
    assert sum(read) == shared_out + degrees.world * (total - shared_out)
    assert max(read) - min(read) <= shared_out // degrees.world


# Gathers


class RecordedGather:
    """FSDP's own all-gather, which also notes when it starts and the bytes it receives."""

    def __init__(self, name: str, events: list, received: list[int]) -> None:
        self.name = name
        self.events = events
        self.received = received

    def allocate(self, size, *, dtype, device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.events.append(f"gather {self.name}")
        self.received.append(output_tensor.nbytes - input_tensor.nbytes)
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


@torch.no_grad()
def watch_gathers(rank: int, folder: str, degrees: Degrees, ahead: bool) -> tuple[list[str], list[str], int, int]:
    """What happens in `encode_text` and in a forward, in order; bytes received in the forward, and those predicted."""
    from helios_cp.weights import placement as shard_weights

    gather_ahead = shard_weights._gather_ahead if ahead else lambda units: None
    with mock.patch.object(shard_weights, "_gather_ahead", gather_ahead):
        transformer = load(folder, degrees)
    events: list[str] = []
    received: list[int] = []
    for index, block in enumerate(transformer.blocks):
        for name, unit in ((str(index), block), (f"text {index}", block.attn2.to_kv)):
            unit.set_custom_all_gather(RecordedGather(name, events, received))
            unit.register_forward_pre_hook(lambda *_, name=name: events.append(f"compute {name}"))
    inputs = inputs_of_a_forward(transformer)
    text = list(events)
    events.clear()
    received.clear()
    transformer(*inputs)
    expected = shard_weights.predicted_bytes(transformer.config, torch.float32, degrees.world)
    return text, events, sum(received), expected.received


def test_gathers_run_one_block_ahead(pool, folders):
    for text, forward, received, expected in pool.run(
        watch_gathers, folders["random-mid"], Degrees(ulysses=2), True, ranks=2
    ):
        assert forward == ["gather 0", "gather 1", "compute 0", "gather 2", "compute 1", "compute 2"]
        assert [event.replace("text ", "") for event in text] == forward
        assert all("text" in event for event in text)
        assert received == expected


def test_gathers_that_are_not_ahead_show(pool, folders):
    for _, forward, *_ in pool.run(watch_gathers, folders["random-mid"], Degrees(ulysses=2), False, ranks=2):
        assert forward == ["gather 0", "compute 0", "gather 1", "compute 1", "gather 2", "compute 2"]


@torch.no_grad()
def notes_for_a_backward_pass(rank: int, folder: str, degrees: Degrees) -> int:
    transformer = load(folder, degrees)
    for _ in range(3):
        transformer(*inputs_of_a_forward(transformer))
    return len(transformer._get_fsdp_state()._comm_ctx.post_forward_order)


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this PyTorch cannot forget them")
def test_forwards_leave_no_notes_behind(pool, folders):
    assert pool.run(notes_for_a_backward_pass, folders["random-mid"], Degrees(ring=2), ranks=2) == [0, 0]
