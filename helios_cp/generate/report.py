"""How a call went, for its user: figures, where videos stand, what failed and what to do."""

from __future__ import annotations

import errno
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import helios_cp
from helios_cp.config.console import say
from helios_cp.config.request import Request
from helios_cp.device.device import device_name, dtype_name
from helios_cp.device.memory import peak_memory
from helios_cp.files.whole_files import write_json
from helios_cp.generate.check import Session
from helios_cp.generate.prompt_files import Job
from helios_cp.generate.run_folder import versions
from helios_cp.model.codec import vae_settings

CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EFBIG: "raise the limit on the size of files, or write elsewhere",
    errno.EROFS: "make it writable, or write elsewhere",
    errno.EACCES: "make it writable, or write elsewhere",
}


@dataclass
class Report:
    """Collects the seconds of each chunk of one of a session's videos and works out the FPS.

    `error` is what ended it. `playable` is where its chunks can be played, if not in its output.
    """

    session: Session
    job: Job
    resumed_from_chunk: int = 0
    peak_bytes: int = 0
    vae_group: int | None = None
    error: str | None = None
    playable: str | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, index: int, seconds: float, stages: dict[str, float], skipped: Sequence[int] = ()) -> None:
        """A chunk is finished: `seconds` of wall time after the one before, or after the start.

        `stages` are what its parts took. Decoding and writing can pass beside the stages of the next chunk, and then
        the parts are more than the whole. `skipped` as in `Chunk`.
        """
        entry = {"index": index, "seconds": seconds, "stages": dict(stages)}
        if self.session.execution.block_cache is not None:
            entry["skipped_steps"] = list(skipped)
        self.chunks.append(entry)

    @property
    def request(self) -> Request:
        return self.job.request

    @property
    def frames(self) -> int:
        """Frames made by this call, of all videos of the batch."""
        return len(self.chunks) * self.request.frames_per_chunk * self.request.batch_size

    @property
    def finished_chunks(self) -> int:
        """Chunks that the video has, those of earlier calls among them."""
        return self.resumed_from_chunk + len(self.chunks)

    def fps(self, *, skip_first: bool = False) -> float | None:
        """Frames per second of wall time, from the prompt to the encoded video; `None` if nothing was timed."""
        chunks = self.chunks[1:] if skip_first else self.chunks
        seconds = sum(chunk["seconds"] for chunk in chunks)
        frames = len(chunks) * self.request.frames_per_chunk * self.request.batch_size
        return frames / seconds if seconds else None

    def stage_seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for chunk in self.chunks:
            total.update(chunk["stages"])
        return dict(total)

    def to_json(self) -> dict[str, Any]:
        """`frames`, times and FPS are of this call alone. Seconds of stages overlap, those of chunks do not."""
        session = self.session
        return {
            "version": helios_cp.__version__,
            "versions": {"python": platform.python_version(), **versions()},
            "model": str(session.checkpoint.folder),
            "variant": session.checkpoint.variant,
            "random_weights": session.checkpoint.random_weights,
            "dtype": dtype_name(session.dtype),
            "device": device_name(session.device),
            "layout": {"ranks": session.layout.degrees.world, **asdict(session.layout)},
            "execution": asdict(session.execution),
            "vae": {**vae_settings(session.execution, session.device), "latent_frames_together": self.vae_group},
            "seed": list(self.request.seeds),
            "request": asdict(self.request),
            "output": [str(path) for path in self.job.output],
            "remarks": session.remarks,
            "complete": self.finished_chunks == self.request.num_chunks,
            "error": self.error,
            "finished_chunks": self.finished_chunks,
            "resumed_from_chunk": self.resumed_from_chunk,
            "frames": self.frames,
            "fps": self.fps(),
            "fps_without_first_chunk": self.fps(skip_first=True),
            "stage_seconds": self.stage_seconds(),
            "chunks": self.chunks,
            "peak_memory_bytes": max(self.peak_bytes, peak_memory(session.device)),
        }

    def summary(self) -> str:
        """The figures for a reader, one a line."""
        rate, rest = self.fps(), self.fps(skip_first=True)
        if rate is None:
            return "all chunks were finished before; only the MP4 was written again"
        steady = f" ({rest:.2f} without the first chunk)" if rest is not None else ""
        lines = [f"{self.frames} frames at {rate:.2f} FPS{steady}"]
        total = sum(chunk["seconds"] for chunk in self.chunks)
        for name, seconds in self.stage_seconds().items():
            lines.append(f"  {name:<12} {seconds:8.2f} s  {100 * seconds / total:5.1f} %")
        lines.append(f"  of {total:.2f} s in all; decode and write can pass beside other stages")
        if self.session.execution.block_cache is not None:
            skipped = sum(len(chunk["skipped_steps"]) for chunk in self.chunks)
            lines.append(f"  {skipped} steps of {len(self.chunks)} chunks left blocks out")
        return "\n".join(lines)

    def standing(self) -> str:
        """Where the video stands and how to go on."""
        line = f"{self.job.names}: {self.finished_chunks} of {self.request.num_chunks} chunks are finished"
        if self.finished_chunks:
            place = "" if self.playable is None else f" in {self.playable}"
            line += f" and can be played{place}, {self.finished_chunks * self.request.frames_per_chunk} frames"
        again = "the same call starts over; with --checkpoint-dir DIR it could go on"
        if self.session.checkpoint_dir is not None:
            again = "the same call goes on"
            if not self.session.has_prompt_file:
                again = f"go on with --resume {self.session.checkpoint_dir}, or with the same call"
        elif self.session.has_prompt_file:
            again = "the same call makes it again, and those after it"
        return f"{line}; {again}"

    def raise_with_standing(self, error: Exception) -> NoReturn:
        """Raise an error again, with what is finished of the video and how to go on."""
        if isinstance(error, OSError):
            raise OSError(f"{_reason(error)}; {self.standing()}") from error
        say(f"failed; {self.standing()}")
        raise error


def write_report(session: Session, reports: Sequence[Report]) -> bool:
    """Write `--report`, if it is asked for. Returns `False`, and says why, where it cannot be written."""
    if session.report is None or not (reports or session.has_prompt_file):
        return True
    values = [report.to_json() for report in reports]
    try:
        write_json(session.report, values if session.has_prompt_file else values[0])
    except OSError as error:
        say(f"--report: it could not be written: {_reason(error)}")
        return False
    return True


def tell_failures(reports: Sequence[Report], videos: int) -> int:
    """List the videos that failed; returns the exit code, 1 if there are any."""
    failed = [f"{report.job.names}: {report.error}" for report in reports if report.error is not None]
    if failed:
        say("\n  ".join([f"{len(failed)} of {videos} videos failed:", *failed]))
    return 1 if failed else 0


def _reason(error: OSError) -> str:
    """One line: what the system said, of which file, and the cure."""
    line = error.strerror or " ".join(str(error).split())
    if error.filename is not None:
        line += f": {str(error.filename)!r}"
    return f"{line}; {CURES[error.errno]}" if error.errno in CURES else line
