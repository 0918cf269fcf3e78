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
from dataclasses import replace
from pathlib import Path

import torch

from helios_cp.config.arguments import OneLineParser, given_fields, whole_number
from helios_cp.config.checkpoint import DTYPES, Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import smallest_tokens
from helios_cp.config.request import Request
from helios_cp.plan import report as plan_report
from helios_cp.plan.configs import BUILT_IN, BuiltInCheckpoint, part_configs
from helios_cp.plan.detect import PROFILES, find_hardware
from helios_cp.plan.search import best_prediction, choose, make_plan
from helios_cp.plan.workload import Workload

__all__ = ["BuiltInCheckpoint", "best_prediction", "choose", "find_checkpoint", "main", "make_plan", "part_configs"]

PROGRAM = "helios_cp.plan"
MAX_RANKS = 1024
TOP = 12
"""Layouts that are printed."""


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
    add(
        "--height",
        type=whole_number,
        metavar="PIXELS",
        help=f"a multiple of 64, of 16 for 14b-base (default: {defaults.height})",
    )
    add("--width", type=whole_number, metavar="PIXELS", help=f"likewise (default: {defaults.width})")
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
    add("--top", type=whole_number, default=TOP, metavar="N", help=f"layouts to print (default: {TOP}); --json has all")
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
    for flag, value in (("--gpus", arguments.gpus), ("--nodes", arguments.nodes)):
        if not 1 <= value <= MAX_RANKS:
            raise RequestError(f"{flag} {value}: allowed is 1 to {MAX_RANKS}")
    if arguments.top < 1:
        raise RequestError(f"--top {arguments.top}: 1 or more is allowed")
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
        plan_report.print_tables(plan, subject, arguments.top)
    return 0 if plan.fitting else 1


def find_checkpoint(model: str) -> Checkpoint:
    """A built-in config, or a checkpoint as `helios_cp.generate` finds it. Raises `RequestError`."""
    if model in BUILT_IN:
        return BuiltInCheckpoint.named(model)
    from helios_cp.weights.load import resolve

    cache = os.environ.get("HELIOS_CP_CACHE")
    return resolve(model, Path(cache) if cache else None, weights=())


if __name__ == "__main__":
    sys.exit(main())
