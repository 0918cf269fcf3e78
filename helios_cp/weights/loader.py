"""What a pipeline loads, as one object, so that another can be given in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.execution import Execution
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.load import load_scheduler, load_text_encoder, load_vae
from helios_cp.weights.placement import Placement
from helios_cp.weights.transformer import AdapterState, load_adaptable

if TYPE_CHECKING:
    from diffusers import HeliosDMDScheduler, HeliosScheduler
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

    from helios_cp.model.vae.autoencoder import Autoencoder


class Loader:
    """Loads the parts of a checkpoint from its files. A subclass can make them in another way, as benchmarks do."""

    def transformer(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        execution: Execution,
        placement: Placement,
    ) -> tuple[HeliosTransformer, AdapterState | None]:
        """What this rank holds of it, quantised and adapted already; `None` where adapters cannot be exchanged."""
        return load_adaptable(checkpoint, dtype, device, execution, placement)

    def text_encoder(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        return load_text_encoder(checkpoint, device, dtype)

    def vae(self, checkpoint: Checkpoint, device: torch.device) -> Autoencoder:
        return load_vae(checkpoint, device)

    def scheduler(self, checkpoint: Checkpoint) -> HeliosScheduler | HeliosDMDScheduler:
        return load_scheduler(checkpoint)
