"""How a checkpoint is run on its device: what is compiled, quantised, adapted, cached, and kept off the card.

Nothing here imports torch: a wrong combination is refused before anything heavy is loaded.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from helios_cp.config.arguments import flag
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import absolute_path_text, expand

QUANTIZATIONS = ("fp8", "int8", "int4")
FEATURE_MULTIPLES = {"fp8": 16, "int8": 1, "int4": 32}
"""The features of a quantised linear layer are a multiple of this; with fp8 on CUDA only."""
OFFLOADS = ("none", "model", "group")
OWN_ENGINES = ("native", "cudnn", "flash")
"""Engines that use our own collectives; these can be captured in a CUDA graph."""


@dataclass(frozen=True)
class Target:
    """The kind of device that does the work. The machine that checks a call need not have one.

    `capability` is the card's CUDA compute capability; `None` where there is no such card, or it is not known.
    """

    kind: str
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA file or folder, and how strongly it acts."""

    path: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """From `PATH` or `PATH:WEIGHT`. Raises `RequestError` for a weight that is not finite."""
        path, colon, weight = text.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            colon, value = "", 1.0  # it belongs to the path
        if not math.isfinite(value):
            raise RequestError(f"--lora {text}: a finite weight is allowed after the colon")
        try:
            return cls(os.path.abspath(expand(path if colon else text)), value)
        except RequestError as error:
            raise RequestError(f"--lora {error}") from None

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.path}:{self.weight:g}"


@dataclass(frozen=True)
class Execution:
    """Choices of speed and memory that leave the request as it is; the defaults change no bit.

    `compile_cache` is a folder where compiled code is kept for the next start, once `pipeline.environment.prepare`
    has said so to PyTorch, as command lines do. `block_cache` is the relative change of the first block's output below
    which a step reuses the other blocks' last one (`helios_cp.model.block_cache`).
    """

    compile: bool = flag(
        False,
        "torch.compile the blocks and the norms of the VAE; the first chunk waits for it",
        group="speed and memory of each card",
    )
    compile_cache: str | None = flag(
        None, "keep compiled code there, for the next start", "DIR", parse=absolute_path_text
    )
    cuda_graphs: bool = flag(
        False, "replay each forward as one CUDA graph; helps where launching kernels takes longer than they do"
    )
    quantize: str | None = flag(
        None,
        "linear layers of the blocks: fp8 for speed, Hopper and newer; int8, int4 for memory (default: neither)",
        choices=QUANTIZATIONS,
    )
    vae_dtype: str = flag("float32", "of the VAE (default: float32, as trained)", choices=DTYPES)
    vae_group: int | None = flag(
        None,
        "latent frames that go through the VAE together; fewer need less memory (default: by the free memory)",
        "N",
        least=1,
    )
    tf32: bool = flag(
        True,
        "let the VAE's convolutions in float32 run on TF32 tensor cores, as diffusers does; matrix products never do",
    )
    offload: str = flag(
        "none",
        "keep weights in host memory: model, whole models while they rest; group, block by block",
        choices=OFFLOADS,
    )
    lora: tuple[Adapter, ...] = flag(
        (), "a LoRA, DoRA, LoHa or LoKr; repeat it for several", "PATH[:WEIGHT]", repeat=True, convert=Adapter.parse
    )
    block_cache: float | None = flag(
        None,
        "skip a step's other blocks while the first one's output changes by less than this share, such as 0.08; Base "
        "and Mid; not exact (default: off)",
        "THRESHOLD",
        above=0.0,
    )

    def home(self, device: Any) -> Any:
        """Where weights are loaded that are to work on `device`."""
        return device if self.offload == "none" else "cpu"

    def bits(self) -> dict[str, Any]:
        """What decides bits of the video, by flag: a resumed run must not change it."""
        free = ("compile_cache", "offload", "cuda_graphs")
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in free}
