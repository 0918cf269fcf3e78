"""From the flags of `helios_cp.plan` to its tables."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.paths import cache_folder
from helios_cp.config.request import Request
from helios_cp.plan import report
from helios_cp.plan.configs import BUILT_IN, BuiltInCheckpoint
from helios_cp.plan.flags import PlanCall
from helios_cp.plan.machines import find_hardware
from helios_cp.plan.search import make_plan
from helios_cp.plan.workload import Workload


def run(call: PlanCall) -> int:
    """Print the plan. Returns 0, or 1 where no layout fits. Raises `RequestError`."""
    hardware = replace(find_hardware(call.hardware), gpus_per_node=call.gpus)
    checkpoint = find_checkpoint(call.model)
    request = Request(prompt=("any",), **call.request).resolve(checkpoint)
    workload = Workload.of(checkpoint, request, getattr(torch, call.dtype))
    plan = make_plan([workload], hardware, call.ranks)
    subject = report.Subject(call, request, workload, hardware)
    if call.json:
        print(json.dumps(report.to_json(plan, subject), indent=2))
    else:
        report.print_tables(plan, subject)
    return 0 if plan.fitting else 1


def find_checkpoint(model: str) -> Checkpoint:
    """A built-in config, or a checkpoint as `helios_cp.generate` finds it. Raises `RequestError`."""
    if model in BUILT_IN:
        return BuiltInCheckpoint.named(model)
    from helios_cp.weights.load import resolve  # which imports all of torch's libraries of models

    return resolve(model, cache_folder(os.environ), weights=())
