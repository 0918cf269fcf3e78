"""A video on disk, and as OpenAI's clients see it.

video.json    this record, written whole at every change; a folder without one is what is left of a deleted video
start.png     what it starts from, if anything; or start.mp4
run/          its run folder (see `helios_cp.generate.run_folder`), until it is completed
video.mp4     when it is completed
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helios_cp.config.json_types import from_json
from helios_cp.config.request import Request
from helios_cp.files.whole_files import write_json

FORMAT = 1
FILE = "video.json"
STATUSES = ("queued", "in_progress", "completed", "failed")


@dataclass
class Record:
    """Times are seconds since 1970. `error` has `code` and `message`."""

    id: str
    folder: Path
    request: Request
    model: str
    created_at: float
    status: str = "queued"
    completed_at: float | None = None
    expires_at: float | None = None
    error: dict[str, str] | None = None
    chunks: int = field(default=0, compare=False)

    @property
    def file(self) -> Path:
        return self.folder / "video.mp4"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def is_finished(self) -> bool:
        return self.status in ("completed", "failed")

    def save(self) -> None:
        """Whole or as it was before, whenever the process is killed."""
        values = {name: value for name, value in vars(self).items() if name not in ("folder", "chunks")}
        write_json(self.folder / FILE, {"format": FORMAT, **values, "request": asdict(self.request)})

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Raises `ValueError` for what is no record."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT or values["status"] not in STATUSES:
                raise ValueError("it is of another version")
            values["request"] = from_json(Request, values["request"])
            return cls(folder=folder, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / FILE}: this is no record of a video: {error}") from None

    def told(self) -> dict[str, Any]:
        """OpenAI's object. `seconds` are those of the video, which is made in whole chunks."""
        request = self.request
        frames = request.num_chunks * request.frames_per_chunk
        return {
            "id": self.id,
            "object": "video",
            "created_at": int(self.created_at),
            "completed_at": _whole(self.completed_at),
            "expires_at": _whole(self.expires_at),
            "status": self.status,
            "progress": 100 if self.status == "completed" else min(99, 100 * self.chunks // request.num_chunks),
            "model": self.model,
            "prompt": request.prompt[0],
            "seconds": f"{frames / request.fps:g}",
            "size": f"{request.width}x{request.height}",
            "error": self.error,
            "remixed_from_video_id": None,
            "num_frames": frames,
            "fps": request.fps,
            "seed": request.seeds[0],
        }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
