"""The flags of `helios_cp.plan`. Nothing here imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helios_cp.config.arguments import add_flags, check_bounds, flag, given
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import MACHINES
from helios_cp.config.paths import user_path_text
from helios_cp.config.request import Request

MAX_RANKS = 1024
REQUEST_FIELDS = ("height", "width", "num_frames", "num_inference_steps", "pyramid_num_inference_steps_list")


@dataclass(frozen=True)
class PlanCall:
    """What a user typed. `request` holds the fields of `Request` that are given."""

    model: str = flag(
        "14b", "14b (Distilled), 14b-mid or 14b-base, built in; or what helios_cp.generate takes", "MODEL"
    )
    gpus: int = flag(1, "GPUs of a node, or processes on a CPU", "N", least=1, most=MAX_RANKS)
    nodes: int = flag(1, "nodes of as many GPUs each", "N", least=1, most=MAX_RANKS)
    hardware: str = flag(
        "h100", f"{', '.join(MACHINES)}, or a JSON file of a calibration", "NAME", parse=user_path_text
    )
    dtype: str = flag("bfloat16", "of the transformer", choices=DTYPES)
    top: int = flag(12, "layouts to print; --json has all", "N", least=1)
    json: bool = flag(False, "print JSON, with the counts that the times rest on")
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add_flags(parser, cls)
        add_flags(parser, Request, REQUEST_FIELDS)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> PlanCall:
        """Raises `RequestError` for values that no call may have."""
        call = cls(**given(cls, arguments), request=given(Request, arguments))
        check_bounds(call)
        if call.ranks > MAX_RANKS:
            raise RequestError(f"--gpus {call.gpus} --nodes {call.nodes}: at most {MAX_RANKS} ranks are allowed")
        return call
