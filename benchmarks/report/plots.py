"""The report's pictures. What is measured is drawn with filled markers and named so, what is modelled dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.models.communication_formulas import Tokens, predict_ours, predict_theirs
from benchmarks.report.data import STAGES, Chunk, Result
from benchmarks.report.modelled import PUBLISHED, PUBLISHED_FPS, Line
from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.plan.forward_cost import Traffic
from parallel.mesh import Degrees

DPI = 130
COLORS = {"h100": "tab:blue", "h200": "tab:orange"}
OTHER_COLOR = "tab:purple"  # of a card that was calibrated
STAGE = "stage 3"
COMPUTED_RANKS = (2, 4, 8, 16)


def draw_fps(
    lines: Sequence[Line], chunks: Sequence[Chunk], path: Path, projected: Mapping[str, dict[int, float]] | None = None
) -> None:
    """FPS against GPUs: modelled lines, what full-size runs on GPUs measured, and the published figure.

    `projected` are FPS by steps and GPUs from one rank's part of the work, timed alone.
    """
    figure, axes = _figure("FPS of Helios-14B Distilled, 384 × 640", (9.5, 6.0))
    for line in lines:
        style = "--" if line.steps == (1, 1, 1) else ":"
        gpus, fps = list(line.points), [each.fps for each in line.points.values()]
        color = COLORS.get(line.hardware, OTHER_COLOR)
        axes.plot(gpus, fps, style, marker="o", markerfacecolor="white", color=color, label=line.label)
    measured = [chunk for chunk in chunks if chunk.is_full_size_on_gpus]
    kinds = dict.fromkeys((chunk.result.where, chunk.setting, chunk.program) for chunk in measured)
    for index, (where, setting, program) in enumerate(kinds):
        mine = [c for c in measured if (c.result.where, c.setting, c.program) == (where, setting, program)]
        mine.sort(key=lambda chunk: chunk.ranks)
        label = f"measured, {where}, {setting}, {program}"
        ranks, fps = [chunk.ranks for chunk in mine], [chunk.fps for chunk in mine]
        axes.plot(ranks, fps, "-", marker="sD^vPX*"[index % 7], markersize=9, color=f"C{2 + index}", label=label)
    for steps, points in (projected or {}).items():
        label = f"one rank's share measured, messages left out, {steps}"
        axes.plot(*_columns(points), "-.", marker="d", markerfacecolor="white", color="tab:green", label=label)
    if not measured:
        note = "No FPS of a GPU has been measured yet:\nevery line here is modelled."
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.6"}
        axes.text(0.98, 0.03, note, transform=axes.transAxes, ha="right", va="bottom", bbox=box)
    axes.axhline(PUBLISHED_FPS, color="black", linewidth=1)
    last = max(gpus for line in lines for gpus in line.points)
    axes.text(last, PUBLISHED_FPS, f"{PUBLISHED_FPS} FPS: {PUBLISHED}", fontsize=9, ha="right", va="bottom")
    gpus = sorted({count for line in lines for count in line.points} | {chunk.ranks for chunk in measured})
    _ranks_axis(axes, gpus, "GPUs (up to 8 a node)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("frames a second, end to end without text (log scale)")
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=DPI)


def draw_stages(lines: Sequence[Line], chunks: Sequence[Chunk], path: Path) -> None:
    """Where the time of a chunk goes: as measured by program, and as modelled by GPUs."""
    modelled = [(line, gpus, each) for line in lines for gpus, each in line.points.items() if line.hardware == "h100"]
    rows = max(len(chunks), 1), len(modelled)
    figure = Figure(figsize=(10.5, 2.2 + 0.42 * sum(rows)), layout="constrained")
    figure.suptitle("Time of one chunk of 33 frames by stage")
    above, below = figure.subplots(2, 1, height_ratios=(rows[0] + 1, rows[1] + 1))
    above.set_title("measured", loc="left")
    bars = {
        f"{chunk.program}, {chunk.setting}, {chunk.model}\n{chunk.ranks} × {chunk.result.where}": chunk.stages
        for chunk in chunks
    }
    if bars:
        shares = {name: {stage: s / sum(parts.values()) for stage, s in parts.items()} for name, parts in bars.items()}
        totals = [f"{sum(parts.values()):.3g} s" for parts in bars.values()]
        _stacked(above, shares, totals, STAGES, "share of a chunk's seconds, measured")
    else:
        above.text(0.5, 0.5, "no result of benchmarks.fps yet", ha="center", va="center")
        above.set_axis_off()
    below.set_title("modelled: H100, Helios-14B Distilled, 384 × 640, the fastest layout that fits", loc="left")
    names = tuple(dict.fromkeys(name for _, _, each in modelled for name in each.seconds))
    bars = {f"{gpus} GPU{'s' * (gpus > 1)}, {list(line.steps)}": dict(each.seconds) for line, gpus, each in modelled}
    totals = [f"{sum(parts.values()):.3g} s" for parts in bars.values()]
    _stacked(below, bars, totals, names, "seconds, modelled; VAE: what denoising waits for where others decode")
    figure.savefig(path, dpi=DPI)


def _stacked(
    axes: Axes, bars: dict[str, dict[str, float]], ends: Sequence[str], names: Sequence[str], label: str
) -> None:
    """Bars of parts `names` end to end, each with a text at its end."""
    for index, parts in enumerate(bars.values()):
        left = 0.0
        for number, name in enumerate(names):
            value = parts.get(name, 0.0)
            axes.barh(
                index, value, left=left, color=f"C{number}", edgecolor="white", label=name if index == 0 else None
            )
            left += value
        axes.text(left, index, f" {ends[index]}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def draw_bytes(result: Result | None, path: Path) -> None:
    """Bytes that a rank sends in a forward against the ranks: counted in runs, and by formula beyond."""
    figure, axes = _figure("Bytes that a rank sends in one forward of Helios-14B, 384 × 640, stage 3, bf16", (9.5, 5.5))
    config, tokens = TransformerConfig(), Tokens.of((384, 640), 3)

    def gigabytes(traffic: dict[str, Traffic], ranks: int) -> float:
        return sum(each.sent_bytes for each in traffic.values()) / ranks / 1e9

    computed = {
        "diffusers": {p: gigabytes(predict_theirs(config, tokens, p), p) for p in COMPUTED_RANKS},
        "ring": {p: gigabytes(predict_ours(config, tokens, Degrees(ring=p)), p) for p in COMPUTED_RANKS},
        "unified, ring 2": {
            p: gigabytes(predict_ours(config, tokens, Degrees(ring=2, ulysses=p // 2)), p) for p in COMPUTED_RANKS[1:]
        },
        "Ulysses": {
            p: gigabytes(predict_ours(config, tokens, Degrees(ulysses=p)), p)
            for p in COMPUTED_RANKS
            if config.num_attention_heads % p == 0
        },
    }
    counted = counted_gigabytes(result) if result else {}
    for index, (name, points) in enumerate(computed.items()):
        axes.plot(*_columns(points), "--", color=f"C{index}", linewidth=1, label=f"{name}, by formula")
        if name in counted:
            axes.plot(*_columns(counted[name]), "o", color=f"C{index}", label=f"{name}, counted in runs of gloo ranks")
    if not counted:
        axes.text(0.02, 0.02, "nothing counted yet: all by formula", transform=axes.transAxes)
    _ranks_axis(axes, COMPUTED_RANKS, "ranks P that share the sequence")
    axes.set_ylim(0, 17)
    axes.set_ylabel("GB (1e9 bytes) a rank and forward")
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=DPI)


def counted_gigabytes(result: Result) -> dict[str, dict[int, float]]:
    """By algorithm and ranks, of a result of `benchmarks.communication`; unified ones are grids with a ring of 2."""
    found: dict[str, dict[int, float]] = {}
    for ranks_name, plans in result.results["counts"].items():
        ranks = int(ranks_name.split()[0])
        if ranks not in COMPUTED_RANKS:  # the formulas are of heads that divide
            continue
        names = {
            "diffusers": "diffusers",
            f"Ulysses {ranks}": "Ulysses",
            f"ring {ranks}": "ring",
            f"Ulysses {ranks // 2} × ring 2": "unified, ring 2",
        }
        for plan, stages in plans.items():
            if plan in names and "mean_bytes" in stages[STAGE]:
                found.setdefault(names[plan], {})[ranks] = stages[STAGE]["mean_bytes"] / 1e9
    return found


def _columns(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _figure(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ranks_axis(axes: Axes, ranks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ranks), [str(count) for count in ranks])
    axes.minorticks_off()
    axes.set_xlabel(label)
