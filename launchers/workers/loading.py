"""What the workers that hold a model need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from helios_cp.config.execution import Execution
from helios_cp.config.layout import Layout
from helios_cp.device.device import pick_dtype


@dataclass(frozen=True)
class Loading:
    """What an actor needs to know to load its part: the same for all actors of a pipeline."""

    model: str
    dtype: str
    device: str
    backend: str
    layout: Layout
    timeout: float
    cache: Path | None = None
    execution: Execution = field(default_factory=Execution)

    def torch_device(self) -> torch.device:
        """Ray shows an actor only the card that is its own."""
        return torch.device(self.device, 0) if self.device == "cuda" else torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        return pick_dtype(self.dtype, torch.device(self.device))
