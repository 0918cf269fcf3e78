"""The worker that denoises: one rank of a group."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from helios_cp.config.imports import import_schedulers
from helios_cp.config.request import Request
from helios_cp.pipeline.start import Inputs, initial_state
from launchers.messages.arrays import Array, StateArrays
from launchers.messages.messages import ActorInfo, ChunkJob, Clock, NextStart, Text
from launchers.workers.decoder import VaeDecoder
from launchers.workers.loading import Loading
from launchers.workers.watched import own_info


class DenoiserRank(VaeDecoder):
    """One rank of a denoiser group. Every rank gets the same calls; rank 0 answers with the result.

    With `decodes`, rank 0 is a decoder too, for calls from a second thread.
    """

    def __init__(self, loading: Loading, rank: int, decodes: bool) -> None:
        super().__init__(loading)
        self.rank = rank
        self.decodes = decodes and rank == 0
        self._store: dist.TCPStore | None = None
        self._kept: tuple[tuple[int, int], Any] | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Host and port where the group meets; called on rank 0."""
        host = ray.util.get_node_ip_address()
        self._store = self._make_store(host, 0)
        return host, self._store.port

    def load(self, meeting: tuple[str, int] | None) -> ActorInfo:
        """Join the group, which takes all its ranks, and load this rank's part."""
        from helios_cp.pipeline.environment import prepare
        from helios_cp.pipeline.parallelize import load_parallel
        from parallel.mesh import Mesh

        import_schedulers()
        loading = self.loading
        prepare(loading.execution, loading.layout.degrees.world, os.environ)
        self.device = loading.torch_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if meeting is not None:
            store = self._store or self._make_store(*meeting)
            dist.init_process_group(
                loading.backend,
                store=dist.PrefixStore("launchers", store),
                rank=self.rank,
                world_size=loading.layout.degrees.world,
                timeout=timedelta(seconds=loading.timeout),
            )
        self.pipeline = load_parallel(
            loading.model,
            Mesh.build(loading.layout.degrees, timeout=timedelta(seconds=loading.timeout)),
            dtype=loading.torch_dtype(),
            device=self.device,
            attention=loading.layout.attention,
            cache=loading.cache,
            shard_weights=loading.layout.shard_weights,
            denoise_only=True,
            execution=loading.execution,
        )
        if self.decodes:
            self.load_vae()
        return own_info()

    @torch.no_grad()
    def denoise(self, job: ChunkJob, text: Text, before: NextStart | None) -> tuple[NextStart | None, Array | None]:
        """The next chunk of a video: its state and its latents `[B, C, T, h, w]` fp32.

        `before` is what the last chunk, or the picture or clip, left; `None` for a video that starts from nothing.
        """
        clock = Clock()
        request, inputs = Inputs().merged(job.request)
        if before is None:
            channels = self.pipeline.checkpoint.transformer.in_channels
            state = initial_state(request, inputs, None, [], 0, channels, self.device)
        else:
            state = before.state.state(self.device)
        prompts = self._prompts(job, request, inputs, text)
        clock.part("conditions")
        latents, following = self.pipeline.denoise(request, inputs, prompts, state)
        if self.rank != 0:
            return None, None
        values, state = Array.of(latents), StateArrays.of(following)
        clock.part("denoise")
        return NextStart(state, clock.span()), values

    def forget(self, video: int) -> None:
        """Free what is kept of a video."""
        if self._kept is not None and self._kept[0][0] == video:
            self._kept = None

    def _prompts(self, job: ChunkJob, request: Request, inputs: Inputs, text: Text) -> Any:
        """The keys and values of the prompt in use are kept from chunk to chunk, of one video at a time."""
        key = (job.video, job.prompt)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            negative = None if text.negative is None else text.negative.tensor()
            embeds = replace(inputs, prompt_embeds=text.prompts.tensor(), negative_prompt_embeds=negative)
            self._kept = (key, self.pipeline.encode_prompts(request, embeds, text.first))
        return self._kept[1]

    def _make_store(self, host: str, port: int) -> dist.TCPStore:
        timeout = timedelta(seconds=self.loading.timeout)
        return dist.TCPStore(host, port, is_master=self.rank == 0, wait_for_workers=False, timeout=timeout)
