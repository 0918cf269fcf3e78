"""From parsed flags to a checked session: everything that can be refused is refused here, before weights are loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import torch

from helios_cp.config.arguments import as_typed, flag_name
from helios_cp.config.call import Call
from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution, Target
from helios_cp.config.layout import DEGREES, AskedLayout, Layout, segment_lengths
from helios_cp.config.ranks import Ranks
from helios_cp.config.refusals import check_call
from helios_cp.config.request import Request
from helios_cp.device.device import card_of_rank, device_name, dtype_name, pick_device, pick_dtype
from helios_cp.files.clips import check_video
from helios_cp.files.pictures import open_picture
from helios_cp.files.whole_files import check_file_target, check_folder_target
from helios_cp.generate.prompt_files import INTERPOLATE_TIME, Job, read_prompt_file, read_schedule_file, single_job
from helios_cp.generate.remarks import request_remarks
from helios_cp.generate.run_folder import MadeWith, Run, RunFolder, versions
from helios_cp.pipeline.world import pick_backend
from helios_cp.plan.choose import choose_layout, planning_hardware
from helios_cp.weights.check import check_execution, check_lora, with_stored_quantization
from helios_cp.weights.hub import HubId, snapshot_in
from helios_cp.weights.load import resolve
from helios_cp.weights.presets import PRESETS

DEFAULT_MODEL = "tiny-distilled"


@dataclass(frozen=True)
class Work:
    """What every rank of a job does, as rank 0 decides it and shares it as JSON.

    It says how a model is loaded, and the videos that may be made with it: none if every one is finished already.
    `dtype` is a name, and `backend` that of the communication.
    """

    model: str
    dtype: str
    layout: Layout
    backend: str
    execution: Execution
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Session:
    """A checked call: nothing in it can be refused any more.

    The run folders of `jobs` are below or equal to `checkpoint_dir`. `skipped` are the videos of a prompt file that
    exist already.
    """

    checkpoint: Checkpoint
    model: str
    device: torch.device
    dtype: torch.dtype
    layout: Layout
    backend: str
    execution: Execution
    jobs: tuple[Job, ...]
    skipped: tuple[Path, ...]
    checkpoint_dir: Path | None
    save_latents: Path | None
    report: Path | None
    has_prompt_file: bool
    made_with: MadeWith = field(default_factory=MadeWith)
    planned_for: str | None = None
    changes: tuple[str, ...] = ()

    @functools.cached_property
    def remarks(self) -> list[str]:
        """What to tell before work starts: what is random, planned, ignored, cut or changed."""
        random = (
            f"{self.model}: the weights are random, so the video is noise; "
            "--model BestWishYsh/Helios-Distilled gets the real ones"
        )
        planned = [] if self.planned_for is None else [self.layout.as_planned(self.planned_for)]
        of_requests = request_remarks([job.request for job in self.jobs], self.checkpoint)
        return [random] * self.checkpoint.random_weights + planned + of_requests + list(self.changes)

    @functools.cached_property
    def work(self) -> Work:
        """What all ranks need to know."""
        is_needed = any(
            job.folder is None
            or not RunFolder.is_run(job.folder)
            or RunFolder.open(job.folder).count() < job.request.num_chunks
            for job in self.jobs
        )
        requests = tuple(job.request for job in self.jobs) if is_needed else ()
        return Work(self.model, dtype_name(self.dtype), self.layout, self.backend, self.execution, requests)


def check(call: Call, cache: Path | None, ranks: Ranks | None = None, target: Target | None = None) -> Session:
    """Everything that can be found wrong before weights are loaded. Raises `RequestError`; writes nothing.

    With several ranks, rank 0 calls it. `cache` is where presets are kept. It checks first what needs no checkpoint,
    then what needs its configuration; of a hub id nothing else is downloaded. `target` is what does the work, where
    that is not the device given: a cluster's cards, seen from a machine without one.
    """
    ranks = ranks or Ranks()
    check_call(call)
    if call.prompt_schedule_file is not None:
        call = replace(call, request=read_schedule_file(call.prompt_schedule_file) | dict(call.request))
    resume, prompt_file = call.resume, call.prompt_file
    saved = RunFolder.open(resume).run if resume is not None and prompt_file is None else None
    model = absolute_model(call.model or (saved.model if saved else DEFAULT_MODEL))
    device = card_of_rank(pick_device(call.device), ranks.local_rank)
    backend = pick_backend(call.layout.backend, device, ranks)
    dtype = pick_dtype(call.dtype or (saved.dtype if saved else "auto"), device)
    execution = replace(saved.execution if saved else Execution(), **call.execution)
    if saved is not None:
        model = _with_commit(model, [saved])
        asked = Run(replace(saved.request, **call.request), model, dtype_name(dtype), (), execution)
        check_same_run(saved, asked, resume)

    jobs = _jobs(call, saved)
    for job in jobs:
        job.request.check()
    skipped = {job.output for job in jobs if prompt_file is not None and is_finished(job)}
    waiting = [job for job in jobs if job.output not in skipped]
    _check_files(call, execution, waiting)

    folders = [job.folder for job in waiting if job.folder is not None and RunFolder.is_run(job.folder)]
    runs = {folder: RunFolder.open(folder).run for folder in folders}
    model = _with_commit(model, runs.values())
    for folder, run in runs.items():
        check_same_run(run, replace(run, model=model, dtype=dtype_name(dtype)), folder)
    checkpoint = resolve(model, cache, weights=())
    model = checkpoint.source
    jobs = [replace(job, request=job.request.resolve(checkpoint)) for job in jobs]
    kept: list[str] = []
    for index, job in enumerate(jobs):
        if job.folder in runs:
            run = runs[job.folder]
            check_same_run(run, Run(job.request, model, dtype_name(dtype), (), execution), job.folder)
            now = RunFolder(job.folder, run).current(job.request)
            jobs[index] = replace(job, request=now)
            if now.num_frames > job.request.num_frames:
                kept.append(
                    f"run folder {job.folder}: {now.num_chunks} chunks are finished, more than --num-frames "
                    f"{job.request.num_frames} asks for; the video has them all"
                )
    requests = [job.request for job in jobs]
    waiting = [job for job in jobs if job.output not in skipped]
    planned = planning_hardware(call.layout, device.type, ranks.local_size)
    layout = choose_layout(
        with_saved_layout(call.layout, saved, ranks.size),
        checkpoint,
        requests,
        ranks.size,
        dtype,
        with_stored_quantization(checkpoint, execution),
        planned,
    )
    execution = check_execution(
        checkpoint,
        execution,
        device,
        dtype,
        layout,
        backend=backend if target is None else call.layout.backend or "nccl",
        sequences={lengths for request in requests for lengths in segment_lengths(request, checkpoint)},
        target=target,
    )
    check_lora(checkpoint, [job.request for job in waiting])
    made_with = MadeWith(layout, device_name(device) if target is None else None, versions())
    return Session(
        checkpoint=checkpoint,
        model=model,
        device=device,
        dtype=dtype,
        layout=layout,
        backend=backend,
        execution=execution,
        jobs=tuple(waiting),
        skipped=tuple(job.output[0] for job in jobs if job.output in skipped),
        checkpoint_dir=resume or call.checkpoint_dir,
        save_latents=call.save_latents,
        report=call.report,
        has_prompt_file=prompt_file is not None,
        made_with=made_with,
        planned_for=planned and planned.name,
        changes=(*_changes(runs, made_with), *kept),
    )


def absolute_model(model: str) -> str:
    """A folder by its absolute path, so that a run can be resumed from elsewhere, and a model's page by its hub id."""
    if model in PRESETS:
        return model
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):
        return os.path.abspath(snapshot_in(folder))
    return str(HubId.parse(model) or model)


def _with_commit(model: str, runs: Iterable[Run]) -> str:
    """The commit that a run was started with, where the same model is asked for without one."""
    return next((run.model for run in runs if run.model.startswith(f"{model}@")), model)


def with_saved_layout(asked: AskedLayout, saved: Run | None, ranks: int) -> AskedLayout:
    """What `--resume` takes over of the layout: attention, and the degrees where none is given and the ranks are as
    many as before."""
    layout = saved and saved.made_with.layout
    if layout is None:
        return asked
    asked = replace(asked, attention=asked.attention or layout.attention)
    if layout.degrees.world != ranks or asked.degrees or asked.is_auto:
        return asked
    shard = layout.shard_weights if asked.shard_weights is None else asked.shard_weights
    degrees = {field: getattr(layout.degrees, name) for field, name in DEGREES.items()}
    return replace(asked, shard_weights=shard, **degrees)


def _changes(runs: Mapping[Path, Run], now: MadeWith) -> list[str]:
    """A remark for each run that goes on with something else than it was begun with."""
    return [
        f"run folder {folder}: it was begun with {'; '.join(differences)}; what is made now can differ by rounding"
        for folder, run in runs.items()
        if (differences := run.made_with.differences(now))
    ]


def check_same_run(saved: Run, asked: Run, folder: Path) -> None:
    """Raises `RequestError` when a flag given now differs from the saved run's: the video could not be the same.

    A video may be made longer or shorter, as no chunk depends on how many there are.
    """
    fields = [("--model", saved.model, asked.model), ("--dtype", saved.dtype, asked.dtype)]
    for name in [each for each in Request.__dataclass_fields__ if each != "num_frames"]:
        fields.append((flag_name(Request, name), getattr(saved.request, name), getattr(asked.request, name)))
    before, now = saved.execution.bits(), asked.execution.bits()
    fields += [("--" + name.replace("_", "-"), before[name], now[name]) for name in before]
    for flag, before, now in fields:
        if before != now:
            raise RequestError(
                f"run folder {folder}: this run was started with {as_typed(flag, before)}, not with "
                f"{as_typed(flag, now)}; give it as it was, or give --checkpoint-dir another folder"
            )


def is_finished(job: Job) -> bool:
    """Whether a prompt file's video exists and is not to be made.

    One with fewer frames than asked for is what a stopped run left, and is made again. A file whose frames cannot be
    counted is not ours to replace.
    """
    output = job.output[0]
    if not os.path.lexists(output):
        return False
    try:
        with av.open(os.path.abspath(output)) as container:
            frames = container.streams.video[0].frames
    except (av.FFmpegError, OSError, IndexError):
        return True
    return frames == 0 or frames >= job.request.num_chunks * job.request.frames_per_chunk


def _jobs(call: Call, saved: Run | None) -> list[Job]:
    folder = call.resume or call.checkpoint_dir
    if call.prompt_file is not None:
        jobs = read_prompt_file(
            call.prompt_file,
            Request(**call.request),
            call.output or Path("outputs"),
            image_folder=call.image_folder,
            chunks=call.interpolate_time or INTERPOLATE_TIME,
        )
        return [replace(job, folder=folder and folder / job.output[0].stem) for job in jobs]
    if saved is None:
        job = single_job(Request(**call.request), call.output or Path("out.mp4"))
    else:
        request = replace(saved.request, num_frames=call.request.get("num_frames", saved.request.num_frames))
        job = single_job(request, call.output) if call.output else Job(request, tuple(map(Path, saved.output)))
    return [replace(job, folder=folder)]


def _check_files(call: Call, execution: Execution, jobs: list[Job]) -> None:
    """Whether what is to be read can be, and what is to be written has a place."""
    if call.save_latents is not None:
        check_file_target("--save-latents", call.save_latents, ".safetensors")
    if call.report is not None:
        check_file_target("--report", call.report, ".json")
    if execution.compile_cache is not None:
        check_folder_target("--compile-cache", execution.compile_cache)
    for image in sorted({job.request.image for job in jobs if job.request.image is not None}):
        open_picture(image)
    clips = {(job.request.video, job.request.frames_per_chunk) for job in jobs if job.request.video is not None}
    for video, frames in sorted(clips):
        check_video(video, frames)
    for job in jobs:
        for output in job.output:
            check_file_target("--output", output, ".mp4")
            for flag, source in (("--image", job.request.image), ("--video", job.request.video)):
                if source is not None and output.exists() and output.samefile(source):
                    raise RequestError(f"--output {output}: that is the {flag} to start from; give another name")
        if job.folder is not None:
            check_folder_target("--checkpoint-dir" if call.resume is None else "--resume", job.folder)
