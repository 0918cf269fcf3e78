"""The kinds of machines that are built in, and which of them stands for the machine at hand.

Their files in `profiles` are like those of a calibration. What no data sheet says and nobody measured is assumed there,
and says so.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.config.layout import MACHINES
from helios_cp.plan.hardware import Hardware, read_profile

PROFILES = {name: read_profile(Path(__file__).parent / "profiles" / f"{name}.json") for name in MACHINES}
H100, H200, A100, RTX4090, CPU = PROFILES.values()


def find_hardware(name: str) -> Hardware:
    """A built-in profile, or that of a JSON file. Raises `RequestError`."""
    if name in PROFILES:
        return PROFILES[name]
    if not name.endswith(".json"):
        raise RequestError(f"--hardware {name}: allowed are {', '.join(PROFILES)}, or a JSON file of a calibration")
    return read_profile(Path(name))


def detect_hardware(device_type: str, ranks_of_node: int | None = None) -> Hardware:
    """The profile for this machine's first card, with its own memory; `cpu` where there is none.

    `ranks_of_node` of the job are on this machine: as many as it has cards, unless told otherwise, however many of them
    one process sees. On a CPU they share its memory; it is one unless told otherwise.
    """
    if device_type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return match_card(properties.name, properties.total_memory, ranks_of_node or torch.cuda.device_count())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return replace(CPU, memory_bytes=memory / (ranks_of_node or 1))


KNOWN_CARDS = {
    r"\bH200\b": H200,
    r"\bH100\b(?!.*(PCIE|NVL))": H100,
    r"\bA100-SXM": A100,
    r"\bRTX 4090\b(?!.*LAPTOP)": RTX4090,
}
"""Profiles by what the names that CUDA gives their cards have in common."""


def match_card(name: str, memory: int, ranks_of_node: int) -> Hardware:
    """The profile for a card by the name that CUDA gives it, with its own memory.

    A card that is not known, or whose kind is without NVLink, is taken for the one whose name it shares or whose memory
    comes nearest, with messages over PCIe; the profile's name then says so.
    """
    size = {"memory_bytes": float(memory), "gpus_per_node": max(ranks_of_node, 1)}
    for pattern, hardware in KNOWN_CARDS.items():
        if re.search(pattern, name.upper()):
            return replace(hardware, **size)
    by_name = [hardware for sign, hardware in {"H100": H100, "A100": A100}.items() if sign in re.split(r"\W", name)]
    cards = (H100, H200, A100, RTX4090)
    nearest = by_name[0] if by_name else min(cards, key=lambda each: abs(math.log(each.memory_bytes / memory)))
    return replace(
        nearest,
        name=f"{name}, taken for {nearest.name} with PCIe",
        node_bandwidth=RTX4090.node_bandwidth,
        node_latency=RTX4090.node_latency,
        **size,
    )
