"""Workloads of Helios-14B for tests of what is planned with them."""

from __future__ import annotations

import torch

from helios_cp.config.request import Request
from helios_cp.plan.workload import BuiltInCheckpoint, Workload


def workload(name: str = "14b", dtype: torch.dtype = torch.bfloat16, **fields) -> Workload:
    """Of a built-in model and the fields of a request."""
    checkpoint = BuiltInCheckpoint.named(name)
    request = Request(**{"prompt": ("a fox",), **fields}).resolve(checkpoint)
    return Workload.of(checkpoint, request, dtype)
