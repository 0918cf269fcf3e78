"""Unit: predicted device memory against what offloading holds in running code, and the table of cards.

Bytes of weights on the device are counted and exact, but for the text encoder's, which leave out rounding up to 256
bytes a tensor. Memory that a forward or a decoding needs is that of the planner, which has tests of its own. Times are
modelled, so only their order is tested.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.full_size import quantize_blocks
from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.plan.cards import CARDS, EXACT, GIBI, Choice, chunk_seconds, main, rows, table
from helios_cp.plan.flags import PlanCall
from helios_cp.plan.memory import (
    CONTEXT,
    FITTING_SHARE,
    HOST_PROCESS,
    card_memory,
    decoder_parameters,
    host_bytes,
    text_encoder_bytes,
    transformer_bytes,
)
from helios_cp.plan.workload import part_configs
from helios_cp.runtime.device_weights import SLOTS
from helios_cp.runtime.offload import offload
from parallel.mesh import Degrees
from tests.plan.workloads import workload as workload_of

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def workload():
    return workload_of()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("how", ["model", "group"])
def test_weights_on_the_device_are_those_predicted(presets, how, quantize):
    """Of text encoder, transformer and decoder, loaded in bf16."""
    if quantize == "int4":
        pytest.importorskip("torchao")
    pipeline = Pipeline.from_pretrained(
        str(presets["random-mid"]), dtype=BF16, execution=Execution(vae_dtype="bfloat16")
    )
    if quantize is not None:
        quantize_blocks(pipeline.transformer, quantize)
    models = pipeline.prompt_encoder.text_encoder, pipeline.transformer, pipeline.codec.vae
    parts = offload(how, pipeline.device, *models).parts
    vae, text_encoder = part_configs(pipeline.checkpoint)
    predicted = transformer_bytes(pipeline.checkpoint.transformer, BF16, quantize)
    expected = predicted.whole if how == "model" else predicted.rest + sum(predicted.slots)
    assert parts["transformer"].device_bytes == expected
    text = text_encoder_bytes(text_encoder, BF16, how)
    assert text <= parts["text encoder"].device_bytes < text + 256 * 10 * (SLOTS + 1)
    decoder = 2 * decoder_parameters(vae)
    assert decoder <= parts["decoder"].device_bytes < decoder + 256 * 100


def test_a_rank_that_splits_feed_forward_layers_holds_less(workload):
    whole, half = (transformer_bytes(workload.config, BF16, None, ranks) for ranks in (1, 2))
    features = 2 * workload.config.dim + 1
    lost = workload.config.num_layers * workload.config.ffn_dim // 2 * features * BF16.itemsize
    assert whole.whole - half.whole == lost


def test_a_chunk_is_decoded_beside_the_next_one_by_a_vae_that_is_whole(workload):
    """And in turn by one that is split, or by a decoder's own card."""
    beside = card_memory(workload).phases["denoise and decode"]
    apart = card_memory(workload, layout=Layout(Degrees(ulysses=2, vae=2))).phases
    assert set(apart) == {"denoise", "decode"}
    alone = card_memory(workload, has_decoders=True)
    assert beside["working"] == sum(parts["working"] for parts in alone.phases.values())
    assert "VAE" not in alone.phases["denoise"] and "transformer" not in alone.phases["decode"]
    assert (
        card_memory(workload, layout=Layout(Degrees(ulysses=2), shard_weights=True)).bytes < card_memory(workload).bytes
    )


def test_the_goal_of_7_gb(workload):
    memory = card_memory(workload, Execution(offload="group"))
    assert memory.bytes < 7e9
    assert memory.largest == "decode"
    assert all(parts["context"] == CONTEXT for parts in memory.phases.values())
    streamed = transformer_bytes(workload.config, BF16)
    assert sum(streamed.slots) == 2 * streamed.streamed / workload.config.num_layers


def test_what_saves_memory_does(workload):
    needs = [card_memory(workload, Execution(offload=how)).bytes for how in ("none", "model", "group")]
    assert needs == sorted(needs, reverse=True)
    for how in ("none", "model"):
        needs = [card_memory(workload, Execution(offload=how, quantize=kind)).bytes for kind in (None, "int8", "int4")]
        assert needs == sorted(needs, reverse=True)
    assert card_memory(workload, Execution(offload="group", vae_dtype="bfloat16")).bytes < 4.5e9


@pytest.fixture(scope="module")
def found():
    return list(rows([workload_of(pyramid_num_inference_steps_list=steps) for steps in ((1, 1, 1), (2, 2, 2))]))


def test_every_card_has_an_exact_row_that_fits(found, workload):
    assert {row.gigabytes for row in found} == set(CARDS)
    for row in found:
        assert row.bytes <= FITTING_SHARE * GIBI * row.gigabytes
    exact = {row.gigabytes: row.choice for row in found if row.choice in EXACT}
    assert exact[8].flags == exact[24].flags == "--offload group"
    assert exact[40].flags == "--offload model"
    assert exact[80].flags == exact[141].flags == ""
    quantised = {row.gigabytes: row.choice.flags for row in found if row.choice not in EXACT}
    assert quantised[24] == "--quantize int8 --offload model"
    assert 8 not in quantised


def test_fps_are_bounds_or_of_a_profile(found):
    for row in found:
        is_known = row.hardware is not None and row.choice.execution.quantize is None
        assert (row.fps[0] is not None) == (is_known or row.is_bound)
        if row.fps[0] is not None:
            assert row.fps[0] > row.fps[1] > 0


def test_offloading_costs_time(workload):
    times = [chunk_seconds(workload, choice, "h100") for choice in (EXACT[0], EXACT[2], EXACT[3])]
    assert times == sorted(times)
    assert times[0] == chunk_seconds(workload, Choice(Execution(offload="model"), transformer_stays=True), "h100")


def test_markdown(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[-1].count("|")
    assert sum(line.startswith("| 8, 12, 16 GB | `--offload group` |") for line in lines) == 1
    assert all("modelled" in name for name in lines[0].split("|")[3:-1])


def test_another_model_and_size():
    text = table(PlanCall(model="14b-base", request={"height": 768, "width": 1280}))
    assert "FPS at [50]" in text
    assert "| 8 GB" not in text and "| 8, " not in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [("--model 15b", "--model 15b"), ("--height 100", "--height 100"), ("--width wide", "'wide'")],
)
def test_refusals(capsys, monkeypatch, tmp_path, arguments, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert part in line
    assert "\n" not in line


def test_the_host_holds_all_weights_that_rest_there():
    """Of Helios-14B: 28.6 GB of transformer, 11.4 of text encoder, 0.5 of VAE."""
    workload = workload_of()
    weights = {how: host_bytes(workload, Execution(offload=how)) - HOST_PROCESS for how in ("none", "model", "group")}
    assert round(weights["none"] / 1e9, 1) == 11.4 and round(weights["model"] / 1e9, 1) == 40.6
    assert weights["group"] == weights["model"]
    int8 = host_bytes(workload, Execution(offload="model", quantize="int8")) - HOST_PROCESS
    assert 26e9 < int8 < weights["model"] - 13e9
