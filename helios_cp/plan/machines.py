"""The kinds of machines that are built in, and which of them stands for the machine at hand.

What no data sheet says and nobody measured is assumed, and says so.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from helios_cp.config.errors import RequestError
from helios_cp.plan.hardware import GIGA, MICRO, TERA, Hardware, read_profile

GIBI = 2**30
"""What sellers of cards call a gigabyte of memory."""

H100 = Hardware(
    name="h100",
    peak_flops=989.4 * TERA,
    peak_vae_flops=494.7 * TERA,
    matmul_flops=720 * TERA,
    matmul_fp32_flops=49 * TERA,
    attention_flops=600 * TERA,
    attention_fp32_flops=40 * TERA,
    vae_flops=95 * TERA,
    memory_bandwidth=0.88 * 3350 * GIGA,
    memory_bytes=80 * GIBI,
    kernel_seconds=5 * MICRO,
    node_bandwidth=0.8 * 450 * GIGA,
    node_latency=20 * MICRO,
    network_bandwidth=0.85 * 50 * GIGA,
    network_latency=40 * MICRO,
    sources=(
        ("peak_flops", "NVIDIA H100 SXM data sheet: bf16, dense"),
        ("peak_vae_flops", "NVIDIA H100 SXM data sheet: TF32, dense"),
        ("matmul_flops", "assumed: large cuBLAS products, 73 % of the peak"),
        ("matmul_fp32_flops", "assumed: 73 % of the data sheet's 67 TFLOP/s outside tensor cores"),
        ("attention_flops", "assumed: FlashAttention-3, forward, head dim 128"),
        ("attention_fp32_flops", "assumed: 60 % of the data sheet's 67 TFLOP/s"),
        ("vae_flops", "modelled of diffusers' decoder: 69.3 TFLOP of a chunk in 0.73 s; ours has met no card yet"),
        ("memory_bandwidth", "assumed: 88 % of the data sheet's 3.35 TB/s"),
        ("memory_bytes", "NVIDIA H100 SXM data sheet"),
        ("kernel_seconds", "assumed: eager PyTorch"),
        ("node_bandwidth", "assumed: 80 % of NVLink's 450 GB/s each way"),
        ("node_latency", "assumed: one NCCL call"),
        ("network_bandwidth", "assumed: 85 % of InfiniBand's 50 GB/s for each GPU"),
        ("network_latency", "assumed: one NCCL call"),
        ("gpus_per_node", "DGX H100"),
        ("overlap", "assumed: NCCL beside computing"),
    ),
)

H200 = replace(
    H100,
    name="h200",
    matmul_flops=790 * TERA,
    memory_bandwidth=4300 * GIGA,
    memory_bytes=141 * GIBI,
    sources=(
        *(pair for pair in H100.sources if pair[0] not in ("matmul_flops", "memory_bandwidth", "memory_bytes")),
        ("matmul_flops", "measured on one H200: bf16 products of random data"),
        ("memory_bandwidth", "measured on one H200: copies"),
        ("memory_bytes", "NVIDIA H200 data sheet"),
    ),
)

A100 = replace(
    H100,
    name="a100-80",
    peak_flops=312 * TERA,
    peak_vae_flops=156 * TERA,
    matmul_flops=0.73 * 312 * TERA,
    matmul_fp32_flops=0.73 * 19.5 * TERA,
    attention_flops=0.6 * 312 * TERA,
    attention_fp32_flops=0.6 * 19.5 * TERA,
    vae_flops=30 * TERA,
    memory_bandwidth=0.88 * 2039 * GIGA,
    node_bandwidth=0.8 * 300 * GIGA,
    network_bandwidth=0.85 * 25 * GIGA,
    sources=(
        ("peak_flops", "NVIDIA A100 80GB SXM data sheet: bf16, dense"),
        ("peak_vae_flops", "NVIDIA A100 80GB SXM data sheet: TF32, dense"),
        ("matmul_flops", "assumed: 73 % of the peak, as for h100"),
        ("matmul_fp32_flops", "assumed: 73 % of the data sheet's 19.5 TFLOP/s"),
        ("attention_flops", "assumed: FlashAttention-2, forward, 60 % of the peak"),
        ("attention_fp32_flops", "assumed: 60 % of the data sheet's 19.5 TFLOP/s"),
        ("vae_flops", "assumed: 19 % of the TF32 peak, as for h100"),
        ("memory_bandwidth", "assumed: 88 % of the data sheet's 2.039 TB/s"),
        ("memory_bytes", "NVIDIA A100 80GB SXM data sheet"),
        ("kernel_seconds", "assumed: eager PyTorch"),
        ("node_bandwidth", "assumed: 80 % of NVLink's 300 GB/s each way"),
        ("node_latency", "assumed: one NCCL call"),
        ("network_bandwidth", "assumed: 85 % of InfiniBand's 25 GB/s for each GPU"),
        ("network_latency", "assumed: one NCCL call"),
        ("gpus_per_node", "DGX A100"),
        ("overlap", "assumed: NCCL beside computing"),
    ),
)

RTX4090 = replace(
    A100,
    name="rtx4090",
    peak_flops=165.2 * TERA,
    peak_vae_flops=82.6 * TERA,
    matmul_flops=0.9 * 165.2 * TERA,
    matmul_fp32_flops=0.6 * 82.6 * TERA,
    attention_flops=0.8 * 165.2 * TERA,
    attention_fp32_flops=0.4 * 82.6 * TERA,
    vae_flops=0.19 * 82.6 * TERA,
    memory_bandwidth=0.88 * 1008 * GIGA,
    memory_bytes=24 * GIBI,
    node_bandwidth=0.4 * 32 * GIGA,
    node_latency=30 * MICRO,
    network_bandwidth=0.85 * 3.125 * GIGA,
    network_latency=60 * MICRO,
    sources=(
        ("peak_flops", "NVIDIA Ada white paper: bf16 with fp32 sums, dense"),
        ("peak_vae_flops", "NVIDIA Ada white paper: TF32, dense"),
        ("matmul_flops", "assumed: 90 % of the peak"),
        ("matmul_fp32_flops", "assumed: 60 % of the white paper's 82.6 TFLOP/s"),
        ("attention_flops", "assumed: FlashAttention-2, forward, 80 % of the peak"),
        ("attention_fp32_flops", "assumed: 40 % of the white paper's 82.6 TFLOP/s"),
        ("vae_flops", "assumed: 19 % of the TF32 peak, as for h100"),
        ("memory_bandwidth", "assumed: 88 % of the white paper's 1.008 TB/s"),
        ("memory_bytes", "NVIDIA Ada white paper"),
        ("kernel_seconds", "assumed: eager PyTorch"),
        ("node_bandwidth", "assumed: 40 % of PCIe 4.0 x16's 32 GB/s, through host memory, as there is no peer access"),
        ("node_latency", "assumed: one NCCL call"),
        ("network_bandwidth", "assumed: 85 % of 25 Gb/s Ethernet for each GPU"),
        ("network_latency", "assumed: one NCCL call"),
        ("gpus_per_node", "assumed"),
        ("overlap", "assumed: NCCL beside computing"),
    ),
)

CPU = Hardware(
    name="cpu",
    peak_flops=150 * GIGA,
    peak_vae_flops=150 * GIGA,
    matmul_flops=100 * GIGA,
    matmul_fp32_flops=100 * GIGA,
    attention_flops=60 * GIGA,
    attention_fp32_flops=60 * GIGA,
    vae_flops=25 * GIGA,
    memory_bandwidth=8 * GIGA,
    memory_bytes=16 * GIBI,
    kernel_seconds=10 * MICRO,
    node_bandwidth=1.5 * GIGA,
    node_latency=200 * MICRO,
    network_bandwidth=1 * GIGA,
    network_latency=400 * MICRO,
    gpus_per_node=64,
    launches_overlap=False,
    overlap=0.0,
    sources=tuple(
        (name, "assumed: one core with AVX-512 or two AVX2 units, gloo over loopback; calibrate for any other figure")
        for name in (
            *("peak_flops", "peak_vae_flops", "matmul_flops", "matmul_fp32_flops", "attention_flops"),
            *("attention_fp32_flops", "vae_flops", "memory_bandwidth", "memory_bytes", "kernel_seconds"),
            *("node_bandwidth", "node_latency", "network_bandwidth", "network_latency", "gpus_per_node"),
            "overlap",
        )
    ),
)

PROFILES: Mapping[str, Hardware] = {each.name: each for each in (H100, H200, A100, RTX4090, CPU)}


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
