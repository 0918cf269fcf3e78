"""From the flags of `helios_cp.plan` to its tables."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace

import torch

from helios_cp.config.arguments import given
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import smallest_tokens
from helios_cp.config.paths import cache_folder
from helios_cp.config.request import Request
from helios_cp.plan import report as plan_report
from helios_cp.plan.configs import BUILT_IN, BuiltInCheckpoint, part_configs
from helios_cp.plan.machines import find_hardware
from helios_cp.plan.search import make_plan
from helios_cp.plan.workload import Workload

MAX_RANKS = 1024


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Returns 0, or 1 where no layout fits. Raises `RequestError`."""
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
    request = Request(prompt=("any",), **given(Request, arguments)).resolve(checkpoint)
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
    from helios_cp.weights.load import resolve  # which imports all of torch's libraries of models

    return resolve(model, cache_folder(os.environ), weights=())
