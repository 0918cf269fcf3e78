"""Takes pictures and clips in: bytes or a data URL, to a checked file in the folder of a session or a video."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.files.whole_files import replacing
from launchers.serve.problems import Refusal
from launchers.serve.uploads.child import Task
from launchers.serve.uploads.kinds import PICTURE, NotAllowedError, format_of

WALL_SECONDS = 120.0
"""For a file to be decoded, on a machine that may be busy; then its process is killed."""

AT_A_TIME = 2
"""Files that are decoded beside each other; more wait."""

MOST_FRAMES = 20_000


FORM = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
SHOWN = 24
"""Characters of a wrong one that are repeated in the answer."""


def content_of(url: str, most_bytes: int, field: str) -> bytes:
    """What a data URL (RFC 2397) holds. Raises `Refusal`; one that is too large is not decoded. No other address is
    read: a server fetches nothing for a stranger."""
    head = FORM.match(url)
    if head is None:
        raise Refusal(
            "invalid_request",
            f"{field} {url[:SHOWN]!r}: a data URL is allowed, such as data:image/png;base64,...; nothing is fetched",
            param=field,
        )
    text = url[head.end() :]
    if len(text) > 4 * -(-most_bytes // 3):
        raise too_large(field, most_bytes)
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise Refusal("invalid_request", f"{field}: this is no base64 ({reason})", param=field) from None
    if len(content) > most_bytes:
        raise too_large(field, most_bytes)
    return content


def too_large(field: str, most_bytes: int) -> Refusal:
    return Refusal("too_large", f"{field}: it is larger than {most_bytes} bytes, which is what is allowed", param=field)


@dataclass(frozen=True)
class Upload:
    """A file that is safe to open: `kind` is `PICTURE`, and the file a PNG; or `CLIP`. `fps` is the clip's own."""

    path: Path
    kind: str
    width: int
    height: int
    frames: int
    fps: float | None


class Uploads:
    """Checks files in the folder `scratch`, which is emptied here: a killed server may have left some there."""

    def __init__(self, scratch: Path, most_bytes: int, wall_seconds: float = WALL_SECONDS) -> None:
        self._scratch, self._most_bytes, self._wall_seconds = scratch, most_bytes, wall_seconds
        self._threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="upload")
        shutil.rmtree(scratch, ignore_errors=True)

    async def keep(
        self, given: bytes | str, folder: Path, field: str, kinds: tuple[str, ...], least_frames: int
    ) -> Upload:
        """Check what a client sent in `field`, a data URL where it is text, and put it in `folder` as `start.png` or
        `start.mp4`; the folder is made. Raises `Refusal`, and leaves nothing then, nor where it is cancelled."""
        checking = self._threads.submit(self.check, given, folder, field, kinds, least_frames)
        try:
            return await asyncio.wrap_future(checking)
        except asyncio.CancelledError:  # the client has gone; a thread that has begun goes on
            checking.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))
            raise

    def check(self, given: bytes | str, folder: Path, field: str, kinds: tuple[str, ...], least_frames: int) -> Upload:
        """As `keep`, in this thread."""
        if isinstance(given, str):
            given = content_of(given, self._most_bytes, field)
        if len(given) > self._most_bytes:
            raise too_large(field, self._most_bytes)
        try:
            found = format_of(given)
        except NotAllowedError as error:
            raise Refusal("unsupported", f"{field}: {error}", param=field) from None
        if found.kind not in kinds:
            raise Refusal("unsupported", f"{field}: this is a {found.kind}; a {kinds[0]} is allowed", param=field)
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as work:
            source, picture = Path(work) / f"given{found.suffix}", Path(work) / "picture.png"
            source.write_bytes(given)
            told = self._decode(Task(str(source), found.kind, str(picture), least_frames, MOST_FRAMES))
            if "refused" in told:
                raise Refusal("unsupported", f"{field}: {told['refused']}", param=field)
            kept = folder / ("start.png" if found.kind == PICTURE else f"start{found.suffix}")
            with replacing(kept) as partial:
                os.replace(picture if found.kind == PICTURE else source, partial)
        return Upload(kept, found.kind, **told)

    def _decode(self, task: Task) -> dict[str, Any]:
        """In a process of its own, with nothing of this one's environment but where modules are."""
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "launchers.serve.uploads.child", task.to_json()]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._wall_seconds,
                env=environment,
                cwd=Path(task.file).parent,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"refused": "it takes too long to decode"}
        if done.returncode:  # killed by a limit, or by damage that a library does not survive
            return {"refused": "it cannot be decoded within the limits of time and memory"}
        return json.loads(done.stdout.splitlines()[-1])
