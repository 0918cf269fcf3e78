"""Many videos on one cluster, chunk by chunk: text, denoising, decoding and writing beside each other."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from helios_cp.config.execution import Execution, Target
from helios_cp.config.layout import Layout
from helios_cp.config.request import Request
from helios_cp.device.device import pick_dtype
from helios_cp.generate.run_folder import RunFolder
from helios_cp.weights.check import check_execution
from helios_cp.weights.load import resolve
from launchers.cluster.worker import Worker
from launchers.driver.conductor import Conductor
from launchers.driver.crew import PipelineError
from launchers.driver.handle import VideoChunk, VideoHandle
from launchers.driver.recipes import Resources, recipes
from launchers.driver.status import put_up
from launchers.driver.submission import Submission
from launchers.driver.timeline import Event
from launchers.schedule.terms import Limits
from launchers.workers.loading import Loading

__all__ = ["ChunkPipeline", "PipelineError"]


class ChunkPipeline(Conductor):
    """Workers for one checkpoint on the Ray cluster that this process is a driver of; a context manager.

    `groups` groups of ranks in `layout` denoise, and `decoders` decode; with none, each group decodes on its own card
    beside denoising. `spread` puts the parts of the ring on a node each. `patience`: seconds to wait for resources.
    Raises `RequestError` for a layout that splits the VAE. After `close` its methods raise `RuntimeError`.
    """

    def __init__(
        self,
        model: str = "tiny-distilled",
        *,
        groups: int = 1,
        decoders: int = 1,
        layout: Layout | None = None,
        execution: Execution | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        backend: str | None = None,
        cache: Path | None = None,
        timeout: float = 600.0,
        limits: Limits | None = None,
        resources: Resources | None = None,
        spread: bool = False,
        patience: float = 15.0,
    ) -> None:
        self.checkpoint = resolve(model, cache, weights=())
        layout = layout or Layout()
        backend = backend or ("nccl" if device == "cuda" else "gloo")
        execution = execution or Execution()
        on = torch.device(device)
        check_execution(
            self.checkpoint, execution, on, pick_dtype(dtype, on), layout, backend=backend, target=Target(device)
        )
        loading = Loading(self.checkpoint.source, dtype, device, backend, layout, timeout, cache, execution)
        context = ray.get_runtime_context()
        node = context.get_node_id()
        made = recipes(loading, groups, decoders, resources or Resources.of(device), spread, node)
        self._board = put_up(f"status-{context.get_job_id()}-{id(self)}", node)
        self._keys = itertools.count()
        super().__init__(
            self.checkpoint.folder.name, limits or Limits(active=2 * groups), decoders == 0, self._show_on_board
        )
        self.start({recipe.name: Worker(recipe, self.tell, patience) for recipe in made})

    @property
    def workers(self) -> Mapping[str, Worker]:
        return self.crew.workers

    @property
    def events(self) -> deque[Event]:
        """The latest units of work, as they are finished. Another thread adds to it: take `list(events)`."""
        return self.crew.events

    def submit(
        self,
        request: Request,
        *,
        output: Sequence[Path] = (),
        folder: RunFolder | None = None,
        latents: Path | None = None,
        stream: bool | None = None,
        decode: bool = True,
        keep_latents: bool = False,
        on_chunk: Callable[[VideoChunk], None] | None = None,
        on_end: Callable[[BaseException | None], None] | None = None,
        allowed: int | None = None,
    ) -> VideoHandle:
        """Queue a video.

        `output`: an MP4 for each video of the batch. `folder`: a run to save every chunk in, and to go on with where it
        stands. `latents`: a file for the latents of all chunks. `stream`: the handle gives the chunks, by default where
        there is no output; then the pipeline runs ahead of whoever takes them by `Limits.undelivered` chunks at most.
        `decode=False` makes latents only. `on_chunk` is called from the pipeline's thread, once the chunk is on
        disk where there is an output; what it raises ends the video. `on_end` is called from there after the last
        chunk, with the error where one ended the video. `allowed`: see `VideoHandle.allow`; `None` for a video that
        need not wait. Raises `RequestError` before anything is queued.
        """
        submission = Submission.of(request, self.checkpoint, output, folder, latents, stream, decode, allowed)
        handle = VideoHandle(
            self,
            next(self._keys),
            streams=submission.streams,
            keep_latents=keep_latents,
            on_chunk=on_chunk,
            on_end=on_end,
        )
        self.add(handle, submission)
        return handle

    def nodes(self) -> dict[str, str]:
        """On which node each worker is."""
        return {
            worker.name: ", ".join(sorted({f"{place.host} {place.node[:6]}" for place in worker.places}))
            for worker in self.workers.values()
        }

    def close(self) -> None:
        """End all videos, with what is finished of them in playable files, and then all workers."""
        super().close()
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            ray.kill(self._board)

    def __enter__(self) -> ChunkPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show_on_board(self, picture: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # nobody's video depends on it
            self._board.show.remote(picture)
