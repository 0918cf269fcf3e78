"""A process that decodes one file of a stranger's, within limits, and says what it is in one line of JSON.

python -m launchers.serve.uploads.child '{"file": ..., "kind": "picture", ...}'

A picture is written again as a PNG of its pixels alone, so that nothing else of the file goes on. What it imports is
kept small, and holds no torch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

from helios_cp.config.errors import RequestError
from launchers.serve.uploads.kinds import PICTURE

MEMORY_BYTES = 3 * 2**30
"""Of addresses: a picture of `MOST_PIXELS` takes half of that."""
CPU_SECONDS = 60
WRITTEN_BYTES = 2**29
MOST_PIXELS = 2**26
"""Of a picture, and of a frame: 8192 x 8192. Telephones take 50 million."""

FORMATS = ("mov", "matroska")
"""Of FFmpeg, by the first of their names."""


@dataclass(frozen=True)
class Task:
    """`output` is where a picture's PNG goes. `least_frames` and `most_frames` bound a clip."""

    file: str
    kind: str
    output: str
    least_frames: int
    most_frames: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def look(task: Task) -> dict[str, Any]:
    """What the parent is told. Raises `RequestError`, and whatever else broken files lead to."""
    return _picture(task) if task.kind == PICTURE else _clip(task)


def _picture(task: Task) -> dict[str, Any]:
    from PIL import Image

    from helios_cp.files.pictures import open_picture

    with Image.open(task.file, formats=("PNG", "JPEG", "WEBP")) as header:  # reads no pixels yet
        _check_size(header.width, header.height)
    picture = open_picture(task.file)
    picture.save(task.output, "PNG", compress_level=1)
    return {"width": picture.width, "height": picture.height, "frames": 1, "fps": None}


def _clip(task: Task) -> dict[str, Any]:
    import av

    from helios_cp.files.clips import decoded

    with av.open(task.file, metadata_errors="ignore") as container:
        if container.format.name.split(",")[0] not in FORMATS:
            raise RequestError(f"clip: FFmpeg takes it for {container.format.name}")
        rate = next((stream.average_rate for stream in container.streams.video), None)
        for stream in container.streams.video:
            _check_size(stream.codec_context.width, stream.codec_context.height)
    count, size = 0, (0, 0)
    for frame in decoded(task.file):
        count, size = count + 1, (frame.width, frame.height)
        _check_size(*size)
        if count > task.most_frames:
            raise RequestError(f"clip: it has more than {task.most_frames} frames, which is what is allowed")
    if count < task.least_frames:
        raise RequestError(f"clip: it has {count} frame(s), {task.least_frames} are needed; give a longer one")
    return {"width": size[0], "height": size[1], "frames": count, "fps": None if rate is None else float(rate)}


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise RequestError(f"size: it has {width} x {height} pixels; at most {MOST_PIXELS} are allowed")


def limit() -> None:
    """Before the file is touched: what it may take of the machine."""
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, WRITTEN_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    os.nice(5)


def main(text: str) -> int:
    limit()
    try:
        told = look(Task(**json.loads(text)))
    except RequestError as error:
        told = {"refused": str(error).partition(": ")[2].partition("; give")[0]}
    except MemoryError:
        told = {"refused": "it takes too much memory to decode"}
    except Exception as error:  # what libraries raise for broken files differs from format to format
        told = {"refused": f"it cannot be decoded ({type(error).__name__})"}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
