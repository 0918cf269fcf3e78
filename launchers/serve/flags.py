"""The flags of the live server: those of a cluster, and the server's own. No Ray, no torch, no web framework."""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from helios_cp.config.arguments import add_flags, flag
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Execution
from helios_cp.config.layout import AskedLayout
from helios_cp.config.request import Request
from launchers.generate.flags import ClusterCall
from launchers.serve.limits import Limits

OF_ONE_VIDEO = (
    *("output", "save_latents", "report", "checkpoint_dir", "resume", "prompt_file", "image_folder"),
    *("interpolate_time", "timeline"),
    *("prompt", "prompt_schedule", "image", "video", "num_frames"),
)
"""Flags of `launchers.generate` that name one video's text or files; a session brings these itself."""


@dataclass(frozen=True)
class ServeCall(Limits, ClusterCall):
    """What a user typed. `request` holds what a session has where it does not say."""

    host: str = flag("127.0.0.1", "address to listen on (default: 127.0.0.1)", "HOST", group="server")
    port: int = flag(8000, "port; 0 takes a free one (default: 8000)", "PORT", least=0, most=65535)
    api_key_file: Path | None = flag(
        None, "keys, one a line: a caller must show one of them; needed to listen beyond this machine", "FILE"
    )
    data: Path = flag(
        Path("outputs/live"),
        "folder of sessions and videos; a later start goes on there (default: outputs/live)",
        "DIR",
    )
    lora_folder: Path | None = flag(
        None, "adapters that clients may choose by name: each .safetensors file and each folder of PEFT in it", "DIR"
    )
    lead: float = flag(
        1.0, "chunks that are made ahead of the picture on screen (default: 1)", "CHUNKS", least=1, most=16
    )
    allow_origin: tuple[str, ...] = flag(
        (),
        "another site, such as https://example.org, whose pages may use the server; may be repeated",
        "URL",
        repeat=True,
    )
    log_prompts: bool = flag(False, "log what users write, too")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        for each in (cls, Request, AskedLayout, Execution):
            add_flags(parser, each, without=OF_ONE_VIDEO)

    def check(self) -> None:
        super().check()
        if self.api_key_file is None and not is_loopback(self.host):
            raise RequestError(
                f"--host {self.host}: other machines could steer it without a key; give --api-key-file, or listen on "
                "127.0.0.1"
            )

    @property
    def most_sessions(self) -> int:
        """Sessions that are made at the same time."""
        return self.sessions or self.groups


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. A name other than localhost may stand for any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
