"""Multi-rank gloo, unit, and GPU: steps that leave blocks out, in every layout as on one rank.

Equality is bitwise where nothing is left out. Layouts are compared with one rank within 1e-4 of the latents' range, as
whole videos are elsewhere: ranks add up the same sums in another order. What is left out changes far more than that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from unittest import mock

import pytest
import torch

from helios_cp.config.execution import Execution
from helios_cp.config.request import Request
from helios_cp.generate.__main__ import main
from helios_cp.model.block_cache import BlockCache, own_total
from helios_cp.model.transformer import BlockInputs
from helios_cp.pipeline.pipeline import Pipeline
from parallel.mesh import Degrees, Mesh

STEPS = {
    "random-base": {"num_inference_steps": 6, "guidance_scale": 3.0},
    "random-mid": {"pyramid_num_inference_steps_list": (5, 3, 3), "guidance_scale": 3.0},
}
THRESHOLD = {"random-base": 0.7, "random-mid": 0.8}  # random weights, so that steps differ by much
NEVER = 1e-9
SIZE = "--prompt fox --height 64 --width 64 --num-frames 33"


def request_of(name: str, **fields) -> Request:
    return Request(prompt=("a fox",), height=64, width=64, num_frames=66, **{**STEPS[name], **fields})


@torch.no_grad()
def make(rank: int, folder: str, degrees: Degrees | None, request: Request, execution: Execution, **options):
    """Latents of all chunks and the steps skipped in each, on this rank."""
    from helios_cp.pipeline.parallelize import load_parallel

    if degrees is None:
        pipeline = Pipeline.from_pretrained(folder, dtype=torch.float32, execution=execution)
    else:
        options = {"dtype": torch.float32, "execution": execution, **options}
        pipeline = load_parallel(folder, Mesh.build(degrees), **options)
    chunks = list(pipeline.stream(request, output_type="latent"))
    return torch.cat([chunk.latents for chunk in chunks], 2), [chunk.skipped for chunk in chunks]


@pytest.fixture(scope="module")
def alone(folders):
    found = {}
    for name in STEPS:
        for threshold in (None, NEVER, THRESHOLD[name]):
            execution = Execution(block_cache=threshold)
            found[name, threshold] = make(0, folders[name], None, request_of(name), execution)
    return found


@pytest.mark.parametrize("name", STEPS)
def test_a_threshold_too_small_to_reach_changes_no_bit(alone, name):
    latents, skipped = alone[name, NEVER]
    assert torch.equal(latents, alone[name, None][0])
    assert skipped == [(), ()]


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_skipped_and_the_latents_stay_near(alone, name):
    exact, (latents, skipped) = alone[name, None][0], alone[name, THRESHOLD[name]]
    assert all(skipped), "some steps of every chunk"
    error = (latents - exact).abs().mean() / exact.abs().mean()
    assert 1e-4 < error < 0.5


@pytest.mark.parametrize("name", STEPS)
def test_the_first_step_of_a_chunk_and_of_a_stage_is_computed(folders, name):
    """With a threshold that nothing exceeds, all others are skipped. CFG-Zero* leaves Mid no forward in two steps."""
    _, skipped = make(0, folders[name], None, request_of(name), Execution(block_cache=1e9))
    expected = {"random-base": (1, 2, 3, 4, 5), "random-mid": (1, 2, 4, 5, 7, 8)}[name]
    assert skipped == [expected] * 2


LAYOUTS = [
    ("random-base", Degrees(ulysses=2), {}),
    ("random-mid", Degrees(ring=3), {}),
    ("random-base", Degrees(ulysses=2, ffn_tp=2), {}),
    ("random-mid", Degrees(cfg=2), {}),
    ("random-mid", Degrees(cfg=2, ulysses=2), {}),
    ("random-mid", Degrees(ulysses=2), {"shard_weights": True}),
    ("random-base", Degrees(cfg=2), {"shard_weights": True}),
]


@pytest.mark.parametrize(("name", "degrees", "options"), LAYOUTS, ids=str)
def test_every_rank_of_every_layout_decides_as_one_rank(pool, folders, alone, name, degrees, options):
    arguments = folders[name], degrees, request_of(name), Execution(block_cache=THRESHOLD[name])
    results = pool.run(make_with, *arguments, options, ranks=degrees.world)
    latents, skipped = alone[name, THRESHOLD[name]]
    for own, decided in results:
        assert decided == skipped
        assert (own - latents).abs().max() <= 1e-4 * (latents.max() - latents.min())


def make_with(rank: int, folder: str, degrees: Degrees, request: Request, execution: Execution, options: dict):
    return make(rank, folder, degrees, request, execution, **options)


def changes_seen(rank: int, folder: str, request: Request, apart: bool) -> list[float]:
    """By what each step is judged on this rank; `apart`: by a rule that looks at a rank's own tokens only."""
    from helios_cp.pipeline import parallelize

    seen, change = [], BlockCache._change
    with contextlib.ExitStack() as stack:
        noted = mock.patch.object(BlockCache, "_change", lambda *of: seen.append(change(*of)) or seen[-1])
        stack.enter_context(noted)
        if apart:
            stack.enter_context(mock.patch.object(parallelize, "prompt_total", lambda sums, mesh: sums))
        make(rank, folder, Degrees(ulysses=2), request, Execution(block_cache=NEVER))
    return seen


def test_ranks_that_decide_apart_disagree(pool, folders):
    """Any threshold between two of their figures then has one rank wait for the other for ever."""
    for apart in (False, True):
        first, second = pool.run(changes_seen, folders["random-base"], request_of("random-base"), apart, ranks=2)
        assert len(first) == len(second) == 10
        assert (first == second) != apart


class Blocks(list):
    """Blocks of which each adds its own number, by a factor that is set from outside."""


def test_what_is_reused_is_what_the_others_added():
    """By hand: block 0 adds a, blocks 1 and 2 add b; a changes by 1 % and b by much, so the old b comes again."""
    added = {}

    def block(name):
        def run(states, modulation, pair, rotary, history, operations, *, prune_history):
            states = states[:, history:] if prune_history else states
            states += added[name]
            return states

        return run

    blocks = Blocks([block("first"), block("second"), block("last")])
    inputs = BlockInputs(None, ((None, None),) * 3, None, 2, None, None)
    cache = BlockCache(0.05)
    states = torch.arange(5.0).view(1, 5, 1)
    added |= {"first": 1.0, "second": 10.0, "last": 100.0}
    assert torch.equal(cache(blocks, states.clone(), inputs), states[:, 2:] + 111)
    added |= {"first": 1.01, "second": 0.0, "last": 0.0}
    assert torch.allclose(cache(blocks, states.clone(), inputs), states[:, 2:] + 111.01)
    added |= {"first": 1.04}  # nearer to the step skipped than to the step computed
    assert torch.allclose(cache(blocks, states.clone(), inputs), states[:, 2:] + 111.04)
    added |= {"first": 1.06}
    assert torch.allclose(cache(blocks, states.clone(), inputs), states[:, 2:] + 1.06)
    assert (cache.steps, cache.skipped) == (4, [1, 2])
    cache.start_chunk()
    assert torch.allclose(cache(blocks, states.clone(), inputs), states[:, 2:] + 1.06)
    assert (cache.steps, cache.skipped) == (1, [])


def test_the_prompts_branch_decides_for_both():
    """The other branch changes by less in one step and by more in another, and follows all the same."""
    cache = BlockCache(0.5)
    ran = []

    def blocks(amount):
        def first(states, *_, **__):
            states += amount
            return states

        def last(states, *_, **__):
            ran.append(amount)
            return states

        return Blocks([first, last])

    prompt, negative = (BlockInputs(None, ((None, None), (None, None)), None, 0, None, None) for _ in range(2))
    negative = dataclasses.replace(negative, text=1)
    for own, other in ((1.0, 2.0), (1.1, 9.0), (3.0, 2.0)):
        cache(blocks(own), torch.zeros(1, 2, 1), prompt)
        cache(blocks(other), torch.zeros(1, 2, 1), negative)
    assert ran == [1.0, 2.0, 3.0, 2.0]
    assert cache.skipped == [1]


def test_the_report_says_what_was_skipped(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    arguments = f"--model random-mid --block-cache 1e9 {SIZE}".split()
    arguments += ["--pyramid-steps", "4", "2", "2", "--output", str(tmp_path / "a.mp4")]
    assert main([*arguments, "--report", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["execution"]["block_cache"] == 1e9
    assert report["chunks"][0]["skipped_steps"] == [1, 3, 5]
    assert "3 steps of 1 chunks left blocks out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--model random-mid --block-cache 0", ("--block-cache 0: ", "above 0")),
        ("--model random-mid --block-cache -0.1", ("--block-cache -0.1: ", "above 0")),
        ("--model random-mid --block-cache much", ("--block-cache", "'much'")),
        ("--model random-distilled --block-cache 0.1", ("--block-cache 0.1: ", "Base and Mid")),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", STEPS)
def test_on_a_card(folders, name):
    """No bit changes where nothing is skipped; else the steps after the first of a stage are, as on a CPU.

    The figures that a threshold is compared with differ from those of a CPU by rounding, so both thresholds are far
    from all of them.
    """
    found = []
    for threshold in (None, NEVER, 1e9):
        execution = Execution(block_cache=threshold)
        pipeline = Pipeline.from_pretrained(folders[name], dtype=torch.bfloat16, device="cuda", execution=execution)
        chunks = list(pipeline.stream(request_of(name), output_type="latent"))
        found.append((torch.cat([chunk.latents for chunk in chunks], 2), [chunk.skipped for chunk in chunks]))
    (exact, _), (same, none), (near, skipped) = found
    assert torch.equal(exact, same) and none == [(), ()]
    assert skipped == [{"random-base": (1, 2, 3, 4, 5), "random-mid": (1, 2, 4, 5, 7, 8)}[name]] * 2
    assert near.isfinite().all() and not torch.equal(near, exact)


def test_own_total_changes_nothing():
    sums = torch.tensor([1.0, 2.0])
    assert own_total(sums) is sums
