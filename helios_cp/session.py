"""From parsed flags to a checked session: everything that can be refused is refused here, before weights are loaded."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from helios_cp.arguments import absolute_media, flag_of, given_fields
from helios_cp.config import Checkpoint, Request, RequestError
from helios_cp.device import dtype_name, pick_device, pick_dtype
from helios_cp.files import check_file_target
from helios_cp.jobs import INTERPOLATE_TIME, Job, read_prompt_file, single_job
from helios_cp.media import check_image, check_video
from helios_cp.run_folder import Run, RunFolder
from helios_cp.weights import resolve

DEFAULT_MODEL = "tiny-distilled"


@dataclass(frozen=True)
class Session:
    """A checked call: nothing in it can be refused any more."""

    checkpoint: Checkpoint
    model: str
    device: torch.device
    dtype: torch.dtype
    jobs: tuple[Job, ...]
    run_folders: tuple[Path | None, ...]
    save_latents: Path | None
    report: Path | None


def check(arguments: argparse.Namespace, cache: Path | None) -> Session:
    """Everything that can be found wrong before weights are loaded. Raises `RequestError`; writes nothing."""
    given = absolute_media(given_fields(arguments))
    resume, prompt_file = getattr(arguments, "resume", None), getattr(arguments, "prompt_file", None)
    checkpoint_dir = getattr(arguments, "checkpoint_dir", None)
    if resume is not None and checkpoint_dir is not None:
        raise RequestError("--resume and --checkpoint-dir: give one of the two; --resume goes on saving in its folder")
    saved = RunFolder.open(resume).run if resume is not None and prompt_file is None else None
    model = getattr(arguments, "model", saved.model if saved else DEFAULT_MODEL)
    checkpoint = resolve(model, cache)
    device = pick_device(arguments.device)
    dtype = pick_dtype(getattr(arguments, "dtype", saved.dtype if saved else "auto"), device)

    if prompt_file is not None:
        jobs = _jobs_of_file(arguments, prompt_file, Request(**given))
    elif saved is not None:
        output = getattr(arguments, "output", None)
        outputs = single_job(saved.request, output).output if output else tuple(map(Path, saved.output))
        jobs = [Job(replace(saved.request, **given), outputs)]
    else:
        jobs = [single_job(Request(**given), getattr(arguments, "output", Path("out.mp4")))]
    jobs = [Job(job.request.resolve(checkpoint), job.output) for job in jobs]
    for job in jobs:
        _check_media(job.request)
        for output in job.output:
            check_file_target("--output", output, ".mp4")
    folders = [_run_folder(job, resume or checkpoint_dir, prompt_file is not None) for job in jobs]
    for job, folder in zip(jobs, folders, strict=True):
        if folder is not None and (folder / "run.json").exists() and resume is not None:
            _check_same_run(RunFolder.open(folder).run, Run(job.request, model, dtype_name(dtype), ()), folder)
        elif folder is not None:
            RunFolder.check_new(folder)
            check_file_target("--checkpoint-dir", folder / "run.json", ".json")
    targets = {"save_latents": ".safetensors", "report": ".json"}
    for name, suffix in targets.items():
        if hasattr(arguments, name):
            check_file_target(f"--{name.replace('_', '-')}", getattr(arguments, name), suffix)
    if prompt_file is not None and hasattr(arguments, "save_latents"):
        raise RequestError("--save-latents: not with --prompt-file; --checkpoint-dir keeps the latents of every video")
    return Session(
        checkpoint,
        model,
        device,
        dtype,
        tuple(jobs),
        tuple(folders),
        getattr(arguments, "save_latents", None),
        getattr(arguments, "report", None),
    )


def _jobs_of_file(arguments: argparse.Namespace, prompt_file: Path, request: Request) -> list[Job]:
    """The jobs of a prompt file whose videos do not exist yet."""
    jobs = read_prompt_file(
        prompt_file,
        request,
        getattr(arguments, "output", Path("outputs")),
        image_folder=getattr(arguments, "image_folder", None),
        chunks=getattr(arguments, "interpolate_time", INTERPOLATE_TIME),
    )
    for job in jobs:
        if job.output[0].exists():
            print(f"{job.output[0]} exists, skipped", file=sys.stderr)
    return [job for job in jobs if not job.output[0].exists()]


def _check_media(request: Request) -> None:
    if request.image is not None:
        check_image(request.image)
    if request.video is not None:
        check_video(request.video, request.frames_per_chunk)


def _run_folder(job: Job, folder: Path | None, many: bool) -> Path | None:
    return folder / job.output[0].stem if folder is not None and many else folder


def _check_same_run(saved: Run, asked: Run, folder: Path) -> None:
    """Raises `RequestError` when a flag given now differs from the saved run's: the video could not be the same."""
    fields = [(flag_of(name), saved.request, asked.request, name) for name in Request.__dataclass_fields__]
    fields += [("--model", saved, asked, "model"), ("--dtype", saved, asked, "dtype")]
    for flag, before, now, name in fields:
        was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now:
            raise RequestError(f"--resume {folder}: it was started with {flag} {was}, not {is_now}; leave {flag} out")
