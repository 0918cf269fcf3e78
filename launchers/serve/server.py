"""All state of the live server, in one object that every router is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launchers.serve.access import Access
from launchers.serve.flags import ServeCall
from launchers.serve.logs import Log
from launchers.serve.sessions.sessions import Sessions
from launchers.serve.uploads.uploads import Uploads
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
    log: Log = field(default_factory=Log)
    pipeline: ChunkPipeline | None = None
    doing: str = "starting"
    is_draining: bool = False
    sessions: Sessions = field(init=False)
    uploads: Uploads = field(init=False)
    videos: Videos = field(init=False)

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.call, self.checked, self.access)
        self.uploads = Uploads(self.call.data / "uploads", self.call.upload_bytes)
        self.videos = Videos(self.call, self.checked, self.uploads, self.log)

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
        self.sessions.opened(pipeline)
        self.videos.opened(pipeline)

    async def drain(self) -> None:
        """Take nothing new; save what runs, so that the next start goes on with it; tell clients to come back."""
        self.is_draining, self.doing = True, "shutting down"
        await self.sessions.drain()
        await self.videos.drain()
