"""Multi-rank gloo (and unit, and GPU): attention by engine, the layers of yunchang and xfuser among them.

The reference is softmax attention written out in fp64. In fp32 it leaves rounding errors of about 1e-6, so 5e-6 sees
any wrong token or head. bfloat16 rounds each output to 8 bits, which leaves 4e-3, and 1e-2 where the ring of yunchang
rounds log-sum-exps as well, so that 2e-2 is allowed. Tests of yunchang are skipped where it is not installed; it is in
the extra `test`. xfuser cannot be imported on a CPU, and its ring needs NCCL: its Ulysses is tested on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from parallel import engines
from parallel.engines import ENGINES, peer_layer, sequence_attention, unavailable_engine
from parallel.mesh import Degrees, Mesh
from parallel.segments import SegmentPlan
from tests.parallel.reference import random_qkv, reference_attention

EVEN = (4, 8, 4, 16)  # history parts and noisy tokens, which 2 and 4 ranks share evenly
UNEVEN = (4, 3, 6, 9)
BF16 = torch.bfloat16

needs_yunchang = pytest.mark.skipif(not importlib.util.find_spec("yunchang"), reason="needs the package yunchang")


def _largest_error(mesh, with_lengths, segments, heads=4, dtype=torch.float32, device="cpu"):
    """Of this rank's output, for queries of all tokens and for those of the last segment alone."""
    plan = SegmentPlan(segments, mesh.sequence.size)
    query, key, value = random_qkv(2, plan.total, plan.total, heads, 64, dtype, device)
    query = query * (1 + mesh.cfg.rank)  # the two branches of guidance attend to different things
    expected, _ = reference_attention(query, key, value)
    errors = []
    for part in (plan, plan.only(len(segments) - 1)):
        tail = slice(plan.total - part.total, None)
        own = [plan.shard(tensor, 1, mesh.sequence.rank) for tensor in (key, value)]
        out = with_lengths(part.local_lengths, plan.local_lengths)(
            part.shard(query[:, tail], 1, mesh.sequence.rank), *own
        )
        assert out.dtype == dtype
        errors.append((out.double() - part.shard(expected[:, tail], 1, mesh.sequence.rank)).abs().max().item())
    return max(errors)


def _error(rank, engine, degrees, segments, heads=4, dtype=torch.float32, device="cpu"):
    mesh = Mesh.build(degrees)
    return _largest_error(
        mesh, sequence_attention(engine, mesh.ulysses, mesh.ring, device), segments, heads, dtype, device
    )


def _peer_error(rank, engine, degrees, dtype=torch.float32, device="cpu"):
    """Of a peer's layer that is not asked whether it can run."""
    mesh = Mesh.build(degrees)
    layer = peer_layer(engine, mesh.ulysses, mesh.ring, torch.device(device))
    return _largest_error(mesh, lambda *_: layer, EVEN, dtype=dtype, device=device)


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(ulysses=3), Degrees(ring=3)], ids=str)
def test_native_takes_uneven_sizes(ranks, degrees):
    assert max(ranks.run(_error, "native", degrees, UNEVEN, 5, ranks=degrees.world)) < 5e-6


@needs_yunchang
@pytest.mark.parametrize("degrees", [Degrees(ulysses=2), Degrees(ulysses=4), Degrees(cfg=2, ulysses=2)], ids=str)
def test_ulysses_of_yunchang_equals_unsharded_attention_and_ours(ranks, degrees):
    """On the groups of the mesh: with cfg, two pairs of ranks attend at the same time."""
    for engine in ("yunchang", "native"):
        assert max(ranks.run(_error, engine, degrees, EVEN, ranks=degrees.world)) < 5e-6


def _leaves_no_groups_behind(rank):
    from yunchang.globals import PROCESS_GROUP

    mesh = Mesh.build(Degrees(ulysses=2))
    PROCESS_GROUP.ULYSSES_PG = "another's"
    sequence_attention("yunchang", mesh.ulysses, mesh.ring)
    found = PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG
    PROCESS_GROUP.ULYSSES_PG = None
    return found


@needs_yunchang
def test_global_groups_of_yunchang_are_as_before(ranks):
    assert ranks.run(_leaves_no_groups_behind, ranks=2) == [("another's", None)] * 2


# Broken on purpose, by us and by yunchang.


def _error_without_a_group_of_one(rank, degrees):
    with mock.patch.object(engines, "_process_group", lambda group: group.process_group):
        return _peer_error(rank, "yunchang", degrees)


@needs_yunchang
def test_a_missing_group_of_one_is_seen(ranks):
    """None means the whole world to yunchang, which then runs a ring over the ranks of Ulysses."""
    assert min(ranks.run(_error_without_a_group_of_one, Degrees(ulysses=2), ranks=2)) > 1e-2


@needs_yunchang
def test_ring_of_yunchang_is_wrong_on_a_cpu(ranks):
    """Why it is refused there; with a version that passes, the refusal can go."""
    assert min(ranks.run(_peer_error, "yunchang", Degrees(ring=2), ranks=2)) > 1e-2


# Refusals.


def _refusals(rank, engine, degrees, segments):
    mesh = Mesh.build(degrees)
    plan = SegmentPlan(segments, degrees.sequence)
    with pytest.raises(ValueError) as refusal:
        sequence_attention(engine, mesh.ulysses, mesh.ring)(plan.local_lengths, plan.local_lengths)
    return str(refusal.value)


@needs_yunchang
def test_layers_that_would_be_wrong_are_not_made(ranks):
    assert (
        ranks.run(_refusals, "yunchang", Degrees(ulysses=2), (3, 4), ranks=2)
        == ["yunchang attention of (4, 3) tokens: it needs equally many on every rank; use native"] * 2
    )
    (said, _) = ranks.run(_refusals, "yunchang", Degrees(ring=2), EVEN, ranks=2)
    assert said == "yunchang attention gives wrong results in a ring on the CPU; use ulysses alone, or native"
    assert "here a single rank holds it" in _refusals(0, "yunchang", Degrees(), EVEN)


HELIOS = [(240, 240, 1920, 540), (240, 240, 1920, 2160), (240, 240, 1920, 8640)]  # 384 × 640
TWO, EIGHT = Degrees(ulysses=2), Degrees(ulysses=8)


@pytest.mark.parametrize(
    ("engine", "device", "dtype", "degrees", "heads", "said"),
    [
        ("xfuser", "cpu", BF16, TWO, 40, "xfuser attention needs a CUDA device, not cpu; use native"),
        ("flash", "cpu", BF16, TWO, 40, "flash attention needs a CUDA device, not cpu; use native"),
        ("yunchang", "mps", BF16, TWO, 40, "yunchang attention runs on cpu and cuda, not on mps; use native"),
        (
            "yunchang",
            "cpu",
            BF16,
            Degrees(cfg=2),
            40,
            "yunchang attention shares a sequence among ranks, and here a single rank holds it; use native",
        ),
        (
            "yunchang",
            "cpu",
            BF16,
            Degrees(ring=2, ulysses=2),
            40,
            "yunchang attention gives wrong results in a ring on the CPU; use ulysses alone, or native",
        ),
        (
            "yunchang",
            "cuda",
            torch.float32,
            Degrees(ring=2),
            40,
            "yunchang attention takes float16 and bfloat16, not float32; use native",
        ),
        (
            "yunchang",
            "cpu",
            BF16,
            Degrees(ulysses=6),
            40,
            "yunchang attention needs equally many heads on every rank, and 40 heads do not divide by ulysses 6; "
            "allowed are 1, 2, 4, 5; or use native",
        ),
        (
            "xfuser",
            "cuda",
            BF16,
            EIGHT,
            40,
            "xfuser attention needs equally many tokens on every rank, and 540 tokens do not divide by 8 sequence "
            "ranks; allowed are 2, 3, 4, 5, 6; or use native",
        ),
    ],
)
def test_engines_that_cannot_run_here_say_why(monkeypatch, engine, device, dtype, degrees, heads, said):
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    assert unavailable_engine(engine, device, dtype, degrees, HELIOS, heads) == said


def test_a_ring_of_peers_over_gloo_is_refused_on_cuda(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    ring = ("cuda", BF16, Degrees(ring=2), HELIOS, 40)
    for engine in ("yunchang", "xfuser"):
        assert unavailable_engine(engine, *ring) is unavailable_engine(engine, *ring, "nccl") is None
        assert unavailable_engine(engine, *ring, "gloo") == (
            f"{engine} attention in a ring of CUDA tensors needs nccl, not gloo; use ulysses alone, or native"
        )


def test_missing_and_broken_packages_are_named(monkeypatch):
    asked = ("xfuser", "cuda", BF16, TWO, HELIOS, 40)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == "triton" else object())
    assert unavailable_engine(*asked) == (
        "xfuser attention needs the package triton, which is not installed; use native"
    )

    def fail(package):
        raise AttributeError("no such\nkernel")

    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    assert unavailable_engine(*asked) == (
        "xfuser attention needs the package xfuser, whose import fails with AttributeError: no such kernel; use native"
    )


def test_engines_that_can_run_here():
    assert unavailable_engine("native", "cpu", torch.float32, Degrees(ring=7), HELIOS, 40) is None
    if importlib.util.find_spec("yunchang"):
        for size in (2, 4):
            assert unavailable_engine("yunchang", "cpu", torch.float32, Degrees(ulysses=size), HELIOS, 40) is None
    with pytest.raises(ValueError, match="attention engine 'sage': allowed are native, cudnn, flash, yunchang, xfuser"):
        unavailable_engine("sage", "cpu", torch.float32, TWO, HELIOS, 40)


# GPU: ranks that share one card over gloo.


@contextmanager
def _ring_over_host_memory():
    """The ring of yunchang by way of host memory, as gloo has no messages between CUDA tensors."""
    ring = importlib.import_module("yunchang.ring.ring_flash_attn")

    class HostRing(ring.RingComm):
        def __init__(self, group):
            super().__init__(group)
            self.arrivals = []

        def send_recv(self, tensor, received=None):
            received = torch.empty_like(tensor)
            self.arrivals.append((received, super().send_recv(tensor.cpu())))
            return received

        def wait(self):
            super().wait()
            while self.arrivals:
                received, arrived = self.arrivals.pop()
                received.copy_(arrived)

    with mock.patch.object(ring, "RingComm", HostRing):
        yield


def _error_on_one_card(rank, engine, degrees):
    if engine not in engines.PEERS:
        return _error(rank, engine, degrees, EVEN, dtype=BF16, device="cuda:0")
    with _ring_over_host_memory():
        return _peer_error(rank, engine, degrees, BF16, "cuda:0")


ON_ONE_CARD = [(engine, degrees) for engine in ENGINES for degrees in (Degrees(ulysses=2), Degrees(ring=2))]
ON_ONE_CARD.remove(("xfuser", Degrees(ring=2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("engine", "degrees"), ON_ONE_CARD, ids=str)
def test_equals_unsharded_attention_on_one_shared_card(ranks, engine, degrees):
    if reason := unavailable_engine(engine, "cuda", BF16, degrees, [EVEN], 4):
        pytest.skip(reason)
    errors = ranks.run(_error_on_one_card, engine, degrees, ranks=2, timeout=120)
    if engine == "xfuser":
        ranks.close()  # its groups last as long as a process
    assert max(errors) < 2e-2, errors
