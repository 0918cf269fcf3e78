"""The report's section on how good videos look, from `benchmarks.quality`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.measuring.markdown import table
from benchmarks.report.data import Result

LABELS = ("ground", "time", "subject", "colour", "direction")
HEADINGS = (
    "model, flags",
    "prompts",
    *(f"{label} %" for label in LABELS),
    "held out %",
    "seam",
    "motion",
    "PSNR dB",
    "SSIM",
    "frames",
)
DRIFTS = ("model, flags", "chunks", "colour away", "contrast left", "sharpness left", "subject %", "colour %", "seam")


def quality_section(result: Result) -> str:
    """A table of what videos show, and one of what becomes of long ones."""
    values = result.results
    rows = [("rendered clips", {"accuracy": values["judge"], **values["judge"]}), *_rows(values["cases"])]
    size = " × ".join(map(str, values["size"]))
    parts = [
        f"Measured on {result.where}: {values['prompts']} prompts, {values['held_out']} of them of combinations that "
        f"no training clip shows, {values['chunks']} chunks of {size}. A classifier says what a video shows; the first "
        "row is what it says of rendered clips of the same scenes. Seam: the change at a border of chunks over that "
        "inside them. Motion: the change from frame to frame, in grey levels. PSNR and SSIM: against the same model "
        "without flags.",
        table(HEADINGS, [_row(name, found) for name, found in rows]),
        _vae(values["vae"]),
    ]
    if values["drift"]:
        parts.append("The last chunk of a long video against its first; colour in grey levels:")
        rows = [
            [
                f"`{name}`",
                count,
                f"{found['colour']:.1f}",
                f"{found['contrast']:.2f}",
                f"{found['sharpness']:.2f}",
                f"{100 * found['named']['subject']:.0f}",
                f"{100 * found['named']['colour']:.0f}",
                "" if found["seam"] is None else f"{found['seam']:.2f}",
            ]
            for name, lengths in values["drift"].items()
            for count, found in lengths.items()
        ]
        parts.append(table(DRIFTS, rows))
    return "\n\n".join(parts)


def _vae(found: dict[str, Any]) -> str:
    return (
        f"The VAE alone, on {found['clips']} rendered clips of combinations that no training clip shows, each chunk "
        f"encoded and decoded: PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.3f}, seam {found['seam']:.2f} "
        f"(of the clips themselves {found['seam_rendered']:.2f})."
    )


def _rows(cases: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case, and of the exact run of a model also its first videos, which are those of the model's other cases."""
    for name, found in cases.items():
        yield f"`{name}`", found
        if "third" in found:
            yield f"`{name}`, the first of these", found["third"]


def _row(name: str, found: dict[str, Any]) -> list[str]:
    if "refused" in found:
        return [f"{name}: refused, {found['refused']}", *[""] * (len(HEADINGS) - 1)]
    held_out = found.get("accuracy_held_out")
    mean = "" if not held_out else f"{100 * sum(held_out.values()) / len(held_out):.0f}"
    figures = (found.get(key) for key in ("seam", "motion", "psnr", "ssim"))
    shares = [f"{100 * found['accuracy'][label]:.0f}" for label in LABELS]
    sheet = f"[frames]({found['sheet']})" if "sheet" in found else ""
    shown = ("" if figure is None else f"{figure:.2f}" for figure in figures)
    return [name, str(found.get("prompts", "")), *shares, mean, *shown, sheet]
