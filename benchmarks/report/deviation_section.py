"""The report's section on what the flags of speed and memory change in a video, from `benchmarks.deviation`."""

from __future__ import annotations

from typing import Any

from benchmarks.measuring.markdown import table
from benchmarks.report.data import Result

HEADINGS = (
    "flags",
    "FPS",
    "× none",
    "weights GB",
    "latents away",
    "frames away",
    "grey levels",
    "steps shortened",
)


def deviation_section(result: Result) -> str:
    """A table for each model that was measured."""
    parts = [
        f"Measured on {result.where}, one request with each. Away: the norm of the difference from the same request "
        "without flags over its norm; grey levels: of a pixel on average, of 255. Of random weights this tells how far "
        "rounding spreads and not how a video looks."
    ]
    for run in result.results["runs"]:
        weights = ", random weights" if run["random_weights"] else ""
        size, steps = " × ".join(map(str, run["size"])), list(run["steps"])
        parts.append(f"{run['model']}{weights}, {size}, {run['chunks']} chunk(s) of {steps} steps, {run['dtype']}:")
        plain = run["variants"][""]["fps"]
        parts.append(table(HEADINGS, [_row(name, found, plain) for name, found in run["variants"].items()]))
    return "\n\n".join(parts)


def _row(name: str, found: dict[str, Any], plain: float) -> list[str]:
    name = f"`{name}`" if name else "none"
    if "fps" not in found:
        ((how, why),) = found.items()
        return [f"{name}: {how}, {why}", *[""] * (len(HEADINGS) - 1)]
    away = found["deviation"]
    return [
        name,
        f"{found['fps']:.2f}",
        f"{found['fps'] / plain:.2f}",
        f"{found['transformer_bytes'] / 1e9:.3g}",
        f"{away['latents']:.1e}",
        f"{away['frames']:.1e}",
        f"{away['mean_grey_levels']:.2f}",
        f"{found['skipped_steps']} of {found['steps']}" if found["skipped_steps"] is not None else "",
    ]
