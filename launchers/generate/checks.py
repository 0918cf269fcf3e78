"""What can be refused of a call for a cluster, before it joins or starts one and after."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import ray
import torch

from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Target
from helios_cp.config.layout import DEGREES, Layout
from helios_cp.files.whole_files import check_file_target
from helios_cp.generate.check import Session, check
from helios_cp.pipeline.world import Ranks
from launchers.driver.recipes import Resources, text_gpus
from launchers.schedule.limits import check_offload, check_spread


def check_files(arguments: argparse.Namespace) -> None:
    """Whether the timeline can be drawn and written in the end. Raises `RequestError`."""
    path = getattr(arguments, "timeline", None)
    if path is None:
        return
    check_file_target("--timeline", path, ".png")
    if find_spec("matplotlib") is None:
        raise RequestError(f"--timeline {path}: it is drawn by matplotlib; pip install matplotlib, or leave it out")


def check_without_cluster(arguments: argparse.Namespace, cache: Path | None) -> None:
    """What is wrong with the call whatever the cluster has. Raises `RequestError`."""
    refusal = None
    for device in (arguments.device,) if arguments.device != "auto" else ("cuda", "cpu"):
        try:
            resources = resources_of(arguments, device)
            if getattr(arguments, "layout", None) == "auto":
                checked_without_layout(arguments, cache, device)
            else:
                session = check_session(arguments, cache, ranks_of_group(arguments), device)
                shares_of_workers(arguments, device, session.layout, session.execution.offload, resources)
            return
        except RequestError as error:
            refusal = error
    raise refusal


def ranks_of_group(arguments: argparse.Namespace) -> int:
    """`--ranks`, or the product of the degrees given."""
    degrees = (getattr(arguments, name, 1) for name in ("cfg_parallel", "ring", "ulysses"))
    return getattr(arguments, "ranks", math.prod(degrees))


def pick_cluster_device(arguments: argparse.Namespace) -> str:
    """CUDA where the cluster has cards, for the driver's machine may have none."""
    if arguments.device != "auto":
        return arguments.device
    if ray.is_initialized():
        return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def resources_of(arguments: argparse.Namespace, device: str) -> Resources:
    """`--gpus`, or what is usual on such a device. Raises `RequestError`."""
    if not hasattr(arguments, "gpus"):
        return Resources.of(device)
    resources = Resources(*arguments.gpus)
    if device == "cuda" and not (resources.rank_gpus and (resources.decoder_gpus or not arguments.decoders)):
        raise RequestError(f"{_gpus(arguments)}: on cuda each rank and each decoder needs more than 0 of a card")
    return resources


def shares_of_workers(
    arguments: argparse.Namespace, device: str, layout: Layout, offload: str, resources: Resources
) -> list[float]:
    """Which part of a card each rank, each decoder and the text encoder has; those of the CPU have 0.

    Raises `RequestError` where ranks that talk by NCCL would share a card.
    """
    neighbours = layout.degrees.world // (layout.degrees.ring if arguments.spread else 1)
    if device == "cuda" and neighbours > 1 and resources.rank_gpus < 1 and getattr(arguments, "backend", "") != "gloo":
        raise RequestError(
            f"{_gpus(arguments)}: ranks of a group would share a card, and NCCL needs one each; give 1 as the first "
            "number, or use --backend gloo"
        )
    ranks = [resources.rank_gpus] * (arguments.groups * layout.degrees.world)
    text = text_gpus(layout.shard_weights, offload, resources)
    return [*ranks, *[resources.decoder_gpus] * arguments.decoders, text]


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


def check_cards(arguments: argparse.Namespace, shares: Sequence[float]) -> None:
    """A private instance would take any number for true. Raises `RequestError` for more cards than there are."""
    needed, present = cards_for(shares), torch.cuda.device_count()
    if needed <= present:
        return
    ranks = len(shares) - arguments.decoders - 1
    advice = "ask for fewer --groups or ranks, or for --device cpu"
    if ranks == arguments.groups <= present:  # a rank on each card, and the others beside them
        beside = math.floor(40 / math.ceil((arguments.decoders + 1) / present)) / 100
        advice = f"share them by --gpus 0.6 {beside:g} {beside:g}"
    raise RequestError(
        f"--address local: {ranks} rank(s), {arguments.decoders} decoder(s) and the text encoder need {needed} "
        f"card(s), this machine has {present}; {advice}"
    )


def check_session(arguments: argparse.Namespace, cache: Path | None, ranks: int, device: str) -> Session:
    """As `helios_cp.generate.check.check`, for a group of `ranks` whose cards this machine need not have."""
    checked = argparse.Namespace(**{**vars(arguments), "vae_parallel": 1, "device": device})
    target = None
    if device == "cuda" and not torch.cuda.is_available():
        if getattr(checked, "dtype", "auto") == "auto" and not hasattr(checked, "resume"):
            checked.dtype = "bfloat16"
        checked.device, target = "cpu", Target("cuda")
        if getattr(checked, "backend", None) == "nccl":
            del checked.backend
    here = Ranks(size=ranks, local_size=min(ranks, max(torch.cuda.device_count(), 1)))
    session = check(checked, cache, here, target)
    check_spread(arguments.spread, session.layout.degrees.ring)
    check_offload(session.execution.offload, arguments.decoders)
    return session


def checked_without_layout(arguments: argparse.Namespace, cache: Path | None, device: str) -> Session:
    """The call's checkpoint and requests, with all that can be refused of them refused. Raises `RequestError`."""
    layout = {*DEGREES, "layout", "hardware", "shard_weights", "attention"}
    rest = {name: value for name, value in vars(arguments).items() if name not in layout}
    return check_session(argparse.Namespace(**{**rest, "spread": False}), cache, 1, device)


def _gpus(arguments: argparse.Namespace) -> str:
    return f"--gpus {' '.join(f'{share:g}' for share in arguments.gpus)}"
