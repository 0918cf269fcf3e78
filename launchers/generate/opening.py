"""From a checked call to the pipeline that makes its videos."""

from __future__ import annotations

from pathlib import Path

from helios_cp.device.device import dtype_name
from helios_cp.generate.check import Session
from launchers.driver.pipeline import ChunkPipeline
from launchers.driver.recipes import Resources
from launchers.generate.flags import ClusterCall
from launchers.schedule.terms import Limits


def open_pipeline(
    call: ClusterCall, session: Session, device: str, resources: Resources, cache: Path | None, active: int
) -> ChunkPipeline:
    """`active`: videos under way at a time; see `Limits`."""
    return ChunkPipeline(
        session.model,
        groups=call.groups,
        decoders=call.decoders,
        layout=session.layout,
        execution=session.execution,
        dtype=dtype_name(session.dtype),
        device=device,
        backend=call.layout.backend,
        cache=cache,
        timeout=call.layout.timeout,
        limits=Limits(undelivered=call.undelivered, active=active),
        resources=resources,
        spread=call.spread,
        patience=call.wait,
    )
