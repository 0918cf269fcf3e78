"""Programs that make the same video in turns, and what their times come to: FPS, FLOP/s, and how far from the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fps.cost import ChunkFlops, Limit
from benchmarks.fps.videos import ChunkTimes, Video
from benchmarks.measuring import device_rates as fps_rates
from benchmarks.measuring.timing import Ratio, Timing, ratio
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.device.device import dtype_name

PEER = "diffusers"
TOLERANCE = 1e-3
"""Of the latents' root mean square; in fp32 programs of equal work differ by rounding, some 1e-6."""


@dataclass(frozen=True)
class Setting:
    """Steps that a checkpoint of one variant is run with."""

    variant: str
    pyramid_steps: tuple[int, ...] | None = None
    steps: int | None = None


SETTINGS: Mapping[str, Setting] = {
    "distilled-111": Setting("distilled", (1, 1, 1)),
    "distilled-222": Setting("distilled", (2, 2, 2)),
    "mid": Setting("mid", (20, 20, 20)),
    "base": Setting("base", steps=50),
}


def setting_request(name: str, checkpoint: Checkpoint, **fields: Any) -> Request:
    """The resolved request of a setting. Raises `RequestError` for a setting that is not the checkpoint's."""
    setting = SETTINGS[name]
    if setting.variant != checkpoint.variant:
        own = [each for each, other in SETTINGS.items() if other.variant == checkpoint.variant]
        raise RequestError(
            f"--settings {name}: this is Helios-{checkpoint.variant.capitalize()}; allowed are {', '.join(own)}"
        )
    steps = {"pyramid_num_inference_steps_list": setting.pyramid_steps, "num_inference_steps": setting.steps}
    return Request(prompt=("random embeddings",), **steps, **fields).resolve(checkpoint)


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products on one rank, measured in the same run: in the transformer's dtype and in the VAE's."""

    transformer: float
    vae: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, execution: Execution | None = None) -> Rates:
        """An fp32 VAE convolves on TF32 tensor cores unless the execution says otherwise."""
        execution = execution or Execution()
        with fps_rates.tf32(execution.tf32):
            vae = fps_rates.matmul_rate(device, getattr(torch, execution.vae_dtype))
        with fps_rates.tf32(False):
            return cls(fps_rates.matmul_rate(device, dtype), vae)


@dataclass
class Measured:
    """Of one program: the first chunk, which is cold, with its latents; the chunks after the warm-up; stages alone."""

    first: ChunkTimes | None = None
    chunks: list[ChunkTimes] = field(default_factory=list)
    latents: Tensor | None = None
    alone: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def timing(self, stage: str | None = None) -> Timing:
        """Of whole chunks, or of one stage of each."""
        return Timing(tuple(each.total if stage is None else each.stages[stage] for each in self.chunks))


def take_turns(
    videos: Mapping[str, Callable[[], Video]],
    chunks: int,
    warmup: int,
    after_turn: Callable[[dict[str, Measured]], None] = lambda measured: None,
    keeps_going: bool = False,
    with_alone: bool = True,
) -> dict[str, Measured]:
    """A chunk of each video in turn, forth and back so that none is always second: the first, `warmup`, then `chunks`.

    A video is begun at its first turn, and must have a chunk more than is taken of it (`frames_for`). `after_turn` sees
    what there is so far. With `keeps_going` a program that raises is left with its error, and the others go on.
    """
    measured = {name: Measured() for name in videos}
    running: dict[str, Video] = {}
    try:
        for turn in range(1 + warmup + chunks):
            order = list(videos) if turn % 2 == 0 else list(reversed(videos))
            for name in order:
                found = measured[name]
                if found.error is not None:
                    continue
                try:
                    if name not in running:
                        running[name] = videos[name]()
                    times, latents = running[name].chunk()
                except Exception as error:
                    if not keeps_going:
                        raise
                    found.error = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                    if name in running:  # it makes room for the others
                        running.pop(name).close()
                    continue
                if turn == 0:
                    found.first, found.latents = times, latents.float().cpu()
                elif turn > warmup:
                    found.chunks.append(times)
            after_turn(measured)
        for name, video in running.items():
            if with_alone and measured[name].error is None:
                measured[name].alone = video.alone()
    finally:
        for video in running.values():
            video.close()
    return measured


def frames_for(chunks: int, warmup: int) -> int:
    """Frames of a video of which `take_turns` can take so many chunks."""
    return 33 * (2 + warmup + chunks)


def difference(latents: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, in units of the reference's."""
    return ((latents - reference).square().mean().sqrt() / reference.square().mean().sqrt()).item()


def check_equal(measured: Mapping[str, Measured], exact: list[str]) -> None:
    """Raises `RuntimeError` unless the programs named make diffusers' video: else the work is not equal."""
    reference = measured[PEER].latents
    for name in exact:
        if not (off := difference(measured[name].latents, reference)) <= TOLERANCE:
            raise RuntimeError(f"{name}: latents differ from diffusers' by {off:.1e} of their size; this is other work")


@dataclass(frozen=True)
class Subject:
    """What is timed and what it costs: everything in a result beside the times."""

    request: Request
    flops: ChunkFlops
    rates: Rates
    layout: Layout

    @property
    def limit(self) -> Limit:
        return Limit.of(
            self.flops,
            self.request.frames_per_chunk,
            self.rates.transformer,
            self.rates.vae,
            self.layout.degrees,
        )

    def fps(self, timing: Timing) -> float:
        return self.request.frames_per_chunk / timing.median

    def program_json(self, name: str, found: Measured) -> dict[str, Any]:
        """Figures of one program; only what there is when it is not done."""
        values: dict[str, Any] = {"first_chunk": None if found.first is None else asdict(found.first)}
        if found.error is not None:
            values["error"] = found.error
        if len(found.chunks) < 2:
            return values
        total, degrees = found.timing(), self.layout.degrees
        low, high = total.quartiles
        frames = self.request.frames_per_chunk
        medians = {stage: found.timing(stage).median for stage in found.chunks[0].stages}
        decode = found.alone.get("decode", medians.get("decode"))
        made = Timing(tuple(each.made for each in found.chunks))
        flops = self.flops.peer_denoise if name == PEER else self.flops.denoise
        rates = {
            "denoise": flops / medians["denoise"] / degrees.world,
            "decode": self.flops.decode / decode / degrees.vae if decode else None,
        }
        limits = {"denoise": self.rates.transformer, "decode": self.rates.vae}
        return {
            **values,
            "fps": self.fps(total),
            "fps_quartiles": [frames / high, frames / low],
            "fps_without_mp4": self.fps(made),
            "chunk_seconds": total.to_json(),
            "stage_seconds": medians,
            "alone_seconds": found.alone,
            "flops_per_second_and_rank": rates,
            "percent_of_gemm_rate": {stage: rate and 100 * rate / limits[stage] for stage, rate in rates.items()},
            "chunks": [asdict(each) for each in found.chunks],
        }

    def to_json(self, measured: Mapping[str, Measured]) -> dict[str, Any]:
        """One setting's part of a result."""
        programs = {name: self.program_json(name, found) for name, found in measured.items()}
        done = {name: found for name, found in measured.items() if len(found.chunks) > 1}
        first = next(iter(done), None)
        speedups = {
            f"{name} over {first}": asdict(_speedup(done[first], found))
            for name, found in done.items()
            if name != first
        }
        known = {name: found.latents for name, found in measured.items() if found.latents is not None}
        reference = next(iter(known), None)
        return {
            "steps": self.request.pyramid_num_inference_steps_list or [self.request.num_inference_steps],
            "size": [self.request.height, self.request.width],
            "frames_per_chunk": self.request.frames_per_chunk,
            "flops": self.flops.to_json(),
            "limit": self.limit.to_json(),
            "programs": programs,
            "speedups": speedups,
            f"differences from {reference}": {
                name: difference(latents, known[reference]) for name, latents in known.items() if name != reference
            },
        }


def _speedup(slow: Measured, fast: Measured) -> Ratio:
    """Turn by turn, as far as both have come."""
    turns = min(len(slow.chunks), len(fast.chunks))
    return ratio(Timing(slow.timing().seconds[:turns]), Timing(fast.timing().seconds[:turns]))


def describe(
    model: str, device: torch.device, dtype: torch.dtype, layout: Layout, rates: Rates, is_random: bool
) -> dict[str, Any]:
    """What the settings of one run have in common."""
    return {
        "model": model,
        "random_weights": is_random,
        "device": device.type,
        "dtype": dtype_name(dtype),
        "layout": asdict(layout),
        "ranks": layout.degrees.world,
        "gemm_flops_per_second": asdict(rates),
    }


def video_path(folder: Path, setting: str, program: str) -> Path:
    return folder / f"{setting} {program}.mp4"
