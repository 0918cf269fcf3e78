"""The plot of `benchmarks.quality`: what each case has right, and its seams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LABELS = ("ground", "time", "subject", "colour", "direction")
DPI = 110


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG. The line is at 1, where a border changes no more than what is inside."""
    from matplotlib.figure import Figure

    rows = {"rendered clips": {"accuracy": results["judge"], **results["judge"]}, **results["cases"]}
    rows = {name: found for name, found in rows.items() if "refused" not in found}
    figure = Figure(figsize=(11, 1.5 + 0.42 * len(rows)), layout="constrained")
    shares, seams = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = np.arange(len(rows))[::-1]
    for index, label in enumerate(LABELS):
        values = [100 * found["accuracy"][label] for found in rows.values()]
        shares.barh(places + 0.32 - 0.16 * index, values, 0.15, label=label)
    shares.set_yticks(places, list(rows))
    shares.set_xlabel("% as asked")
    shares.legend(ncols=len(LABELS), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    seams.barh(places, [found["seam"] for found in rows.values()], 0.5, color="0.5")
    seams.axvline(1, color="black", linewidth=1)
    seams.set_xlabel("seam")
    for axes in (shares, seams):
        axes.grid(alpha=0.3, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI)
