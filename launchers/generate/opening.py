"""From a call to the pipeline that makes its videos: what is refused of it, the cluster, the layout, the workers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from helios_cp.device.device import dtype_name
from helios_cp.generate.check import Session
from helios_cp.weights.load import resolve
from launchers.cluster.cluster import connected
from launchers.driver.pipeline import ChunkPipeline
from launchers.driver.recipes import Resources
from launchers.generate import checks
from launchers.generate.automatic_layout import with_best_layout
from launchers.generate.flags import AnyCall
from launchers.schedule.terms import Limits


@dataclass(frozen=True)
class Opening(Generic[AnyCall]):
    """A call whose layout is chosen, its session, and what its workers ask of a device. `shares`: see `checks`."""

    call: AnyCall
    cache: Path | None
    session: Session
    device: str
    resources: Resources
    shares: list[float]

    @classmethod
    def of(cls, call: AnyCall, cache: Path | None, stack: ExitStack) -> Opening[AnyCall]:
        """Join the cluster that the call names, if any, until `stack` is closed. Raises `RequestError` and
        `ClusterError`."""
        if call.address != "local":
            checks.check_without_cluster(call, cache)
            stack.enter_context(connected(call.address, wait=call.wait))
        device = checks.pick_cluster_device(call)
        resources = checks.resources_of(call, device)
        if call.layout.is_auto:
            call = with_best_layout(call, cache, device, resources)
        session = checks.check_session(call, cache, call.ranks_of_group, device)
        shares = checks.shares_of_workers(call, device, session.layout, session.execution.offload, resources)
        if call.address == "local" and session.jobs:
            checks.check_cards(call, shares)
        return cls(call, cache, session, device, resources, shares)

    @property
    def loading(self) -> str:
        """What is loaded, for a line that says so."""
        return f"loading {self.session.model} on {self.device} in {dtype_name(self.session.dtype)}"

    def start_instance(self, stack: ExitStack) -> None:
        """A private instance, where no cluster was joined, until `stack` is closed. Raises `ClusterError`."""
        if self.call.address == "local":
            resolve(self.session.model, self.cache)  # with its weights: workers have no terminal to show progress on
            stack.enter_context(connected("local", cpus=len(self.shares), gpus=checks.cards_for(self.shares)))

    def pipeline(self, active: int) -> ChunkPipeline:
        """`active`: videos under way at a time; see `Limits`."""
        call, session = self.call, self.session
        return ChunkPipeline(
            session.model,
            groups=call.groups,
            decoders=call.decoders,
            layout=session.layout,
            execution=session.execution,
            dtype=dtype_name(session.dtype),
            device=self.device,
            backend=call.layout.backend,
            cache=self.cache,
            timeout=call.layout.timeout,
            limits=Limits(undelivered=call.undelivered, active=active),
            resources=self.resources,
            spread=call.spread,
            patience=call.wait,
        )
