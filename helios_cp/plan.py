"""Command line: which layout of the ranks is fastest for a model, a size and a machine, before anything is run.

python -m helios_cp.plan --gpus 8 --hardware h100
python -m helios_cp.plan --model FOLDER --height 1440 --width 2560 --gpus 8 --nodes 2 --hardware profile.json --json

No model is built: tokens, FLOPs, bytes and messages follow from the config and the engine's own cuts of the sequence.
All times are modelled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from helios_cp.arguments import OneLineParser, given_fields, whole_number
from helios_cp.config import DTYPES, Checkpoint, Request, RequestError, TransformerConfig
from helios_cp.hardware import PROFILES, Hardware, detect_hardware, find_hardware
from helios_cp.layout import Layout, smallest_tokens
from helios_cp.predict import Candidate, Prediction, Workload, predict
from helios_cp.vae_cost import VaeConfig
from helios_cp.weight_cost import TextEncoderConfig
from parallel.mesh import Degrees

PROGRAM = "helios_cp.plan"
MAX_RANKS = 4096
BUILT_IN = {"14b": "distilled", "14b-mid": "mid", "14b-base": "base"}


@dataclass(frozen=True)
class BuiltInCheckpoint(Checkpoint):
    """Helios-14B as a config alone; there is no folder."""

    @property
    def stages(self) -> int:
        return 3 if self.is_pyramid else 1

    @classmethod
    def named(cls, name: str) -> BuiltInCheckpoint:
        """One of `BUILT_IN`. Only Mid has CFG-Zero*."""
        variant = BUILT_IN[name]
        return cls(Path(name), variant, variant == "mid", TransformerConfig())


@dataclass(frozen=True)
class Refused:
    """A candidate that cannot run, and why."""

    candidate: Candidate
    reason: str
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Plan:
    """All sensible candidates for some ranks: those that fit, the fastest first, and the others."""

    fitting: tuple[Prediction, ...]
    refused: tuple[Refused, ...]


def make_plan(
    workload: Workload, hardware: Hardware, ranks: int, smallest: int, given: Mapping[str, int | bool] | None = None
) -> Plan:
    """Predict every sensible layout of `ranks` ranks. `smallest` is the noisy tokens of the smallest stage.

    `given` keeps degrees (by the names of `Degrees`), `shard_weights` or `decoders` at a value.
    """
    fitting: list[Prediction] = []
    refused: list[Refused] = []
    limits = {
        "guidance": workload.is_guided,
        "heads": workload.config.num_attention_heads,
        "smallest_tokens": smallest,
        "vae_rows": workload.latent_size[0],
    }
    told: set[Degrees] = set()
    for candidate in candidates(workload, ranks, (given or {}).get("decoders")):
        if any(_value(candidate, name) != value for name, value in (given or {}).items()):
            continue
        degrees = candidate.layout.degrees
        core = Degrees(degrees.cfg, degrees.ring, degrees.ulysses)
        if core in told:
            continue
        try:
            degrees.check(degrees.world, **limits)
        except ValueError as error:
            refused.append(Refused(Candidate(Layout(core), candidate.decoders), str(error).partition(";")[0]))
            told.add(core)
            continue
        prediction = predict(workload, candidate, hardware)
        if prediction.memory_bytes > hardware.memory_bytes:
            largest = max(prediction.memory, key=lambda name: prediction.memory[name])
            reason = (
                f"memory: {prediction.memory_bytes / 1e9:.1f} GB of {hardware.memory_bytes / 1e9:.1f} GB, "
                f"{prediction.memory[largest] / 1e9:.1f} GB of them {largest}"
            )
            refused.append(Refused(candidate, reason, prediction.memory_bytes))
        else:
            fitting.append(prediction)
    fitting.sort(key=lambda each: (-each.fps, each.latency, each.sent_bytes, each.memory_bytes))
    return Plan(tuple(fitting), tuple(refused))


def candidates(workload: Workload, ranks: int, decoders: int | None = None) -> Iterator[Candidate]:
    """Every way to divide the ranks; possible or not as far as cfg, ring and ulysses go.

    Decoders beside the ranks that denoise are powers of two, up to half of all, where their number is not given. The
    VAE is split over as many ranks as it can be, or not at all. Feed-forward layers are split over 2, 4, 8, or all
    ranks of a sequence group, or not.
    """
    powers = [2**power for power in range(ranks.bit_length()) if 2 * 2**power <= ranks]
    for count in [0, *powers] if decoders is None else [decoders]:
        for degrees in _divided(ranks - count):
            sequence = degrees.sequence
            vae = max(d for d in _divisors(sequence) if d <= workload.latent_size[0])
            for split_vae in (1,) if count else sorted({1, vae}):
                folded = partial(Degrees, degrees.cfg, degrees.ring, degrees.ulysses, vae=split_vae)
                for ffn_tp in sorted({d for d in (1, 2, 4, 8, sequence) if sequence % d == 0}):
                    if ffn_tp <= workload.config.ffn_dim:
                        yield Candidate(Layout(folded(ffn_tp=ffn_tp)), count)
                if degrees.world > 1:
                    yield Candidate(Layout(folded(), shard_weights=True), count)


def _divided(ranks: int) -> Iterator[Degrees]:
    for cfg in (1, 2):
        if ranks % cfg == 0:
            for ulysses in _divisors(ranks // cfg):
                yield Degrees(cfg, ranks // cfg // ulysses, ulysses)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _value(candidate: Candidate, name: str) -> int | bool:
    if name == "decoders":
        return candidate.decoders
    if name == "shard_weights":
        return candidate.layout.shard_weights
    return getattr(candidate.layout.degrees, name)


def choose(
    checkpoint: Checkpoint,
    requests: list[Request],
    dtype: Any,
    ranks: int,
    device_type: str,
    given: Mapping[str, int | bool] | None = None,
) -> Layout:
    """The layout of `ranks` ranks in one process group that is modelled fastest here and fits in memory.

    It must do for every one of the resolved `requests`; the largest decides. Raises `RequestError` where none fits.
    """
    hardware = detect_hardware(device_type, ranks)
    return best_prediction(checkpoint, requests, dtype, ranks, hardware, given).candidate.layout


def best_prediction(
    checkpoint: Checkpoint,
    requests: Sequence[Request],
    dtype: Any,
    ranks: int,
    hardware: Hardware,
    given: Mapping[str, int | bool] | None = None,
    decoders: int = 0,
) -> Prediction:
    """As `choose`, for any hardware, and with the figures. `decoders` ranks beside the others do nothing but decode."""
    request = max(requests, key=lambda each: each.height * each.width)
    workload = Workload.of(checkpoint, request, dtype, *part_configs(checkpoint))
    smallest = min(smallest_tokens(each, checkpoint) for each in requests)
    rows = min(each.latent_size[0] for each in requests)
    plan = make_plan(workload, hardware, ranks + decoders, smallest, {**(given or {}), "decoders": decoders})
    for prediction in plan.fitting:
        if prediction.candidate.layout.degrees.vae <= rows:
            return prediction
    needs = [refused.memory_bytes for refused in plan.refused if refused.memory_bytes is not None]
    if not needs:
        why = plan.refused[0].reason if plan.refused else "none goes with the flags given"
        raise RequestError(f"--layout auto: no layout of {ranks} rank(s) is possible: {why}; leave out --layout auto")
    raise RequestError(
        f"--layout auto: no layout of {ranks} rank(s) fits in the {hardware.memory_bytes / 1e9:.1f} GB of "
        f"{hardware.name} that each may use (the least needs {min(needs) / 1e9:.1f} GB a rank, as modelled); use more "
        "ranks or a smaller size, or give the layout yourself"
    )


def part_configs(checkpoint: Checkpoint) -> tuple[VaeConfig, TextEncoderConfig]:
    """Sizes of the VAE and the text encoder, from their JSON files. Raises `RequestError`."""
    if isinstance(checkpoint, BuiltInCheckpoint):
        return VaeConfig(), TextEncoderConfig()
    return _part(VaeConfig, checkpoint, "vae"), _part(TextEncoderConfig, checkpoint, "text_encoder")


def _part(kind: Any, checkpoint: Checkpoint, part: str) -> Any:
    path = checkpoint.folder / part / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in kind.__dataclass_fields__ if name in values}
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"--model {checkpoint.folder}: {part}/config.json cannot be read: {error}") from None


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        usage="python -m helios_cp.plan [--gpus N] [--hardware NAME] [flag ...]",
        description="Predict FPS, memory and messages of every sensible layout of the ranks. All times are modelled.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--model",
        default="14b",
        metavar="MODEL",
        help="14b (Distilled), 14b-mid or 14b-base, built in; or what helios_cp.generate takes (default: 14b)",
    )
    defaults = Request()
    add("--height", type=whole_number, metavar="PIXELS", help=f"of the video (default: {defaults.height})")
    add("--width", type=whole_number, metavar="PIXELS", help=f"of the video (default: {defaults.width})")
    add("--num-frames", type=whole_number, metavar="N", help=f"of the video (default: {defaults.num_frames})")
    add("--pyramid-steps", type=whole_number, nargs="+", metavar="N", help="steps of each stage; Mid, Distilled")
    add("--num-inference-steps", type=whole_number, metavar="N", help="Base only (default: 50)")
    add("--gpus", type=whole_number, default=1, metavar="N", help="GPUs of a node, or processes on a CPU (default: 1)")
    add("--nodes", type=whole_number, default=1, metavar="N", help="nodes of as many GPUs each (default: 1)")
    add(
        "--hardware",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(PROFILES)}, or a JSON file of a calibration (default: h100)",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the transformer (default: bfloat16)")
    add("--json", action="store_true", default=False, help="print JSON, with the counts that the times rest on")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 where no layout fits, 2 for bad input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except RequestError as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    import torch

    from helios_cp import plan_report

    for flag, value in (("--gpus", arguments.gpus), ("--nodes", arguments.nodes)):
        if not 1 <= value <= MAX_RANKS:
            raise RequestError(f"{flag} {value}: allowed is 1 to {MAX_RANKS}")
    ranks = arguments.gpus * arguments.nodes
    if ranks > MAX_RANKS:
        raise RequestError(f"--gpus {arguments.gpus} --nodes {arguments.nodes}: at most {MAX_RANKS} ranks are allowed")
    hardware = replace(find_hardware(arguments.hardware), gpus_per_node=arguments.gpus)
    checkpoint = find_checkpoint(arguments.model)
    request = Request(prompt=("any",), **given_fields(arguments)).resolve(checkpoint)
    dtype = getattr(torch, arguments.dtype)
    workload = Workload.of(checkpoint, request, dtype, *part_configs(checkpoint))
    plan = make_plan(workload, hardware, ranks, smallest_tokens(request, checkpoint))
    subject = plan_report.Subject(arguments.model, request, workload, hardware, ranks, arguments.nodes)
    if arguments.json:
        print(json.dumps(plan_report.to_json(plan, subject), indent=2))
    else:
        plan_report.print_tables(plan, subject)
    return 0 if plan.fitting else 1


def find_checkpoint(model: str) -> Checkpoint:
    """A built-in config, or a checkpoint as `helios_cp.generate` finds it. Raises `RequestError`."""
    if model in BUILT_IN:
        return BuiltInCheckpoint.named(model)
    from helios_cp.weights import resolve

    cache = os.environ.get("HELIOS_CP_CACHE")
    return resolve(model, Path(cache) if cache else None, weights=())


if __name__ == "__main__":
    sys.exit(main())
