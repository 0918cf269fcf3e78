"""`--layout auto` on a cluster: how large a group can be there, and which layout of it is modelled as fastest."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError

from helios_cp.config.console import say
from helios_cp.config.errors import RequestError
from helios_cp.config.layout import DEGREES
from helios_cp.plan.detect import Hardware, detect_hardware, find_hardware
from helios_cp.plan.search import best_prediction
from launchers.cluster.cluster import nodes_free
from launchers.driver.recipes import Resources, bundle, text_gpus
from launchers.generate.checks import checked_without_layout

LOOK_SECONDS = 30.0
"""For a look at a card of the cluster."""


def take_best_layout(arguments: argparse.Namespace, cache: Path | None, device: str, resources: Resources) -> None:
    """Put degrees, and `--ranks`, in the place of `--layout auto`.

    Of all groups that have room beside the other workers, it is the one that `helios_cp.plan` models as fastest with
    decoders of their own; what is given stays. Raises `RequestError`.
    """
    sizes = [arguments.ranks] if hasattr(arguments, "ranks") else range(1, most_ranks(arguments, device, resources) + 1)
    session = checked_without_layout(arguments, cache, device)
    if not session.jobs:
        _forget(arguments)
        return
    given = {name: getattr(arguments, flag) for flag, name in DEGREES.items() if hasattr(arguments, flag)}
    if hasattr(arguments, "shard_weights"):
        given["shard_weights"] = arguments.shard_weights
    decoders = max(1, arguments.decoders // arguments.groups) if arguments.decoders else 0
    requests = [job.request for job in session.jobs]
    card = _card(arguments, resources) if device == "cuda" or hasattr(arguments, "hardware") else None
    predictions, refusal = [], None
    for ranks in sizes:
        hardware = card or detect_hardware("cpu", arguments.groups * ranks)
        try:
            predictions.append(
                best_prediction(
                    session.checkpoint,
                    requests,
                    session.dtype,
                    ranks,
                    hardware,
                    {**given, "vae": 1},
                    decoders,
                    session.execution,
                )
            )
        except RequestError as error:
            refusal = error
    if not predictions:
        raise refusal
    layout = max(predictions, key=lambda each: (each.fps, -each.latency)).candidate.layout
    for flag, name in DEGREES.items():
        setattr(arguments, flag, getattr(layout.degrees, name))
    arguments.ranks, arguments.shard_weights = layout.degrees.world, layout.shard_weights
    say(layout.as_planned(hardware.name))
    _forget(arguments)


def _forget(arguments: argparse.Namespace) -> None:
    """Flags that have been answered."""
    for flag in ("layout", "hardware"):
        if hasattr(arguments, flag):
            delattr(arguments, flag)


def most_ranks(arguments: argparse.Namespace, device: str, resources: Resources) -> int:
    """Ranks that each group can have, beside decoders and text encoder. Raises `RequestError` where that is none."""
    others = [bundle(1, resources.decoder_gpus)] * arguments.decoders
    text = bundle(
        1, text_gpus(getattr(arguments, "shard_weights", False), getattr(arguments, "offload", "none"), resources)
    )
    if arguments.address != "local":
        nodes, others = nodes_free(), [*others, text]
    elif device == "cuda":
        import torch

        nodes, others = [{"CPU": math.inf, "GPU": torch.cuda.device_count()}], [*others, text]
    else:
        nodes = [{"CPU": os.cpu_count() or 1}]  # the text encoder is idle once the first chunk has begun
    found = largest_group(nodes, arguments.groups, bundle(1, resources.rank_gpus), others)
    if found == 0 and arguments.address == "local" and device == "cpu":
        return 1  # processes share cores
    if found == 0:
        have = "; ".join(", ".join(f"{count:g} {name}" for name, count in sorted(node.items())) for node in nodes)
        raise RequestError(
            f"--layout auto: there is no room for {arguments.groups} group(s) of even one rank beside "
            f"{arguments.decoders} decoder(s) and the text encoder; free on the nodes: {have}; add nodes, or ask for "
            "fewer --groups or --decoders, or for parts of a card by --gpus"
        )
    return found


def largest_group(
    nodes: Sequence[Mapping[str, float]],
    groups: int,
    rank: Mapping[str, float],
    others: Sequence[Mapping[str, float]],
) -> int:
    """How many ranks each of some groups can have, every group inside one node, with `others` placed after them."""
    most = max((int(min(node.get(name, 0) // amount for name, amount in rank.items())) for node in nodes), default=0)
    for ranks in range(most, 0, -1):
        left = [dict(node) for node in nodes]
        group = {name: ranks * amount for name, amount in rank.items()}
        if all(_place(left, needed) for needed in [*[group] * groups, *others]):
            return ranks
    return 0


def _place(nodes: Sequence[dict[str, float]], needed: Mapping[str, float]) -> bool:
    """Take it from the first node that has it."""
    for node in nodes:
        if all(node.get(name, 0) >= amount for name, amount in needed.items()):
            for name, amount in needed.items():
                node[name] -= amount
            return True
    return False


def _card(arguments: argparse.Namespace, resources: Resources) -> Hardware:
    """`--hardware`, or what a card of the cluster can do; the driver's machine need not have one."""
    if hasattr(arguments, "hardware"):
        return find_hardware(arguments.hardware)
    if arguments.address == "local":
        return detect_hardware("cuda")
    look = ray.remote(detect_hardware).options(num_cpus=0, num_gpus=resources.rank_gpus)
    try:
        found = ray.get(look.remote("cuda"), timeout=LOOK_SECONDS)
    except GetTimeoutError:
        raise RequestError(
            f"--layout auto: no card was free within {LOOK_SECONDS:g} s to look what kind it is; give the layout"
        ) from None
    cards = max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    return replace(found, gpus_per_node=max(int(cards), 1))
