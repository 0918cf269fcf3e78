"""All state of the live server, in one object that every router is given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launchers.serve.access import Access
from launchers.serve.flags import ServeCall
from launchers.serve.logs import Log
from launchers.serve.loras import Loras
from launchers.serve.metrics import Metrics, Now
from launchers.serve.sessions.recording import STATES
from launchers.serve.sessions.sessions import Sessions
from launchers.serve.uploads.uploads import Uploads
from launchers.serve.videos.record import STATUSES
from launchers.serve.videos.videos import Videos

if TYPE_CHECKING:
    from helios_cp.generate.check import Session as CheckedCall
    from launchers.driver.pipeline import ChunkPipeline


@dataclass
class Server:
    """`pipeline` is `None` while weights load, and `doing` says how far that is.

    `checked` is the call with its checkpoint, layout and defaults. Everything here belongs to the thread of the web
    server's event loop; others reach it by `loop.call_soon_threadsafe`.
    """

    call: ServeCall
    checked: CheckedCall
    access: Access = field(default_factory=Access)
    loras: Loras = field(default_factory=Loras)
    log: Log = field(default_factory=Log)
    pipeline: ChunkPipeline | None = None
    doing: str = "loading weights"
    is_draining: bool = False
    metrics: Metrics = field(init=False)
    sessions: Sessions = field(init=False)
    uploads: Uploads = field(init=False)
    videos: Videos = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.look)
        self.sessions = Sessions(self.call, self.checked, self.access, self.log, self.metrics)
        self.uploads = Uploads(self.call.data / "uploads", self.call.upload_bytes)
        self.videos = Videos(self.call, self.checked, self.loras, self.uploads, self.log, self.metrics)

    def restore(self) -> None:
        """Take up what an earlier server left in the folder of data."""
        self.sessions.restore()
        self.videos.restore()

    @property
    def is_ready(self) -> bool:
        """Whether it takes new sessions and videos."""
        return self.pipeline is not None and not self.is_draining

    def opened(self, pipeline: ChunkPipeline) -> None:
        """The workers are loaded."""
        self.pipeline, self.doing = pipeline, "ready"
        self.log.event("server.ready")
        self.sessions.opened(pipeline)
        self.videos.opened(pipeline)

    async def drain(self) -> None:
        """Take nothing new; save what runs, so that the next start goes on with it; tell clients to come back."""
        self.is_draining, self.doing = True, "shutting down"
        await self.sessions.drain()
        await self.videos.drain()

    def look(self) -> Now:
        """For `metrics`. States without a session count as 0, so that no series comes and goes."""
        states = Counter(each.state for each in self.sessions)
        statuses = Counter(each.status for each in self.videos)
        live = [each for each in self.sessions if not each.is_done]
        workers = {} if self.pipeline is None else self.pipeline.workers
        return Now(
            sessions={state: states[state] for state in STATES},
            videos={status: statuses[status] for status in STATUSES},
            viewers=self.sessions.viewers,
            queue=states["queued"],
            lead_seconds=max((each.store.seconds - each.pacer.played for each in live), default=0.0),
            lag_chunks=max((len(each.store.chunks) - one.next for each in live for one in each.audience), default=0),
            restarts={name: worker.life // 2 for name, worker in workers.items()},  # one ends, another begins
            is_ready=self.is_ready,
        )
