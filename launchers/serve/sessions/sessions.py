"""All sessions: the queue, who runs, who is let go, and what an earlier server left."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import shutil
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.generate.check import Session as CheckedCall
from launchers.driver.pipeline import ChunkPipeline
from launchers.serve.access import Access, digest, matches, new_token
from launchers.serve.flags import ServeCall
from launchers.serve.logs import Log
from launchers.serve.media.store import MediaStore, blank_init
from launchers.serve.metrics import Metrics
from launchers.serve.problems import Refusal
from launchers.serve.sessions.recording import FILE, Recording
from launchers.serve.sessions.session import Session

LOOK_SECONDS = 1.0
"""Between two looks for sessions that nobody watches, and for old ones."""

DELETE_SECONDS = 60.0
"""For the chunk in hand of a session that is deleted."""


class Sessions:
    """By id, in the order they came. It belongs to the event loop."""

    def __init__(self, call: ServeCall, checked: CheckedCall, access: Access, log: Log, metrics: Metrics) -> None:
        self.folder = call.data / "sessions"
        self._call, self._checked, self._access, self._log, self._metrics = call, checked, access, log, metrics
        self._pipeline: ChunkPipeline | None = None
        self._sessions: dict[str, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_draining = False

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions.values()))

    def viewed(self, session_id: str, token: str | None) -> Session:
        """For one of its tokens, or a key of the server. Raises `Refusal`."""
        session = self._find(session_id)
        if not self._is_steered(session, token) and not matches(token, session.recording.view):
            raise Refusal("unauthorized", "a token of this session is needed, or a key of the server")
        return session

    def steered(self, session_id: str, token: str | None) -> Session:
        """For its control token, or a key of the server. Raises `Refusal`."""
        session = self._find(session_id)
        if self._is_steered(session, token):
            return session
        if matches(token, session.recording.view):
            raise Refusal("forbidden", "a viewer's token may only watch; the control token is needed")
        raise Refusal("unauthorized", "the control token of this session is needed, or a key of the server")

    def _is_steered(self, session: Session, token: str | None) -> bool:
        is_key = self._access.needs_key and self._access.admits(token)
        return matches(token, session.recording.control) or is_key

    def _find(self, session_id: str) -> Session:
        if session_id not in self._sessions:
            raise Refusal("not_found", f"session {session_id[:64]!r}: there is no such session")
        return self._sessions[session_id]

    @property
    def queue(self) -> list[Session]:
        return [each for each in self if each.state == "queued"]

    @property
    def running(self) -> list[Session]:
        return [each for each in self if each.state in ("running", "paused")]

    @property
    def viewers(self) -> int:
        """Connections to all sessions."""
        return sum(len(each.audience) for each in self)

    # What becomes of them

    def folder_of(self, session_id: str) -> Path:
        return self.folder / session_id

    async def create(
        self, session_id: str, request: Request, lead: float | None, is_endless: bool
    ) -> tuple[Session, str, str]:
        """A new session at the end of the queue, with the tokens to steer and to view it.

        Raises `Refusal`, and removes what was put in its folder.
        """
        try:
            self._check_room()
        except Refusal:
            shutil.rmtree(self.folder_of(session_id), ignore_errors=True)
            raise
        control = new_token()
        recording = Recording(
            session_id,
            self.folder_of(session_id),
            request,
            digest(control),
            digest(view_token(control)),
            lead or self._call.lead,
            is_endless,
        )
        store = await asyncio.to_thread(_store, recording)
        await asyncio.to_thread(recording.write, recording.to_json())
        self._sessions[session_id] = session = Session(recording, store, self._ended, self._log, self._metrics)
        self._log.event("session.created", session=session_id, prompt=request.prompt[0])
        return session, control, view_token(control)

    def _check_room(self) -> None:
        if self._is_draining:
            raise Refusal("busy", "the server is shutting down; try again in a moment")
        if len(self.queue) + len(self.running) >= self._call.most_sessions + self._call.queue:
            raise Refusal("busy", f"{len(self.queue)} sessions wait already; try again later")

    def admit(self) -> None:
        """Let sessions run in order, as many as may at a time, and tell the others where they are."""
        if self._pipeline is not None and not self._is_draining:
            room = self._call.most_sessions - len(self.running)
            for session in self.queue[: max(room, 0)]:
                session.recording.state = "running"
                self._spawn(self._begin(session))
        waiting = self.queue
        for place, session in enumerate(waiting, 1):
            session.audience.say({"type": "session.queue", "position": place, "length": len(waiting)})

    def opened(self, pipeline: ChunkPipeline) -> None:
        """The workers are loaded: go on with what ran, then admit. Nobody could watch meanwhile, so nothing is idle."""
        self._pipeline = pipeline
        for session in self:
            session.touch()
        for session in self.running:
            self._spawn(self._begin(session))
        self.admit()
        self._spawn(self._look_after())

    def restore(self) -> None:
        """Take up the sessions of an earlier server from disk; those that ran wait for the workers."""
        for folder in self.folder.glob("*"):
            if not (folder / FILE).exists():  # the server was killed before it said that there is a session
                shutil.rmtree(folder, ignore_errors=True)
        for file in sorted(self.folder.glob(f"*/{FILE}"), key=lambda each: each.stat().st_mtime):
            try:
                recording = Recording.load(file.parent)
            except ValueError as error:
                self._log.fault("session.unreadable", error, session=file.parent.name)
                continue
            store = _store(recording)
            store.load(recording.request.num_chunks)
            self._sessions[recording.id] = Session(recording, store, self._ended, self._log, self._metrics)

    async def delete(self, session: Session) -> None:
        """With all its files."""
        await session.abandon(DELETE_SECONDS)
        self._sessions.pop(session.id, None)
        await asyncio.to_thread(shutil.rmtree, session.recording.folder, ignore_errors=True)

    async def drain(self) -> None:
        """Leave everything as it stands on disk to the next start; connections are told to come back."""
        self._is_draining = True
        for session in self:
            session.audience.end(1012, "the server restarts; connect again")
            session.leave_to_next_start()
        for task in self._tasks:
            task.cancel()

    def positions(self) -> dict[str, int]:
        """In the queue, from 1."""
        return {session.id: place for place, session in enumerate(self.queue, 1)}

    async def _begin(self, session: Session) -> None:
        try:
            await session.begin(self._pipeline, self._checked)
        except (RequestError, OSError, RuntimeError) as error:
            self._log.fault("session.failed", error, session=session.id)
            session.audience.say({"type": "error", "code": "failed", "message": " ".join(str(error).split())})
            await session.end("failed")

    def _ended(self, session: Session) -> None:
        chunks, why = len(session.store.chunks), session.recording.why
        self._log.event("session.ended", session=session.id, why=why, chunks=chunks)
        self.admit()

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            lost = [worker.name for worker in self._pipeline.workers.values() if not worker.is_ready]
            about = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} being replaced"
            for session in self:
                if lost and not session.is_done:
                    session.audience.say({"type": "session.status", "text": about})
                if session.is_done:
                    ended = session.recording.ended or session.recording.created
                    if self._call.keep is not None and time.time() - ended > 3600 * self._call.keep:
                        await self.delete(session)
                elif not len(session.audience) and now - session.watched > self._call.idle:
                    await session.stop("idle")

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def view_token(control: str) -> str:
    """The token to view what `control` steers. Who may steer can hand it out again, though no token is kept; nobody
    finds the way back."""
    return base64.urlsafe_b64encode(hashlib.sha256(f"view {control}".encode()).digest()[:24]).decode()


def _store(recording: Recording) -> MediaStore:
    request = recording.request
    init = blank_init(request.height, request.width, request.fps)
    return MediaStore(recording.media, init, request.fps, request.frames_per_chunk)
