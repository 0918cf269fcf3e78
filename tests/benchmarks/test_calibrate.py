"""Unit and multi-rank gloo: what the calibration counts, measures and writes; one test needs a GPU.

Counts are exact. Times are real but tiny, so only that they are positive and of a possible size is tested; the fit of
messages is tested on times made up from a known model, to rounding: on a busy machine a few real ones may take no time
that could be told from computing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.calibrate import __main__ as calibration
from benchmarks.calibrate import rates as calibrate_rates
from benchmarks.calibrate.__main__ import count_ranks, main, shares, to_hardware
from benchmarks.calibrate.messages import KINDS, Message, MessageSettings, fit, message_step
from benchmarks.calibrate.messages import measure_on_rank as measure_messages
from benchmarks.calibrate.rates import (
    Measurement,
    Settings,
    attention,
    decoding,
    level_of,
    measure,
    measure_on_rank,
    over_ranks,
    passes,
    product,
    time_call,
)
from benchmarks.measuring.counting import count
from benchmarks.ranks.pool import shared_pool
from helios_cp.config.errors import RequestError
from helios_cp.plan.forward_cost import PASSES, Product
from helios_cp.plan.hardware import CPU, MEASUREMENTS, Hardware, read_profile
from parallel.collectives import Group, Meter

HOST = torch.device("cpu")
FP32 = 4


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The file that a quick calibration of two ranks writes, and what it said; times of messages are made up."""
    path = tmp_path_factory.mktemp("calibration") / "profile.json"
    said: list[str] = []
    with (
        mock.patch.object(calibration, "say", said.append),
        mock.patch.object(calibration, "count_ranks", lambda *_: 2),
        mock.patch.object(calibration, "measure_messages", made_up_on_rank),
    ):
        assert main(["--output", str(path), "--device", "cpu", "--quick"], shared_pool()) == 0
    return path, said


# Counts


def miscounted() -> list[str]:
    """Programs whose FLOPs are not those that PyTorch counts as they run."""
    programs = [
        product(24, 16, 40, torch.float32, HOST),
        product(3, 8, 8, torch.bfloat16, HOST),
        attention(32, 2, 16, torch.float32, HOST),
        decoding(level_of(8), (3, 2, 2), HOST),
    ]
    found = []
    for program in programs:
        if count(program.run).flops != program.work:
            found.append(program.kind)
    return found


def test_flops_are_those_that_run():
    assert miscounted() == []


def test_a_wrong_count_is_seen(monkeypatch):
    monkeypatch.setattr(Product, "flops", property(lambda each: each.rows * each.inner * each.columns))
    monkeypatch.setattr(calibrate_rates, "decode_flops", lambda *_: 1)
    assert miscounted() == ["product", "product", "decoding"]


def test_bytes_of_passes():
    """By hand; LayerNorm also writes a mean and a deviation a token, and reads one row as both weight and bias."""
    tokens, width = 6, 32
    states = tokens * width * FP32
    found = {program.kind: program.work for program in passes(tokens, width, torch.float32, HOST)}
    assert found == {
        "copy, clone": 2 * states,
        "copy, sum": 3 * states,
        "norm, layer": 2 * states + width * FP32 + 2 * tokens * FP32,
        "norm, root mean square": 2 * states + width * FP32,
        "rotation": 3 * states,  # a table as large as the states: one head
        "activation": 2 * states,
    }
    assert {kind.split(",")[0] for kind in found} == set(PASSES)


def test_weights_are_not_used_twice_in_a_row(monkeypatch):
    used = []
    monkeypatch.setattr(calibrate_rates.F, "linear", lambda states, weight, bias: used.append(weight.data_ptr()))
    program = product(1, 4096, 1024, torch.float32, HOST)
    for _ in range(6):
        program.run()
    assert len(set(used)) == 5 and used[5] == used[0]  # 16 MB each: five are more than what a cache may hold


# Measurements


def test_time_of_a_call():
    assert time_call(lambda: time.sleep(0.01), HOST, 0.03) >= 0.01


def test_every_program_is_measured():
    settings = dataclasses.replace(Settings.of(HOST, quick=True), seconds=0.001)
    seen: list[Measurement] = []
    found = measure(settings, HOST, seen.append)
    assert found == seen
    kinds = {each.kind.split(",")[0] for each in found}
    assert kinds == {"product", "attention", *PASSES, "launch", "decoding"}
    assert {each.dtype for each in found if each.kind == "product"} == {"float32", "bfloat16"}
    for each in found:
        assert Measurement.from_json(json.loads(json.dumps(each.to_json()))) == each
        assert each.work > 0 and 0 < each.seconds < 10 and each.rate == each.work / each.seconds
        assert 1e3 < each.rate < 1e14, each


def test_ranks_measure_in_step():
    settings = dataclasses.replace(Settings.of(HOST, quick=True), seconds=0.001, rows=(4,), tokens=(8,))
    found = shared_pool().run(measure_on_rank, settings, ranks=2)
    together = over_ranks(found)
    assert [each.shape for each in together] == [each.shape for each in found[1]]
    first, second, both = (each[0].seconds for each in (*found, together))
    assert both == pytest.approx((first + second) / 2)


def test_settings_of_a_gpu_are_those_of_the_model():
    settings = Settings.of(torch.device("cuda"), quick=False)
    assert (5120, 13824) in settings.products and settings.heads * settings.head_dim == 5120
    assert settings.pass_dtype == torch.bfloat16 and settings.vae[0][1] == (9, 48, 80)


def test_shares_of_the_full_rate():
    def measured(rows: int, rate: float) -> Measurement:
        return Measurement("product", (rows, 8, 8), "float32", 1000, 1000 / rate)

    full, table = shares([measured(16, 10), measured(64, 40), measured(64, 60), measured(256, 100)])
    assert full == pytest.approx(100)
    assert [rows for rows, _ in table] == [16, 64, 256]
    assert [share for _, share in table] == pytest.approx([0.1, 0.5, 1.0])


# Messages


def sent_bytes(rank: int, kinds: tuple[str, ...], sizes: tuple[int, ...]) -> dict[tuple[str, int], tuple[int, int]]:
    """Calls and bytes of one message of each kind and size; every rank computes in between."""
    found, computed = {}, []
    for kind in kinds:
        for size in sizes:
            meter = Meter()
            group = Group.of(dist.group.WORLD, meter)
            message_step(kind, group, size, lambda: computed.append(1), HOST)()
            found[kind, size] = meter.total_calls, meter.total_bytes
    assert len(computed) == len(found)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_message_sends_as_many_bytes_as_it_says(ranks):
    sizes = (240, 4800)  # of elements that divide among the other ranks
    for found in shared_pool().run(sent_bytes, KINDS, sizes, ranks=ranks):
        assert found == {(kind, size): (1, size) for kind in KINDS for size in sizes}


def test_messages_are_measured_on_ranks():
    settings = MessageSettings((1024, 65536), 0.0002, 2, 2)
    for found in shared_pool().run(measure_messages, settings, 2, False, ranks=2):
        assert [(each.kind, each.sent_bytes) for each in found] == [(k, s) for s in settings.sizes for k in KINDS]
        assert all(math.isfinite(each.seconds) and 0 < each.computing < math.inf for each in found)


def made_up(latency: float, bandwidth: float, overlap: float) -> list[Message]:
    sizes, computing = (4096, 65536, 1048576), 1.0
    messages = []
    for size in sizes:
        seconds = latency + size / bandwidth
        messages += [Message(kind, 2, size, seconds, computing) for kind in KINDS[:3]]
        messages.append(Message(KINDS[3], 2, size, seconds * (1 - overlap), computing))
    return messages


def made_up_on_rank(rank: int, settings: MessageSettings, ranks: int, on_cuda: bool) -> list[Message]:
    return made_up(2e-4, 1.5e9, 0.25)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1.0])
def test_fit_finds_the_model_that_made_the_times(overlap):
    model = fit(made_up(2e-4, 1.5e9, overlap))
    assert (model.latency, model.bandwidth) == pytest.approx((2e-4, 1.5e9), rel=1e-6)
    assert model.overlap == pytest.approx(overlap, abs=1e-9)


def test_fit_sees_another_latency():
    longer = [dataclasses.replace(each, seconds=each.seconds + 1e-4) for each in made_up(2e-4, 1.5e9, 0.0)]
    assert fit(longer).latency == pytest.approx(3e-4, rel=1e-6)


def test_fit_of_a_disturbed_machine_stays_possible():
    """Messages that cost less than nothing are left out; a slope below 0 becomes a bandwidth above all others."""
    falling = [dataclasses.replace(each, seconds=1e-3 - 1e-10 * each.sent_bytes) for each in made_up(1e-4, 1e9, 0.0)]
    model = fit(falling)
    assert model.latency > 0 and model.bandwidth == pytest.approx(1e13) and 0 <= model.overlap <= 1
    assert fit([dataclasses.replace(each, seconds=-1e-6) for each in falling]) is None


# Profiles


def test_a_calibration_is_read_by_the_planner(quick, presets, capsys):
    plan = pytest.importorskip("helios_cp.plan.__main__")  # which prints with rich
    path, _ = quick
    hardware = read_profile(path)
    written = json.loads(path.read_text())
    assert hardware.name.startswith("calibrated") and written[MEASUREMENTS]["ranks"] == 2
    kinds = {each["kind"] for each in written[MEASUREMENTS]["messages"]}
    assert kinds == set(KINDS) and written[MEASUREMENTS]["versions"]["torch"] == torch.__version__
    flags = ["--model", str(presets["random-mid"]), "--height", "64", "--width", "64", "--dtype", "float32", "--json"]
    assert plan.main([*flags, "--gpus", "2", "--hardware", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["hardware"]["matmul_fp32_flops"] == hardware.matmul_fp32_flops
    assert all(each["modelled_fps"] > 0 for each in printed["plans"])


def test_every_number_of_it_has_a_source(quick):
    hardware = read_profile(quick[0])
    numbers = {field.name for field in dataclasses.fields(Hardware) if field.type in ("float", "int")}
    sources = dict(hardware.sources)
    assert numbers <= sources.keys()
    for name in ("matmul_flops", "attention_fp32_flops", "vae_flops", "memory_bandwidth", "node_latency", "overlap"):
        assert "measured here" in sources[name]
    assert sources["network_bandwidth"].startswith("assumed") and "MALLOC_" in sources["matmul_flops"]


def test_what_was_measured_is_what_is_written(quick):
    hardware, written = read_profile(quick[0]), json.loads(quick[0].read_text())[MEASUREMENTS]
    rates = [each["rate"] for each in written["rates"] if (each["kind"], each["dtype"]) == ("product", "float32")]
    assert hardware.matmul_fp32_flops == max(rates) and len(hardware.matmul_fp32_shares) == len(rates)
    model = fit([Message(**each) for each in written["messages"]])
    assert (hardware.node_latency, hardware.node_bandwidth) == (model.latency, model.bandwidth)
    assert (model.latency, model.bandwidth) == pytest.approx((2e-4, 1.5e9)) and hardware.overlap == pytest.approx(0.25)


def test_progress_is_told(quick):
    _, said = quick
    assert any("product 256 x 256 x 256 float32" in line and "GFLOP/s" in line for line in said)
    assert any(line.startswith("  ring beside computing") for line in said) and said[-1].startswith("written to")


def test_without_messages_the_assumption_stays_and_says_so(quick):
    rates = [Measurement.from_json(each) for each in json.loads(quick[0].read_text())[MEASUREMENTS]["rates"]]
    hardware = to_hardware(CPU, rates, [], HOST, 1)
    assert (hardware.node_latency, hardware.overlap) == (CPU.node_latency, CPU.overlap)
    assert dict(hardware.sources)["node_latency"].startswith("assumed")
    untold = [dataclasses.replace(each, seconds=-1e-6) for each in made_up(2e-4, 1.5e9, 0.0)]
    busy = to_hardware(CPU, rates, untold, HOST, 2)
    for name in ("node_latency", "node_bandwidth", "overlap"):
        assert getattr(busy, name) == getattr(CPU, name)
        source = dict(busy.sources)[name]
        assert source.startswith("assumed") and "could be told from computing" in source


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--output"),
        (["--output", "profile.txt"], "allowed is .json"),
        (["--output", "p.json", "--ranks", "0"], "--ranks 0: 1 to"),
        (["--output", "p.json", "--ranks", "999"], "--ranks 999: 1 to"),
        (["--output", "p.json", "--ranks", "two"], "no whole number"),
        (["--output", "p.json", "--device", "tpu"], "--device"),
        (["--output", "p.json", "--fast"], "unrecognized"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*flags, *([] if "--device" in flags else ["--device", "cpu"])], shared_pool())
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused():
    with pytest.raises(RequestError, match="no CUDA device here"):
        count_ranks(None, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_calibrated(tmp_path):
    path = tmp_path / "profile.json"
    assert main(["--output", str(path), "--device", "cuda", "--ranks", "1", "--quick"]) == 0
    hardware = read_profile(path)
    assert hardware.matmul_flops > 1e12 and hardware.memory_bandwidth > 1e11
    assert dict(hardware.sources)["node_latency"].startswith("assumed")
