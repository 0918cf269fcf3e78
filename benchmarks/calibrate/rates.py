"""Programs whose work is counted and whose time gives a rate of this machine: products, attention, passes, decoding.

None of them is a part of Helios timed as a whole but the VAE, whose decoder is timed at several widths. On a CPU the
ranks that are to compute at one time compute at one time here too, so that they share caches and memory.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring.counting import count
from helios_cp.device.device import dtype_name
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.plan.forward_cost import AttentionCall, Product
from helios_cp.plan.vae_cost import decode_flops

SAMPLE_SECONDS = 0.004
"""Least time between two looks at the clock: shorter calls are repeated."""

LEAST_SAMPLES = 3
BEYOND_CACHES = {"cpu": 2**26, "cuda": 2**28}
"""Bytes of weights that no cache holds together."""

LAUNCHES = 200
"""Launches in a row, by which the cost of one is told from that of waiting for the device."""


@dataclass(frozen=True)
class Settings:
    """Shapes to measure. `products` are (inner, columns); `vae` is (channels of every level, rows and columns)."""

    rows: tuple[int, ...]
    products: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    heads: int
    head_dim: int
    passes: tuple[int, int]
    pass_dtype: torch.dtype
    vae: tuple[tuple[VaeConfig, tuple[int, int, int]], ...]
    seconds: float

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Settings:
        """On a GPU the sizes of Helios-14B, which take too long on a CPU; there, widths that one core can compute."""
        if device.type == "cuda":
            return cls(
                rows=(64, 1024, 8192) if quick else (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384),
                products=((5120, 5120),) if quick else ((5120, 5120), (5120, 15360), (5120, 13824), (13824, 5120)),
                tokens=(512, 4096) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384),
                heads=40,
                head_dim=128,
                passes=(8192, 5120),
                pass_dtype=torch.bfloat16,
                vae=((VaeConfig(), (3, 24, 40) if quick else (9, 48, 80)),),
                seconds=0.05 if quick else 0.3,
            )
        return cls(
            rows=(16, 256) if quick else (16, 64, 256, 1024, 4096),
            products=((256, 256),) if quick else ((512, 512), (512, 2048), (2048, 512), (1024, 1024)),
            tokens=(64, 256) if quick else (64, 256, 1024, 4096),
            heads=4,
            head_dim=128,
            passes=(256, 256) if quick else (1024, 512),
            pass_dtype=torch.float32,
            vae=tuple((level_of(width), (5, side, side)) for width, side in (((8, 4),) if quick else VAE_SIZES)),
            seconds=0.02 if quick else 0.25,
        )


VAE_SIZES = ((8, 12), (16, 12), (32, 8), (64, 6), (128, 4))


def level_of(width: int) -> VaeConfig:
    """A VAE that is as wide at every level, so that its rate belongs to a width."""
    return VaeConfig(base_dim=width, dim_mult=(1, 1, 1, 1), num_res_blocks=1)


@dataclass(frozen=True)
class Program:
    """What is timed. `work` is FLOPs, bytes, or calls of one `run`, by `kind`."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    work: int
    run: Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """`seconds` of a call, the median over the samples and then over the ranks that were busy at once."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    work: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.work / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.rate}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measurement:
        fields = {name: values[name] for name in ("kind", "dtype", "work", "seconds")}
        return cls(shape=tuple(values["shape"]), **fields)


def product(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> Program:
    """A linear layer: `[rows, inner]` to `[rows, columns]`, of random data.

    As in a model, whose layers come one after the other, weights have left the caches since they were last used.
    """
    states = torch.randn(rows, inner, device=device).to(dtype)
    weight, bias = torch.randn(columns, inner, device=device).to(dtype), torch.randn(columns, device=device).to(dtype)
    layers = 1 + BEYOND_CACHES[device.type] // weight.nbytes
    weights = itertools.cycle([weight, *(weight.clone() for _ in range(layers - 1))])
    work = Product(rows, inner, columns).flops
    return Program("product", (rows, inner, columns), dtype, work, lambda: F.linear(states, next(weights), bias))


def attention(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Program:
    """All tokens to all tokens, laid out as the engine has them, `[1, S, H, D]`."""
    query, key, value = (torch.randn(1, tokens, heads, head_dim, device=device).to(dtype) for _ in range(3))

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))
        return out.transpose(1, 2)

    work = AttentionCall(tokens, tokens, heads, head_dim).flops
    return Program("attention", (tokens, heads, head_dim), dtype, work, run)


def passes(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Program]:
    """Passes over `[1, tokens, width]`, each of a kind in `plan.forward_cost.PASSES`; bytes are counted as they run."""

    def tensors(place: torch.device) -> dict[str, Callable[[], Tensor]]:
        states, other = (torch.zeros(1, tokens, width, device=place, dtype=dtype) for _ in range(2))
        wide = torch.zeros(1, tokens, width, device=place)
        weight = torch.ones(width, device=place)
        typed = weight.to(dtype)
        pairs = torch.zeros(1, tokens, width // 2, device=place, dtype=torch.complex64)
        turns = torch.ones(tokens, width // 2, device=place, dtype=torch.complex64)
        if place.type != "meta":
            for each in (states, other, wide, pairs):
                each.normal_()
        return {
            "copy, clone": lambda: states.clone(),
            "copy, sum": lambda: states.add_(other, alpha=1e-6),
            "norm, layer": lambda: F.layer_norm(wide, weight.shape, weight, weight),
            "norm, root mean square": lambda: F.rms_norm(states, typed.shape, typed),
            "rotation": lambda: pairs.mul_(turns),
            "activation": lambda: F.gelu(states, approximate="tanh"),
        }

    counted = tensors(torch.device("meta"))
    for kind, run in tensors(device).items():
        yield Program(kind, (tokens, width), dtype, count(counted[kind]).elementwise_bytes, run)


def launches(device: torch.device) -> Iterator[Program]:
    """Kernels with nothing to do, as many as `work`, called as a model calls them: by modules and on views."""
    states, layer = torch.zeros(1, 8, 8, device=device), nn.Linear(8, 8, device=device)

    def repeat(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(LAUNCHES):
                call()

        return run

    yield Program(
        "launch, sum of views", (8, 8), torch.float32, LAUNCHES, repeat(lambda: states[:, 1:] + states[:, :1])
    )
    yield Program("launch, linear layer", (8, 8), torch.float32, LAUNCHES, repeat(lambda: layer(states)))


def decoding(config: VaeConfig, size: tuple[int, int, int], device: torch.device) -> Program:
    """The VAE's decoding of latents of `size` (frames, rows, columns) in fp32."""
    with device:
        vae = Autoencoder(config).eval()
    latents = torch.randn(1, config.z_dim, *size, device=device)
    work = decode_flops(config, *size)
    return Program("decoding", (config.base_dim, *size), torch.float32, work, lambda: vae.decode(latents))


def programs(settings: Settings, device: torch.device) -> Iterator[Program]:
    """All that one rank measures, each made when its turn comes."""
    for dtype in (torch.float32, torch.bfloat16):
        for inner, columns in settings.products:
            yield from (product(rows, inner, columns, dtype, device) for rows in settings.rows)
        yield from (attention(tokens, settings.heads, settings.head_dim, dtype, device) for tokens in settings.tokens)
    yield from passes(*settings.passes, settings.pass_dtype, device)
    yield from launches(device)
    yield from (decoding(config, size, device) for config, size in settings.vae)


@torch.inference_mode()
def measure(
    settings: Settings, device: torch.device, progress: Callable[[Measurement], None] = lambda _: None
) -> list[Measurement]:
    """Time all programs, in step with the other ranks of the process group, if there is one."""
    torch.manual_seed(0)
    found = []
    for program in programs(settings, device):
        if dist.is_initialized():
            dist.barrier()
        seconds = time_call(program.run, device, settings.seconds)
        found.append(Measurement(program.kind, program.shape, dtype_name(program.dtype), program.work, seconds))
        progress(found[-1])
    return found


def measure_on_rank(rank: int, settings: Settings) -> list[Measurement]:
    """As `measure`, of a CPU rank."""
    return measure(settings, torch.device("cpu"))


def over_ranks(found: list[list[Measurement]]) -> list[Measurement]:
    """What one rank of several busy ones reaches: the median of their seconds, program by program."""
    return [
        Measurement(
            each.kind, each.shape, each.dtype, each.work, statistics.median(rank[index].seconds for rank in found)
        )
        for index, each in enumerate(found[0])
    ]


def time_call(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median seconds of a call, over samples of several calls that take `seconds` in all; one call warms up."""

    def sample(calls: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        return time.perf_counter() - start

    sample(1)
    calls = max(1, round(SAMPLE_SECONDS / max(sample(1), 1e-7)))
    samples: list[float] = []
    while len(samples) < LEAST_SAMPLES or sum(samples) < seconds:
        samples.append(sample(calls))
    return statistics.median(samples) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
