"""How a checkpoint is run on its device: what is compiled, quantised, adapted, cached, and kept off the card.

Nothing here imports torch: a wrong combination is refused before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_cp.config.arguments import flag
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import RequestError
from helios_cp.config.json_types import check_types
from helios_cp.config.paths import absolute_path_text, expand

QUANTIZATIONS = ("fp8", "int8", "int4")
OFFLOADS = ("none", "model", "group")
OWN_ENGINES = ("native", "cudnn", "flash")
"""Attention whose messages are our own, of which it is known what a graph makes of them."""


@dataclass(frozen=True)
class Target:
    """The kind of device that work is done on, which the machine that checks a call need not have.

    `capability` is the CUDA compute capability of the card, if it is one and it is known.
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
        "torch.compile the blocks and the VAE decoder; the first chunk waits for it",
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
    vae_channels_last: bool = flag(
        False, "lay the VAE's convolutions out channel by channel, as tensor cores read them"
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
        (),
        "a LoRA, DoRA, LoHa or LoKr; repeat it for several",
        "PATH[:WEIGHT]",
        repeat=True,
        convert=Adapter.parse,
    )
    block_cache: float | None = flag(
        None,
        "skip a step's other blocks while the first one's output changes by less than this share, such as 0.08; Base "
        "and Mid; not exact (default: off)",
        "THRESHOLD",
    )

    def check(self, *, device: str, capability: tuple[int, int] | None, is_distilled: bool) -> None:
        """Raises `RequestError` for what does not go together, or not on this kind of device.

        `capability` is the CUDA compute capability of the card, where there is one.
        """
        for name, value, allowed in (
            ("--quantize", self.quantize, (None, *QUANTIZATIONS)),
            ("--offload", self.offload, OFFLOADS),
            ("--vae-dtype", self.vae_dtype, DTYPES),
        ):
            if value not in allowed:
                raise RequestError(f"{name} {value}: allowed are {', '.join(filter(None, allowed))}")
        if self.compile_cache is not None and not self.compile:
            raise RequestError(f"--compile-cache {self.compile_cache}: only allowed beside --compile")
        if self.cuda_graphs:
            self._check_graphs(device)
        if self.quantize == "fp8" and device == "cuda" and capability is not None and capability < (9, 0):
            raise RequestError(
                f"--quantize fp8: this card has compute capability {capability[0]}.{capability[1]}, 9.0 or higher is "
                "needed (Hopper and newer); int8 and int4 run on older cards"
            )
        if self.block_cache is not None:
            if not (math.isfinite(self.block_cache) and self.block_cache > 0):
                raise RequestError(f"--block-cache {self.block_cache:g}: a finite number above 0 is allowed")
            if is_distilled:
                raise RequestError(
                    f"--block-cache {self.block_cache:g}: Helios-Distilled has too few steps for it; only Base and Mid "
                    "take it"
                )
        for adapter in self.lora:
            if not Path(adapter.path).exists():
                raise RequestError(f"--lora {adapter.path}: there is no such file or folder")

    def check_all(
        self,
        target: Target,
        *,
        is_distilled: bool,
        backend: str = "gloo",
        ranks: int = 1,
        shard_weights: bool = False,
        attention: str = "native",
    ) -> None:
        """All of `check`, `check_layout` and `check_graphs`, before anything is loaded. Raises `RequestError`."""
        self.check(device=target.kind, capability=target.capability, is_distilled=is_distilled)
        self.check_layout(shard_weights)
        self.check_graphs(backend, ranks, shard_weights, attention)

    def check_layout(self, shard_weights: bool) -> None:
        """Raises `RequestError` for what does not go with weights that are sharded over the ranks."""
        if shard_weights and self.offload != "none":
            raise RequestError(
                f"--shard-weights with --offload {self.offload}: give one of the two; --offload needs least of the "
                "card, --shard-weights little of the host"
            )
        if shard_weights and self.quantize is not None:
            raise RequestError(
                f"--shard-weights with --quantize {self.quantize}: give one of the two, as sharded weights are "
                "gathered in the dtype of the model; with --layout auto add --no-shard-weights"
            )

    def home(self, device: Any) -> Any:
        """Where weights are loaded that are to work on `device`."""
        return device if self.offload == "none" else "cpu"

    def _check_graphs(self, device: str) -> None:
        if device != "cuda":
            raise RequestError(f"--cuda-graphs: not on {device}; only --device cuda has them")
        if self.offload != "none":
            raise RequestError(
                f"--cuda-graphs with --offload {self.offload}: give one of the two; a graph needs its weights in one "
                "place on the card"
            )
        if self.block_cache is not None:
            raise RequestError(
                f"--cuda-graphs with --block-cache {self.block_cache:g}: give one of the two; a graph skips no block"
            )

    def check_graphs(self, backend: str, ranks: int, shard_weights: bool, attention: str = "native") -> None:
        """Raises `RequestError` where a graph cannot hold what this layout does in a forward."""
        if not self.cuda_graphs:
            return
        if ranks > 1 and backend == "gloo":
            raise RequestError(
                "--cuda-graphs with --backend gloo: give --backend nccl; a graph cannot hold messages that the host "
                "sends"
            )
        if shard_weights:
            raise RequestError(
                "--cuda-graphs with --shard-weights: give one of the two; a graph needs its weights in one place on "
                "the card"
            )
        if attention not in OWN_ENGINES:
            raise RequestError(
                f"--cuda-graphs with --attention {attention}: allowed are {', '.join(OWN_ENGINES)}; that package's "
                "messages are not made to be captured"
            )

    def bits(self) -> dict[str, Any]:
        """What decides bits of the video, by flag: a resumed run must not change it."""
        free = ("compile_cache", "offload", "cuda_graphs")
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in free}

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` reads it back to an equal execution."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Execution:
        """Raises `TypeError` for names or types that an execution does not have."""
        adapters = values.get("lora", ())
        for entry in adapters:
            check_types(Adapter, entry)
        values = {**values, "lora": tuple(Adapter(**entry) for entry in adapters)}
        check_types(cls, values)
        return cls(**values)
