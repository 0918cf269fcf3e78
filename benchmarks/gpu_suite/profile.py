"""A profile of the card for the planner, from what `benchmarks.gpu_suite` measures on it.

Products, attention, passes over memory, launches and decoding give its rates, as in `benchmarks.calibrate`. A rank's
parts of P = 1, 2, 4, 8, run by the engine without messages, then tell how much longer a whole forward takes than its
pieces by themselves, and all rates are divided by that: one number for forwards and one for decoding.
How good that is shows in what the planner says of each P when it knows the shares of the others alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.calibrate.__main__ import about, to_hardware, write_profile
from benchmarks.calibrate.rates import Measurement, Settings, measure
from benchmarks.gpu_suite.runner import Record
from benchmarks.gpu_suite.scope import Scope
from helios_cp.config.layout import Layout
from helios_cp.plan.hardware import MEASUREMENTS, Hardware, detect_hardware
from helios_cp.plan.predict import Candidate, predict
from helios_cp.plan.workload import Workload
from parallel.mesh import Degrees

PROFILE = "gpu_profile.json"
"""In the folder of the results: `python -m helios_cp.plan --hardware …/gpu_profile.json`."""

FORWARD_RATES = ("matmul_flops", "matmul_fp32_flops", "attention_flops", "attention_fp32_flops", "memory_bandwidth")


@dataclass(frozen=True)
class Share:
    """Seconds of one rank's part: of a forward at each stage, and of decoding a chunk."""

    forwards: tuple[float, ...]
    decode: float


@dataclass(frozen=True)
class Factors:
    """How many times longer the engine takes than the rates of its pieces say."""

    forwards: float
    decode: float

    @classmethod
    def fit(cls, measured: Mapping[Degrees, Share], predicted: Mapping[Degrees, Share]) -> Factors:
        """Of `measured`: the median over all forwards, and that of the decode by one rank, or of all where none is."""
        forwards, decodes = [], {}
        for degrees, share in measured.items():
            forwards += [a / b for a, b in zip(share.forwards, predicted[degrees].forwards, strict=True)]
            decodes[degrees] = share.decode / predicted[degrees].decode
        whole = [factor for degrees, factor in decodes.items() if degrees.vae == 1]
        return cls(statistics.median(forwards), statistics.median(whole or decodes.values()))


@dataclass(frozen=True)
class Comparison:
    """What was measured on one P, and what the planner says of it: from rates alone, and from other P besides."""

    degrees: Degrees
    measured: Share
    from_rates: Share
    from_others: Share

    @property
    def error(self) -> Share:
        """Relative, of the prediction that rests on the other P: 0.1 is a tenth too slow."""
        pairs = zip(self.from_others.forwards, self.measured.forwards, strict=True)
        return Share(tuple(a / b - 1 for a, b in pairs), self.from_others.decode / self.measured.decode - 1)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": asdict(self.error)}

    def __str__(self) -> str:
        def line(values: tuple[float, ...], kind: str) -> str:
            return ", ".join(format(value, kind) for value in values)

        measured, predicted, error = (
            (*each.forwards, each.decode) for each in (self.measured, self.from_others, self.error)
        )
        return (
            f"P = {self.degrees.world}: forwards and decode measured {line(measured, '.3g')} s, predicted from the "
            f"other P {line(predicted, '.3g')} s, error {line(error, '+.0%')}"
        )


def measure_profile(scope: Scope, record: Record) -> None:
    """Rates of the pieces, and the profile that they make by themselves."""
    device = scope.torch_device
    settings = Settings.of(device, quick=device.type == "cpu")
    rates = measure(replace(settings, seconds=0.05 if device.type == "cuda" else 0.002), device)
    write_profile(record.path.with_name(PROFILE), profile_of(rates, device), about(1, False, rates, []))


def profile_of(rates: Sequence[Measurement], device: torch.device) -> Hardware:
    """For one rank: what the machine's own profile assumes of messages stays."""
    return to_hardware(detect_hardware(device.type), rates, [], device, 1)


def fit_profile(scope: Scope, record: Record, measured: Mapping[Degrees, Share]) -> None:
    """Compare the planner with the shares, print it, and write the profile anew with what they tell.

    Raises `RuntimeError` where rates have not been measured yet.
    """
    path = record.path.with_name(PROFILE)
    if not path.exists():
        raise RuntimeError(f"{PROFILE} is missing, which gpu_rates writes: run both phases with one --output")
    basis = json.loads(path.read_text(encoding="utf-8"))[MEASUREMENTS]
    hardware = profile_of([Measurement.from_json(each) for each in basis["rates"]], scope.torch_device)
    comparisons = compare(share_workload(scope), hardware, measured)
    for each in comparisons:
        print(f"  {each}", flush=True)
    factors = Factors.fit(measured, {each.degrees: each.from_rates for each in comparisons})
    error = statistics.median(abs(each) for one in comparisons for each in (*one.error.forwards, one.error.decode))
    print(f"  median error {error:.1%}; fitted to every P in {PROFILE}", flush=True)
    record.update(comparisons=[each.to_json() for each in comparisons], factors=asdict(factors), median_error=error)
    shares = {str(degrees.world): asdict(share) for degrees, share in measured.items()}
    write_profile(path, fitted(hardware, factors), {**basis, "shares": shares, "factors": asdict(factors)})


def share_workload(scope: Scope) -> Workload:
    """That of which `benchmarks.gpu_suite.one_rank_share` times the parts."""
    return Workload.of(scope.checkpoint, scope.request("distilled-111"), scope.torch_dtype)


def compare(workload: Workload, hardware: Hardware, measured: Mapping[Degrees, Share]) -> list[Comparison]:
    """Each P against the planner on the rates of `hardware`, and on these fitted to the other P."""
    from_rates = {degrees: predict_share(workload, degrees, hardware) for degrees in measured}
    found = []
    for degrees, share in measured.items():
        factors = Factors.fit({each: measured[each] for each in measured if each != degrees}, from_rates)
        from_others = predict_share(workload, degrees, fitted(hardware, factors))
        found.append(Comparison(degrees, share, from_rates[degrees], from_others))
    return found


def predict_share(workload: Workload, degrees: Degrees, hardware: Hardware) -> Share:
    """What the planner says where messages arrive at once."""
    at_once = replace(
        hardware, node_latency=1e-15, node_exchange_latency=None, node_bandwidth=1e24, gpus_per_node=degrees.world
    )
    prediction = predict(workload, Candidate(Layout(degrees)), at_once)
    return Share(tuple(sum(each.seconds.values()) for each in prediction.stages), prediction.decode)


def fitted(hardware: Hardware, factors: Factors) -> Hardware:
    """The profile on which everything but messages takes so many times longer."""
    values = {name: getattr(hardware, name) / factors.forwards for name in FORWARD_RATES}
    values |= {
        "kernel_seconds": hardware.kernel_seconds * factors.forwards,
        "vae_flops": hardware.vae_flops / factors.decode,
    }
    why = "fitted to one rank's measured parts of P = 1, 2, 4, 8: time"
    sources = dict(hardware.sources)
    for name in values:
        factor = factors.decode if name == "vae_flops" else factors.forwards
        sources[name] = f"{sources[name]}; {why} × {factor:.3g}"
    return replace(hardware, **values, sources=tuple(sources.items()))
