"""What can be refused of a call for a cluster, before it joins or starts one and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import ray
import torch

from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Target
from helios_cp.config.layout import AskedLayout, Layout
from helios_cp.config.ranks import Ranks
from helios_cp.files.whole_files import check_file_target
from helios_cp.generate.check import Session, check
from launchers.driver.recipes import Resources, text_gpus
from launchers.generate.flags import ClusterCall
from launchers.schedule.terms import check_offload, check_spread


def check_files(call: ClusterCall) -> None:
    """Whether the timeline can be drawn and written in the end. Raises `RequestError`."""
    path = call.timeline
    if path is None:
        return
    check_file_target("--timeline", path, ".png")
    if find_spec("matplotlib") is None:
        raise RequestError(f"--timeline {path}: it is drawn by matplotlib; pip install matplotlib, or leave it out")


def check_without_cluster(call: ClusterCall, cache: Path | None) -> None:
    """What is wrong with the call whatever the cluster has. Raises `RequestError`."""
    refusal = None
    for device in (call.device,) if call.device != "auto" else ("cuda", "cpu"):
        try:
            resources = resources_of(call, device)
            if call.layout.is_auto:
                checked_without_layout(call, cache, device)
            else:
                session = check_session(call, cache, call.ranks_of_group, device)
                shares_of_workers(call, device, session.layout, session.execution.offload, resources)
            return
        except RequestError as error:
            refusal = error
    raise refusal


def pick_cluster_device(call: ClusterCall) -> str:
    """CUDA where the cluster has cards, for the driver's machine may have none."""
    if call.device != "auto":
        return call.device
    if ray.is_initialized():
        return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def resources_of(call: ClusterCall, device: str) -> Resources:
    """`--gpus`, or what is usual on such a device. Raises `RequestError`."""
    if call.gpus is None:
        return Resources.of(device)
    resources = Resources(*call.gpus)
    if device == "cuda" and not (resources.rank_gpus and (resources.decoder_gpus or not call.decoders)):
        raise RequestError(f"{call.typed_gpus}: on cuda each rank and each decoder needs more than 0 of a card")
    return resources


def shares_of_workers(
    call: ClusterCall, device: str, layout: Layout, offload: str, resources: Resources
) -> list[float]:
    """Which part of a card each rank, each decoder and the text encoder has; those of the CPU have 0.

    Raises `RequestError` where ranks that talk by NCCL would share a card.
    """
    neighbours = layout.degrees.world // (layout.degrees.ring if call.spread else 1)
    if device == "cuda" and neighbours > 1 and resources.rank_gpus < 1 and call.layout.backend != "gloo":
        raise RequestError(
            f"{call.typed_gpus}: ranks of a group would share a card, and NCCL needs one each; give 1 as the first "
            "number, or use --backend gloo"
        )
    ranks = [resources.rank_gpus] * (call.groups * layout.degrees.world)
    text = text_gpus(layout.shard_weights, offload, resources)
    return [*ranks, *[resources.decoder_gpus] * call.decoders, text]


def cards_for(shares: Sequence[float]) -> int:
    """How many cards hold these parts of a card, none of which is split: first fit, the largest first."""
    free: list[float] = []
    for share in sorted(filter(None, shares), reverse=True):
        card = next((card for card, left in enumerate(free) if left >= share - 1e-6), None)  # 0.4 + 0.3 + 0.3 is 1
        if card is None:
            card = len(free)
            free.append(1.0)
        free[card] -= share
    return len(free)


def check_cards(call: ClusterCall, shares: Sequence[float]) -> None:
    """A private instance would take any number for true. Raises `RequestError` for more cards than there are."""
    needed, present = cards_for(shares), torch.cuda.device_count()
    if needed <= present:
        return
    ranks = len(shares) - call.decoders - 1
    advice = "ask for fewer --groups or ranks, or for --device cpu"
    if ranks == call.groups <= present:  # a rank on each card, and the others beside them
        beside = math.floor(40 / math.ceil((call.decoders + 1) / present)) / 100
        advice = f"share them by --gpus 0.6 {beside:g} {beside:g}"
    raise RequestError(
        f"--address local: {ranks} rank(s), {call.decoders} decoder(s) and the text encoder need {needed} "
        f"card(s), this machine has {present}; {advice}"
    )


def check_session(call: ClusterCall, cache: Path | None, ranks: int, device: str) -> Session:
    """As `helios_cp.generate.check.check`, for a group of `ranks` whose cards this machine need not have."""
    here = replace(call, device=device, layout=replace(call.layout, vae_parallel=1))
    target = None
    if device == "cuda" and not torch.cuda.is_available():
        dtype = "bfloat16" if call.dtype in (None, "auto") and call.resume is None else call.dtype
        backend = None if call.layout.backend == "nccl" else call.layout.backend
        here = replace(here, device="cpu", dtype=dtype, layout=replace(here.layout, backend=backend))
        target = Target("cuda")
    session = check(here, cache, Ranks(size=ranks, local_size=min(ranks, max(torch.cuda.device_count(), 1))), target)
    check_spread(call.spread, session.layout.degrees.ring)
    check_offload(session.execution.offload, call.decoders)
    return session


def checked_without_layout(call: ClusterCall, cache: Path | None, device: str) -> Session:
    """The call's checkpoint and requests, with all that can be refused of them refused. Raises `RequestError`."""
    rest = AskedLayout(backend=call.layout.backend, timeout=call.layout.timeout)
    return check_session(replace(call, layout=rest, spread=False), cache, 1, device)
