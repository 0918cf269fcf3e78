"""What the benchmarks have written: results by file, each with where it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.plan.hardware import MEASUREMENTS


@dataclass(frozen=True)
class Result:
    """One JSON file of a benchmark. `name` is that of the file without its suffix."""

    name: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any] | None
    command: str
    date: str
    results: dict[str, Any]

    @property
    def gpus(self) -> Sequence[str]:
        return self.machine.get("gpus", ())

    @property
    def where(self) -> str:
        """The machine in a few words: its first GPU, or its CPU."""
        if self.gpus:
            return f"{self.gpus[0]} ×{len(self.gpus)}" if len(self.gpus) > 1 else self.gpus[0]
        return f"{self.machine['cpu']}, {self.machine['cores']} cores"

    @property
    def revision(self) -> str:
        if self.commit is None:
            return "no checkout"
        return self.commit["hash"][:10] + (" with changes" if self.commit["dirty"] else "")


def read_results(folder: Path) -> tuple[dict[str, Result], list[str]]:
    """Every result of a folder by name, in order, and a line for each file that is none."""
    found, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and MEASUREMENTS in content:
                content = _calibration(content)
            fields = {field: content[field] for field in Result.__dataclass_fields__ if field != "name"}
            if not isinstance(fields["results"], dict) or not isinstance(fields["machine"], dict):
                raise TypeError("results and machine must be objects")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(f"{path.name} is no result of a benchmark ({type(error).__name__}: {error})")
            continue
        found[path.stem] = Result(path.stem, **fields)
    return found, problems


def _calibration(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile of `benchmarks.calibrate` in the shape of a result: its numbers, and where each comes from."""
    about, sources = profile[MEASUREMENTS], profile["sources"]
    numbers = {name: value for name, value in profile.items() if isinstance(value, int | float)}
    return {**about, "results": {"name": profile["name"], "numbers": numbers, "sources": sources}}


@dataclass(frozen=True)
class Chunk:
    """A program's steady chunk in a result of `benchmarks.fps` or one of its shape: medians."""

    result: Result
    setting: str
    program: str
    steps: tuple[int, ...]
    size: tuple[int, int]
    fps: float
    quartiles: tuple[float, float]
    limit: float
    seconds: float
    stages: dict[str, float]

    @property
    def ranks(self) -> int:
        return self.result.results["ranks"]

    @property
    def model(self) -> str:
        return self.result.results["model"]

    @property
    def is_full_size_on_gpus(self) -> bool:
        return bool(self.result.gpus) and self.model.startswith("14b") and self.size == (384, 640)


STAGES = ("denoise", "decode", "transfer", "encode")


def read_chunks(results: dict[str, Result]) -> list[Chunk]:
    """Every program that finished, of every result that has settings with programs in them."""
    found = []
    for result in results.values():
        settings = result.results.get("settings")
        if not isinstance(settings, dict) or "ranks" not in result.results:
            continue
        for name, setting in settings.items():
            for program, values in setting["programs"].items():
                if "fps" in values:
                    stages = {stage: values["stage_seconds"].get(stage, 0.0) for stage in STAGES}
                    found.append(
                        Chunk(
                            result,
                            name,
                            program,
                            tuple(setting["steps"]),
                            tuple(setting["size"]),
                            values["fps"],
                            tuple(values["fps_quartiles"]),
                            setting["limit"]["fps"],
                            values["chunk_seconds"]["median"],
                            stages,
                        )
                    )
    return found


def read_projected(results: dict[str, Result]) -> dict[str, dict[int, float]]:
    """FPS by steps and GPUs from one rank's part of the work, timed alone on a GPU, without messages."""
    shares = results["gpu_share"].results.get("shares", {}) if "gpu_share" in results else {}
    if not shares or not results["gpu_share"].gpus:
        return {}
    found: dict[str, dict[int, float]] = {}
    for ranks, values in shares.items():
        for steps, fps in values["fps_without_messages"].items():
            found.setdefault(steps, {})[int(ranks)] = fps
    return found
