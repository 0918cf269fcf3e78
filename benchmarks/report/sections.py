"""The report's sections, as Markdown, each from the result of one benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measuring.markdown import table
from benchmarks.report.data import Chunk, Result
from benchmarks.report.deviation_section import deviation_section
from benchmarks.report.modelled import PUBLISHED, PUBLISHED_FPS, Line, layout_name
from benchmarks.report.quality_section import quality_section

LONGEST, MOST_ROWS = 60, 80  # of a value's text, and of the rows of a result without a section of its own


def fps_section(lines: Sequence[Line], chunks: Sequence[Chunk], projected: Mapping[str, dict[int, float]]) -> str:
    """FPS against GPUs: every row says whether it is measured, modelled or published."""
    rows = [[PUBLISHED, "published", "1", f"{PUBLISHED_FPS:g}", ""]]
    for chunk in chunks:
        if chunk.is_full_size_on_gpus:
            what = f"{chunk.result.where}, {list(chunk.steps)}, {chunk.program}"
            rows.append([what, "**measured**", str(chunk.ranks), f"{chunk.fps:.2f}", ""])
    for steps, points in projected.items():
        for gpus, fps in points.items():
            rows.append([f"{steps}, messages left out", "from one rank's measured share", str(gpus), f"{fps:.1f}", ""])
    for line in lines:
        for gpus, each in line.points.items():
            name = f"{line.title}, {list(line.steps)}"
            rows.append([name, "modelled", str(gpus), f"{each.fps:.1f}", layout_name(each)])
    return table(("Helios-14B Distilled, 384 × 640", "", "GPUs", "FPS", "layout"), rows, texts=2)


def chunks_section(chunks: Sequence[Chunk]) -> str:
    """Every measured program, whatever its size; the limit is all its FLOPs at the GEMM rate of the same run."""
    rows = [
        [
            f"{chunk.program}, {chunk.setting}, {chunk.model}, {chunk.size[0]} × {chunk.size[1]}",
            f"{chunk.ranks} of {chunk.result.where}",
            f"{chunk.fps:.3g} ({chunk.quartiles[0]:.3g}–{chunk.quartiles[1]:.3g})",
            f"{chunk.limit:.3g}",
            *(f"{seconds:.3f}" for seconds in chunk.stages.values()),
            chunk.result.name,
        ]
        for chunk in chunks
    ]
    headings = ("program", "ranks", "FPS (quartiles)", "limit", *(f"{stage} s" for stage in chunks[0].stages), "file")
    return table(headings, rows)


def forward_section(result: Result) -> str:
    counts = result.results["counts"]
    rows = []
    for stage, theirs in counts["diffusers"].items():
        for name, values in (("diffusers", theirs), ("ours", counts["ours"][stage])):
            figures = (
                f"{values['flops'] / 1e12:.1f}",
                f"{values['elementwise_bytes'] / 1e9:.0f}",
                f"{values['matrix_bytes'] / 1e9:.0f}",
                str(values["kernels"]),
            )
            rows.append([f"{stage}, {name}", *figures])
    text = "Counted, one forward of Helios-14B at 384 × 640:\n\n"
    text += table(("", "TFLOP", "GB elementwise", "GB matrix", "kernels"), rows)
    times = result.results.get("times")
    if times:
        config = times["config"]
        text += (
            f"\n\nMeasured on {result.where}, {times['dtype']}, {config['num_layers']} blocks of "
            f"{config['num_attention_heads']} heads × {config['attention_head_dim']}:\n\n"
        )
        stages = {name: value for name, value in times.items() if name.startswith("stage ")}
        text += table(
            ("", "diffusers ms", "ours ms", "times faster", "difference, of the range"),
            [
                [
                    name,
                    f"{1e3 * each['diffusers']['median']:.1f}",
                    f"{1e3 * each['ours']['median']:.1f}",
                    _spread(each["speedup"]),
                    f"{each['difference']:.1e}",
                ]
                for name, each in stages.items()
            ],
        )
    return text


def communication_section(result: Result) -> str:
    rows = []
    for ranks, plans in result.results["counts"].items():
        peers = [stages["stage 3"] for name, stages in plans.items() if name.startswith("diffusers")]
        theirs = next((peer["mean_bytes"] for peer in peers if "fails" not in peer), None)
        for name, stages in plans.items():
            values = [stages[f"stage {stage}"] for stage in (1, 2, 3)]
            sent = ["fails" if "fails" in each else f"{each['mean_bytes'] / 1e6:.0f}" for each in values]
            is_compared = theirs is not None and not name.startswith("diffusers") and "CFG" not in name
            share = f"1/{theirs / values[2]['mean_bytes']:.2f}" if is_compared else ""
            rows.append([f"{ranks}, {name}", *sent, share, str(values[2].get("calls", ""))])
    text = "Counted in runs of gloo ranks, MB that a rank sends in a forward of Helios-14B:\n\n"
    return text + table(("", "stage 1", "stage 2", "stage 3", "of diffusers", "collectives"), rows)


def scaling_section(result: Result) -> str:
    case, parts = result.results["case"], []
    config = case["config"]
    parts.append(
        f"Measured on {result.where}: one forward, {result.results['dtype']}, {config['num_layers']} blocks of "
        f"{config['num_attention_heads']} heads × {config['attention_head_dim']}, "
        f"{case['size'][0]} × {case['size'][1]}."
    )
    for ranks, world in result.results["worlds"].items():
        rows = [
            [
                name,
                f"{timing['median']:.3f}",
                _percent(world["efficiency"].get(name)),
                _percent(world["of_limit"].get(name)),
                f"{world['sent_bytes'][name] / 1e6:.1f}" if world["collectives"][name] else "",
                _mebibytes(world["peak_bytes"].get(name)),
            ]
            for name, timing in world["times"].items()
        ]
        headings = (f"{ranks} ranks", "median s", "efficiency", "of limit", "MB sent by a rank", "peak MiB of rank 0")
        parts.append(table(headings, rows))
        goals = {what: each for what, each in world["speedups"].items() if each["goal"] is not None}
        if goals:
            parts.append(
                table(
                    ("times faster", "median (quartiles)", "goal"),
                    [
                        [what, _spread(each), f"{each['goal']:g}, {'met' if each['met'] else 'missed'}"]
                        for what, each in goals.items()
                    ],
                )
            )
    return "\n\n".join(parts)


def attention_section(result: Result) -> str:
    rows = [
        [
            f"{each['engine']}{' with log-sum-exp' if each['log-sum-exp'] else ''}, {each['dtype']}",
            str(each["tokens"]),
            str(each["heads"]),
            f"{1e3 * each['median']:.3g}",
            f"{each['flops_per_second'] / 1e9:.4g}",
            f"{each['share_of_product']:.0%}",
        ]
        for each in result.results["engines"]
    ]
    text = f"Measured on {result.where}. Product: a large matrix product in the same dtype and run.\n\n"
    text += table(("engine", "tokens", "heads", "median ms", "GFLOP/s", "of product"), rows)
    shared = result.results["shared"]
    if shared["programs"]:
        text += f"\n\n{shared['tokens']} tokens and {shared['heads']} heads, {shared['dtype']}, shared among ranks:\n\n"
        headings = ("", "median ms", "GFLOP/s", "of products", "of shares without messages", "× 1 rank", "MB", "calls")
        text += table(
            headings,
            [
                [
                    name,
                    f"{1e3 * each['median']:.3g}",
                    f"{each['flops_per_second'] / 1e9:.4g}",
                    f"{each['share_of_products']:.0%}",
                    f"{each['share_of_limit_without_messages']:.0%}",
                    f"{each['speedup_over_1_rank']:.2f}",
                    f"{each['sent_bytes'] / 1e6:.1f}" if each["collectives"] else "",
                    str(each["collectives"] or ""),
                ]
                for name, each in shared["programs"].items()
            ],
        )
    return text


def decode_section(result: Result) -> str:
    case = result.results["case"]
    text = (
        f"Measured on {result.where}: one chunk of {result.results['frames']} frames of {case['size'][0]} × "
        f"{case['size'][1]}, VAE of width {case['vae']['base_dim']}, {result.results['flops'] / 1e12:.3g} TFLOP. "
        "Limit: all of them as fast as those of large convolutions or products, whichever are faster.\n\n"
    )
    headings = ("", "median s", "frames/s", "limit", "of it", "× diffusers", "levels of grey from diffusers", "MB")
    return text + table(
        headings,
        [
            [
                name,
                f"{each['median']:.3g}",
                f"{each['frames_per_second']:.3g}",
                f"{each['limit_frames_per_second']:.3g}",
                f"{each['share_of_limit']:.0%}",
                f"{each['speedup_over_diffusers']:.2f}",
                f"{each['levels_from_diffusers']}; from its fp32 {each['levels_from_diffusers_fp32']}",
                f"{each['sent_bytes'] / 1e6:.1f}" if each["collectives"] else "",
            ]
            for name, each in result.results["programs"].items()
        ],
    )


def pipeline_section(result: Result) -> str:
    found = result.results["overlap"]
    rows = [[f"{stage}, alone", f"{seconds:.3f} s"] for stage, seconds in found["seconds_alone"].items()]
    rows += [
        ["pipelined, a chunk", f"{found['pipelined_seconds']:.3f} s"],
        ["over the slower stage", f"{found['pipelined_to_slower_stage']:.2f}"],
        ["one chunk after the other", f"{found['serial_seconds']:.3f} s"],
        ["Ray's own time a chunk", f"{1e3 * result.results['overhead']['median_seconds']:.1f} ms"],
    ]
    memory = result.results["memory"]
    rows += [
        [f"memory of the {name} over {memory['requests']} requests", f"{share:+.1%}"]
        for name, share in memory["growth"].items()
    ]
    return f"Measured on {result.where}.\n\n" + table(("", "median"), rows)


def live_section(result: Result) -> str:
    shown, added = result.results["prompt_to_picture"], result.results["added"]
    rows = [
        [f"from a prompt to {what}", f"{shown[name]['p50']:.2f} s", f"{shown[name]['p95']:.2f} s"]
        for name, what in (
            ("to_receipt", "its receipt"),
            ("to_bytes", "the first chunk that shows it"),
            ("to_frame", "that chunk's first frame, decoded"),
            ("to_screen", "the screen"),
        )
    ]
    making, ready = shown["chunk_seconds_of_making"], added["from_ready_to_received"]
    rows.append(["making a chunk", f"{making['p50']:.2f} s", f"{making['p95']:.2f} s"])
    rows.append(["server and network, a chunk", f"{1e3 * ready['p50']:.1f} ms", f"{1e3 * ready['p95']:.1f} ms"])
    rows += [
        [
            f"{row['viewers']} viewers: until a chunk is with them",
            f"{1e3 * row['late']['p50']:.0f} ms",
            f"{1e3 * row['late']['p95']:.0f} ms; {row['memory_a_viewer'] / 1e3:.0f} kB of the server's memory each",
        ]
        for row in result.results["viewers"]
    ]
    if load := result.results.get("load"):
        rows.append(
            [
                f"{load['viewers']} viewers and {load['queued']} sessions that wait, for {load['chunks']} chunks",
                f"at most {load['most_behind']} behind",
                f"the server's memory: {load['memory_begin'] / 1e6:.1f} MB, then {load['memory_end'] / 1e6:.1f} MB",
            ]
        )
    media, change = shown["chunk_seconds_of_media"], 1e3 * added["difference"]
    text = f"Measured on {result.where}. A chunk is {media:.2f} s of media, and is made while the one before plays. "
    text += f"Beside the pipeline alone, in turns, the server changes the seconds a chunk by {change:+.1f} ms.\n\n"
    return text + table(("", "p50", "p95"), rows)


def calibration_section(result: Result) -> str:
    """The profile that `helios_cp.plan --hardware FILE` predicts with."""
    found = result.results
    rows = [
        [name, found["sources"].get(name, ""), f"{value:.4g}" if isinstance(value, float) else str(value)]
        for name, value in found["numbers"].items()
    ]
    text = f"Of one rank on {result.where}; rates in FLOP/s and bytes/s, times in seconds.\n\n"
    return text + table((found["name"], "how it is known", ""), rows, texts=2)


def validation_section(result: Result) -> str:
    found = result.results
    rows = [
        [
            f"{each['case']}, {_layout(each['layout'])}",
            f"{each['modelled_seconds']:.3f}",
            f"{each['measured_seconds']:.3f}",
            f"{each['error']:+.1%}",
        ]
        for each in found["comparisons"]
    ]
    text = f"Seconds of a chunk on {result.where}. Median error {found['median_error']:.1%} (goal: at most "
    text += f"{found['goal']:.0%}, {'met' if found['met'] else 'missed'}) over {len(rows)} layouts.\n\n"
    return text + table(("model and layout", "modelled s", "measured s", "error"), rows)


def _layout(layout: dict[str, Any]) -> str:
    """The degrees above 1, and sharded weights."""
    names = [f"{axis.replace('_', '-')} {degree}" for axis, degree in layout["degrees"].items() if degree > 1]
    return ", ".join([*names, *(["shard-weights"] if layout["shard_weights"] else [])]) or "1 rank"


SECTIONS: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "forward": ("One forward", forward_section),
    "communication": ("Bytes that ranks send", communication_section),
    "scaling": ("Scaling", scaling_section),
    "attention": ("Attention", attention_section),
    "decode": ("Decoding", decode_section),
    "quality": ("How good videos look", quality_section),
    "deviation": ("What flags of speed and memory change", deviation_section),
    "pipeline": ("The chunk pipeline on Ray", pipeline_section),
    "live": ("The live server", live_section),
    "calibration": ("Calibration", calibration_section),
    "validate_plan": ("The planner against the clock", validation_section),
}
"""By the name of the result: a title, and what makes the section. Others are listed figure by figure."""


def any_section(result: Result) -> str:
    """A result that has no section of its own: its figures and short texts, lists left out."""
    rows = [[name, value] for name, value in _figures(result.results) if len(value) <= LONGEST]
    return f"Measured on {result.where}.\n\n" + table(("", "value"), rows[:MOST_ROWS])


def _figures(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number, truth value and text, with the names that lead to it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}, ")
        elif isinstance(value, int | float | str):
            yield prefix + name, f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _spread(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f}–{high:.2f})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"
