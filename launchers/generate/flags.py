"""The flags of a call for a cluster: those of `helios_cp.generate`, and those of workers. No Ray, no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from helios_cp.config.arguments import OneLineParser, flag
from helios_cp.config.call import Call
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import cache_folder
from helios_cp.config.ranks import parse_on_rank
from launchers.cluster.address import address_of, check_address
from launchers.schedule.terms import check_workers

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ClusterCall(Call):
    """What a user typed. The layout is that of a group."""

    address: str = flag(
        "local",
        "local: an instance of this call's own; auto: the cluster that RAY_ADDRESS names or that this machine belongs "
        "to; or HOST:PORT (default: local)",
        "WHERE",
        group="cluster",
    )
    groups: int = flag(1, "groups of ranks that denoise", "G")
    ranks: int | None = flag(
        None,
        "ranks of each group; degrees left out follow from it (default: the product of the degrees given; with "
        "--layout auto as many as are modelled as fastest, of those that have room beside decoders and text encoder)",
        "R",
        least=1,
    )
    decoders: int = flag(1, "workers that decode; with 0 each group decodes on its first card, beside denoising", "D")
    spread: bool = flag(False, "put each part of --ring on a node of its own")
    gpus: tuple[float, ...] | None = flag(
        None,
        "cards of each rank, each decoder and the text encoder (default: 1 0.5 0.5 on CUDA)",
        ("RANK", "DECODER", "TEXT"),
        nargs=3,
    )
    undelivered: int = flag(3, "chunks of a video that may lie between denoising and its file", "N", least=1)
    wait: float = flag(
        15.0,
        "how long to wait for the cluster to answer, and then for nodes with what is needed; give more where nodes "
        "come on demand",
        "SECONDS",
        least=1,
    )
    timeline: Path | None = flag(None, "also draw who worked when, as PNG", "FILE")

    def check(self) -> None:
        super().check()
        check_address(self.address)
        if self.device not in DEVICES:
            raise RequestError(f"--device {self.device}: on a cluster allowed are {', '.join(DEVICES)}")
        check_workers(self.groups, self.decoders, self.layout.vae_parallel or 1)
        if not all(0 <= share <= 1 for share in self.gpus or ()):
            raise RequestError(f"{self.typed_gpus}: three numbers from 0 to 1 are allowed, parts of a card")
        for name in ("cfg_parallel", "ring", "ulysses"):
            value = getattr(self.layout, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name.replace('_', '-')} {value}: at least 1 is allowed")
        if self.spread and self.layout.is_auto and self.ranks is None:
            raise RequestError(
                "--layout auto with --spread: say how many ranks a group has over all its nodes, by --ranks"
            )

    @property
    def ranks_of_group(self) -> int:
        """`--ranks`, or the product of the degrees given."""
        degrees = (self.layout.cfg_parallel, self.layout.ring, self.layout.ulysses)
        return self.ranks or math.prod(degree or 1 for degree in degrees)

    @property
    def typed_gpus(self) -> str:
        return f"--gpus {' '.join(f'{share:g}' for share in self.gpus or ())}"


AnyCall = TypeVar("AnyCall", bound=ClusterCall)


def parse_call(
    parser: OneLineParser, kind: type[AnyCall], argv: Sequence[str] | None, alone: str
) -> tuple[AnyCall, Path | None]:
    """The call of a command line, and the folder of the cache; exits with 2 for a bad one.

    `alone` says why the command is no rank of torchrun's.
    """
    arguments, ranks = parse_on_rank(parser, argv, os.environ)
    try:
        if ranks.size > 1:
            raise RequestError(f"WORLD_SIZE {ranks.size} in the environment: {alone}")
        call = kind.of(arguments)
        return replace(call, address=address_of(call.address, os.environ)), cache_folder(os.environ)
    except RequestError as error:
        parser.error(str(error))
