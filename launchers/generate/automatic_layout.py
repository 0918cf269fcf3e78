"""`--layout auto` on a cluster: how large a group can be there, and which layout of it is modelled as fastest."""

from __future__ import annotations

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
from helios_cp.plan.choose import best_prediction
from helios_cp.plan.hardware import Hardware, detect_hardware, find_hardware
from launchers.cluster.cluster import nodes_free
from launchers.driver.recipes import Resources, bundle, text_gpus
from launchers.generate.checks import checked_without_layout
from launchers.generate.flags import ClusterCall

LOOK_SECONDS = 30.0
"""For a look at a card of the cluster."""


def with_best_layout(call: ClusterCall, cache: Path | None, device: str, resources: Resources) -> ClusterCall:
    """The call with degrees, and `--ranks`, in the place of `--layout auto`.

    Of all groups that have room beside the other workers, it is the one that `helios_cp.plan` models as fastest with
    decoders of their own; what is given stays. Raises `RequestError`.
    """
    asked = call.layout
    sizes = [call.ranks] if call.ranks is not None else range(1, most_ranks(call, device, resources) + 1)
    session = checked_without_layout(call, cache, device)
    if not session.jobs:
        return replace(call, layout=replace(asked, layout=None, hardware=None))
    given: dict[str, int | bool] = {**asked.degrees, "vae": 1}
    if asked.shard_weights is not None:
        given["shard_weights"] = asked.shard_weights
    decoders = max(1, call.decoders // call.groups) if call.decoders else 0
    requests = [job.request for job in session.jobs]
    card = _card(call, resources) if device == "cuda" or asked.hardware is not None else None
    predictions, refusal = [], None
    for ranks in sizes:
        hardware = card or detect_hardware("cpu", call.groups * ranks)
        try:
            predictions.append(
                best_prediction(
                    session.checkpoint, requests, session.dtype, ranks, hardware, given, decoders, session.execution
                )
            )
        except RequestError as error:
            refusal = error
    if not predictions:
        raise refusal
    layout = max(predictions, key=lambda each: (each.fps, -each.latency)).candidate.layout
    say(layout.as_planned(hardware.name))
    degrees = {flag: getattr(layout.degrees, name) for flag, name in DEGREES.items()}
    found = replace(asked, layout=None, hardware=None, shard_weights=layout.shard_weights, **degrees)
    return replace(call, layout=found, ranks=layout.degrees.world)


def most_ranks(call: ClusterCall, device: str, resources: Resources) -> int:
    """Ranks that each group can have, beside decoders and text encoder. Raises `RequestError` where that is none."""
    others = [bundle(1, resources.decoder_gpus)] * call.decoders
    text = bundle(1, text_gpus(bool(call.layout.shard_weights), call.execution.get("offload", "none"), resources))
    if call.address != "local":
        nodes, others = nodes_free(), [*others, text]
    elif device == "cuda":
        import torch

        nodes, others = [{"CPU": math.inf, "GPU": torch.cuda.device_count()}], [*others, text]
    else:
        nodes = [{"CPU": os.cpu_count() or 1}]  # the text encoder is idle once the first chunk has begun
    found = largest_group(nodes, call.groups, bundle(1, resources.rank_gpus), others)
    if found == 0 and call.address == "local" and device == "cpu":
        return 1  # processes share cores
    if found == 0:
        have = "; ".join(", ".join(f"{count:g} {name}" for name, count in sorted(node.items())) for node in nodes)
        raise RequestError(
            f"--layout auto: there is no room for {call.groups} group(s) of even one rank beside "
            f"{call.decoders} decoder(s) and the text encoder; free on the nodes: {have}; add nodes, or ask for "
            "fewer --groups or --decoders, or for parts of a card by --gpus"
        )
    return found


def largest_group(
    nodes: Sequence[Mapping[str, float]], groups: int, rank: Mapping[str, float], others: Sequence[Mapping[str, float]]
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


def _card(call: ClusterCall, resources: Resources) -> Hardware:
    """`--hardware`, or what a card of the cluster can do; the driver's machine need not have one."""
    if call.layout.hardware is not None:
        return find_hardware(call.layout.hardware)
    if call.address == "local":
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
