"""Unit: a card's profile fitted to one rank's shares, on times that are made up from a known machine, to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.gpu_suite.profile import Factors, Share, compare, fitted, predict_share, share_workload
from benchmarks.gpu_suite.scope import Scope
from helios_cp.plan.hardware import H200, Hardware
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees

LARGEST = Degrees(ulysses=8, vae=8)


def times_of(hardware: Hardware, workload: Workload) -> dict[Degrees, Share]:
    """Shares on a machine that is just so."""
    layouts = [Degrees(), *(Degrees(ulysses=ranks, vae=ranks) for ranks in (2, 4)), LARGEST]
    return {degrees: predict_share(workload, degrees, hardware) for degrees in layouts}


def test_a_fit_finds_how_much_longer_the_engine_takes():
    """On times made up; each P is predicted from the others alone, so that one that is off shows in its own error."""
    workload = share_workload(Scope("14b", "cpu", "bfloat16", 2, False, ()))
    measured = times_of(fitted(H200, Factors(1.25, 0.8)), workload)
    for each in compare(workload, H200, measured):
        assert each.error.forwards == pytest.approx((0, 0, 0), abs=1e-9)
        if each.degrees.vae > 1:  # told from the decode by one rank
            assert each.error.decode == pytest.approx(0, abs=1e-9)
        assert each.measured.forwards == pytest.approx([1.25 * seconds for seconds in each.from_rates.forwards])
    slow = Share(tuple(2 * seconds for seconds in measured[LARGEST].forwards), measured[LARGEST].decode)
    errors = {each.degrees: each.error.forwards for each in compare(workload, H200, {**measured, LARGEST: slow})}
    assert errors.pop(LARGEST) == pytest.approx((-0.5, -0.5, -0.5))
    assert all(error == pytest.approx((0, 0, 0), abs=1e-9) for error in errors.values())


def test_messages_have_no_part_in_a_share():
    workload = share_workload(Scope("14b", "cpu", "bfloat16", 2, False, ()))
    slow = replace(
        H200, node_bandwidth=1e6, node_latency=1.0, node_exchange_latency=1.0, network_latency=1.0, gpus_per_node=1
    )
    assert times_of(slow, workload) == times_of(H200, workload)
