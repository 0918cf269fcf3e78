"""Unit: profiles of machines, the JSON that they travel as, and which one stands for a card."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.calibrate.messages import Message, exchange_latency
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import Layout
from helios_cp.plan.__main__ import main
from helios_cp.plan.forward_cost import PASSES
from helios_cp.plan.hardware import (
    CPU,
    H100,
    PROFILES,
    RTX4090,
    Hardware,
    detect_hardware,
    find_hardware,
    match_card,
    read_profile,
)
from helios_cp.plan.predict import Candidate, predict
from parallel.mesh import Degrees
from tests.plan.workloads import workload


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_state_their_sources_and_travel_as_json(name, tmp_path):
    hardware = PROFILES[name]
    numbers = {field.name for field in dataclasses.fields(Hardware) if field.type in ("float", "int")}
    assert {source for source, _ in hardware.sources} == numbers
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(hardware.to_json()))
    assert read_profile(path) == hardware


def test_shares_of_the_full_rate_are_interpolated():
    hardware = dataclasses.replace(H100, matmul_shares=((16, 0.2), (256, 0.6)))
    rates = [hardware.matmul_rate(rows, 2) / H100.matmul_flops for rows in (1, 16, 64, 256, 9999)]
    assert rates == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    assert hardware.matmul_rate(9999, 4) == pytest.approx(0.6 * H100.matmul_fp32_flops)


def test_other_shares_of_full_rates():
    hardware = dataclasses.replace(
        H100,
        matmul_shares=((64, 0.5),),
        matmul_fp32_shares=((64, 0.25),),
        attention_shares=((100, 0.2), (10000, 1.0)),
        vae_shares=((16, 0.1), (64, 1.0)),
        pass_shares=(("activation", 0.5),),
    )
    assert hardware.matmul_rate(64, 2) == 0.5 * H100.matmul_flops
    assert hardware.matmul_rate(64, 4) == 0.25 * H100.matmul_fp32_flops
    assert hardware.attention_rate(4000, 250, 2) == pytest.approx(0.6 * H100.attention_flops)  # as 1000 to 1000
    assert hardware.vae_rate(32) == pytest.approx(0.55 * H100.vae_flops) and H100.vae_rate(32) == H100.vae_flops
    assert hardware.pass_bandwidth("activation") == 0.5 * hardware.pass_bandwidth("copy") == 0.5 * H100.memory_bandwidth


def test_slower_rates_are_predicted():
    """Each share slows down its own part of a chunk, in proportion, and no other."""
    work = workload(dtype=torch.float32)
    before = predict(work, Candidate(Layout()), CPU)
    for change, part in (
        ({"matmul_fp32_shares": ((1, 0.5),)}, "products"),
        ({"attention_shares": ((1, 0.5),)}, "attention"),
        ({"vae_shares": ((1, 0.5),)}, "VAE"),
        ({"pass_shares": tuple((kind, 0.5) for kind in PASSES)}, "memory passes"),
    ):
        after = predict(work, Candidate(Layout()), dataclasses.replace(CPU, **change))
        assert after.seconds[part] == pytest.approx(2 * before.seconds[part], rel=1e-3)
        assert all(after.seconds[name] == before.seconds[name] for name in before.seconds if name != part)


@pytest.mark.parametrize("layout", [Layout(Degrees(ring=2)), Layout(Degrees(ulysses=2), shard_weights=True)], ids=str)
def test_messages_pass_beside_computing_as_far_as_the_hardware_can(layout):
    work = workload()
    hidden, half, none = (
        predict(work, Candidate(layout), dataclasses.replace(H100, overlap=overlap)).seconds["messages"]
        for overlap in (1.0, 0.5, 0.0)
    )
    assert hidden < half < none and none / 2 <= half <= (hidden + none) / 2  # what is hidden is bound by computing too


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"matmul_flops": "fast"}, "matmul_flops"),
        ({"matmul_flops": -1.0}, "above 0"),
        ({"vae_flops": None}, "vae_flops"),
        ({"colour": 1}, "colour is unknown"),
        ({"matmul_shares": [[4, 0.5], [2, 0.5]]}, "matmul_shares"),
        ({"matmul_shares": [4]}, "matmul_shares"),
        ({"attention_shares": [[64, 0.0]]}, "attention_shares"),
        ({"vae_shares": [[0, 0.5]]}, "pairs of channels"),
        ({"pass_shares": {"shuffle": 0.5}}, "pass_shares shuffle 0.5: allowed are copy, norm"),
        ({"pass_shares": [["norm", 0.5]]}, "pass_shares"),
        ({"overlap": 1.5}, "overlap 1.5: a share from 0 to 1"),
        ({"sources": ["x"]}, "sources"),
    ],
    ids=str,
)
def test_bad_profiles_are_refused_in_one_line(change, said, tmp_path, capsys):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**H100.to_json(), **change}))
    with pytest.raises(SystemExit, match="2"):
        main(["--hardware", str(path)])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_profile_must_be_whole(tmp_path):
    path = tmp_path / "profile.json"
    for text, said in (("{}", "peak_flops, "), ("[]", "JSON object"), ("{", "cannot be read")):
        path.write_text(text)
        with pytest.raises(RequestError, match=said):
            read_profile(path)


# This machine's


def test_hardware_is_found_by_name_and_memory():
    assert match_card("NVIDIA H200", 150 * 10**9, 2) == dataclasses.replace(
        PROFILES["h200"], memory_bytes=150e9, gpus_per_node=2
    )
    for name, profile in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ):
        assert match_card(name, 80 * 10**9, 8).name == profile


@pytest.mark.parametrize(
    ("name", "memory", "taken"),
    [
        ("NVIDIA H100 PCIe", 85e9, "h100"),
        ("NVIDIA A100-PCIE-40GB", 42e9, "a100-80"),
        ("NVIDIA H100 NVL", 100e9, "h100"),
        ("NVIDIA GH200 480GB", 102e9, "h100"),
        ("NVIDIA A10", 24e9, "rtx4090"),
    ],
)
def test_a_card_that_is_not_known_says_what_it_is_taken_for(name, memory, taken):
    """Its messages go over PCIe, and its memory is its own."""
    found = match_card(name, int(memory), 4)
    assert found.name == f"{name}, taken for {taken} with PCIe" and found.memory_bytes == memory
    assert found.node_bandwidth == RTX4090.node_bandwidth < PROFILES["h100"].node_bandwidth


def test_memory_is_shared_by_the_ranks_of_this_machine_alone():
    assert detect_hardware("cpu", 4).memory_bytes == pytest.approx(detect_hardware("cpu").memory_bytes / 4)


@pytest.mark.parametrize(("ranks_of_node", "expected"), [(8, 8), (4, 4), (None, 1)])
def test_ranks_a_node_are_those_of_the_job(monkeypatch, ranks_of_node, expected):
    """Not the cards that one process sees, which may be one of eight."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert detect_hardware("cuda", ranks_of_node).gpus_per_node == expected
    within = predict(workload(), Candidate(Layout(Degrees(ulysses=8))), detect_hardware("cuda", 8)).interval
    apart = predict(workload(), Candidate(Layout(Degrees(ulysses=8))), detect_hardware("cuda")).interval
    assert within < apart


def test_profiles_and_cards_have_one_size():
    """As CUDA reports it of such cards, to 3 %: 24564, 81559 and 143771 MiB on the driver's list."""
    for name, mebibytes in (("rtx4090", 24564), ("h100", 81559), ("h200", 143771)):
        assert find_hardware(name).memory_bytes == pytest.approx(mebibytes * 2**20, rel=0.03)


def test_a_calibration_tells_exchanges_from_collectives():
    """Messages of 1 ms and 2 ms beside their bytes at 1 GB/s; what has computing beside it says nothing of them."""
    bytes_sent = (4096, 65536, 1048576)
    kinds = {"all-to-all": 1e-3, "ring": 2e-3, "ring beside computing": 5e-3}
    messages = [
        Message(kind, 2, sent, latency + sent / 1e9, 0.003) for kind, latency in kinds.items() for sent in bytes_sent
    ]
    assert exchange_latency(messages, 1e9) == pytest.approx(2e-3)


def test_a_profile_without_a_latency_of_exchanges_is_read(tmp_path):
    values = CPU.to_json()
    del values["node_exchange_latency"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(values))
    assert read_profile(path) == CPU and read_profile(path).node_exchange_latency is None
    path.write_text(json.dumps({**values, "node_exchange_latency": -1.0}))
    with pytest.raises(RequestError, match="node_exchange_latency -1: a finite number above 0"):
        read_profile(path)
