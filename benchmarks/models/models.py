"""diffusers' transformer and ours side by side: the same config, weights and inputs."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from unittest import mock

import torch
from diffusers import HeliosTransformer3DModel
from torch import Tensor

from helios_cp.config.checkpoint import VAE_SPATIAL, TransformerConfig
from helios_cp.model.conditions import History, HistoryCondition, TextCondition
from helios_cp.model.transformer import HeliosTransformer

STAGES = (1, 2, 3)
TEXT_TOKENS = 512
HISTORY_INDICES = {"short": (0, 19), "mid": (17, 18), "long": tuple(range(1, 17))}
NOISY_INDICES = tuple(range(20, 29))


@dataclass(frozen=True)
class Inputs:
    """One forward: noisy latents `[1, C, 9, h, w]`, timestep `[1]`, text `[1, L, text_dim]`, history by name."""

    latents: Tensor
    timestep: Tensor
    text: Tensor
    history: dict[str, Tensor]

    @classmethod
    def random(
        cls, config: TransformerConfig, size: tuple[int, int], stage: int, device: torch.device, dtype: torch.dtype
    ) -> Inputs:
        """Inputs of a pyramid stage of a video of `size` (height, width) pixels; history is at full size at each."""
        rows, columns = (pixels // VAE_SPATIAL for pixels in size)
        shrink = 2 ** (STAGES[-1] - stage)

        def latents(frames: int, rows: int, columns: int) -> Tensor:
            return torch.randn(1, config.in_channels, frames, rows, columns, device=device, dtype=dtype)

        return cls(
            latents(len(NOISY_INDICES), rows // shrink, columns // shrink),
            torch.full((1,), 742, device=device),
            torch.randn(1, TEXT_TOKENS, config.text_dim, device=device, dtype=dtype),
            {name: latents(len(indices), rows, columns) for name, indices in HISTORY_INDICES.items()},
        )


def build_pair(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> tuple[HeliosTransformer3DModel, HeliosTransformer]:
    """The same random weights in both, in `dtype` but for the parameters that both keep in fp32.

    On the meta device there are no weights, and full size costs nothing.
    """
    with torch.device(device):
        theirs = HeliosTransformer3DModel(**dataclasses.asdict(config)).eval()
        for name, parameter in theirs.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if HeliosTransformer.keeps_fp32(name) else dtype)
        ours = HeliosTransformer(config).eval().cast(dtype)
    if device.type != "meta":
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run_theirs(model: HeliosTransformer3DModel, inputs: Inputs) -> Tensor:
    arguments = {"indices_hidden_states": torch.tensor([NOISY_INDICES])}
    for name, latents in inputs.history.items():
        arguments[f"latents_history_{name}"] = latents
        arguments[f"indices_latents_history_{name}"] = torch.tensor([HISTORY_INDICES[name]])
    with _autocast_on_meta() if inputs.latents.is_meta else contextlib.nullcontext():
        return model(inputs.latents, inputs.timestep, inputs.text, return_dict=False, **arguments)[0]


def encode_history(model: HeliosTransformer, inputs: Inputs) -> HistoryCondition:
    indices = {f"{name}_indices": HISTORY_INDICES[name] for name in inputs.history}
    return model.encode_history(History(**inputs.history, **indices))


def run_ours(model: HeliosTransformer, inputs: Inputs, text: TextCondition, history: HistoryCondition | None) -> Tensor:
    return model(inputs.latents, inputs.timestep, text, history, NOISY_INDICES)


def _autocast_on_meta():
    """diffusers turns autocast off around its rotary tables, and `torch.autocast` does not know the meta device."""
    return mock.patch.object(torch, "autocast", lambda **_: contextlib.nullcontext())
