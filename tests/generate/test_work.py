"""Unit: what rank 0 shares with the other ranks is the same when it has been JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from helios_cp.config.execution import Adapter, Execution
from helios_cp.config.json_types import from_json
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.check import Work
from parallel.mesh import Degrees

WORK = Work(
    "random-mid",
    "float32",
    Layout(Degrees(cfg=2, ring=2), "flash", True),
    "gloo",
    Execution(lora=(Adapter("/a", 0.5), Adapter("/b")), block_cache=0.1),
    (Request(prompt=("a", "b"), seed=(1, 2)), Request(prompt_schedule=(ScheduledPrompt("a", 2),), guidance_scale=4.0)),
)


def test_work_travels_as_json():
    assert from_json(Work, json.loads(json.dumps(asdict(WORK)))) == WORK


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": 3}, "dtype is 3"),
        ({"layout": {"degrees": {"rings": 2}}}, "rings is unknown"),
        ({"layout": {"degrees": {"ring": "two"}}}, "ring is 'two'"),
        ({"execution": {"lora": [{"path": "/a", "weight": "much"}]}}, "weight is 'much'"),
        ({"requests": [{"prompt": "a"}]}, "prompt is 'a'"),
        ({"requests": [{"prompt_schedule": [["a", 2]]}]}, "prompt_schedule is"),
        ({"more": 1}, "more is unknown"),
    ],
)
def test_other_names_and_types_are_found_at_any_depth(change, said):
    with pytest.raises(TypeError, match=said):
        from_json(Work, {**asdict(WORK), **change})
