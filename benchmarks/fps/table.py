"""The results of `benchmarks.fps` for a reader: a column for each program, and beside them the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

STAGES = ("denoise", "decode", "transfer", "encode")


def print_tables(results: dict[str, Any], notes: Sequence[str]) -> None:
    console = Console()
    for name, setting in results["settings"].items():
        console.print(table(results, name, setting))
    rates = results["gemm_flops_per_second"]
    own, vae = (f"{rates[part] / 1e12:.3g}" for part in ("transformer", "vae"))
    console.print(f"GEMM rate of one rank: {own} TFLOP/s, {vae} in the VAE's dtype")
    console.print(*notes, sep="\n", style="dim")


def table(results: dict[str, Any], name: str, setting: dict[str, Any]) -> Table:
    """Figures down, programs across."""
    (height, width), limit = setting["size"], setting["limit"]
    ranks = f"{results['ranks']} rank{'s' * (results['ranks'] > 1)} of {results['device']}"
    title = f"{name}: {results['model']}, {height} × {width}, {results['dtype']} on {ranks}"
    found = Table("", title=title, title_justify="left")
    programs = setting["programs"]
    for heading in (*programs, "limit at the GEMM rate"):
        found.add_column(heading, justify="right")
    limits = {
        "FPS": f"{limit['fps']:.3g}",
        "denoise s": f"{limit['denoise']:.3f}",
        "decode s": f"{limit['decode']:.3f}",
        "denoise TFLOP/s": f"{results['gemm_flops_per_second']['transformer'] / 1e12:.3g} (100 %)",
        "decode TFLOP/s": f"{results['gemm_flops_per_second']['vae'] / 1e12:.3g} (100 %)",
    }
    columns = [_figures(program, values, setting) for program, values in programs.items()]
    for row in dict.fromkeys(row for column in columns for row in column):
        found.add_row(row, *(column.get(row, "") for column in columns), limits.get(row, ""))
    return found


def _figures(program: str, values: dict[str, Any], setting: dict[str, Any]) -> dict[str, str]:
    """Text by row, of one program."""
    if "fps" not in values:
        return {"FPS": values.get("error", "not done")}
    low, high = values["fps_quartiles"]
    rows = {
        "FPS": f"{values['fps']:.3g}",
        "  quartiles": f"{low:.3g}–{high:.3g}",
        "  without the MP4": f"{values['fps_without_mp4']:.3g}",
        "first chunk s": f"{values['first_chunk']['total']:.2f}",
    }
    rows |= {
        f"{stage} s": f"{values['stage_seconds'][stage]:.3f}" for stage in STAGES if stage in values["stage_seconds"]
    }
    rows |= {f"{stage} s, alone": f"{seconds:.4f}" for stage, seconds in values["alone_seconds"].items()}
    for stage, rate in values["flops_per_second_and_rank"].items():
        if rate is not None:
            rows[f"{stage} TFLOP/s"] = f"{rate / 1e12:.3g} ({values['percent_of_gemm_rate'][stage]:.0f} %)"
    for what, speedup in setting["speedups"].items():
        if what.startswith(f"{program} over "):
            rows["times as fast"] = (
                f"{speedup['median']:.2f} ({speedup['quartiles'][0]:.2f}–{speedup['quartiles'][1]:.2f})"
            )
    return rows
