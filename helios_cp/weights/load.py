"""From what `--model` says to loaded parts.

`resolve` finds the checkpoint, downloads what of it is missing, and reads its JSON files only; the `load_*` functions
read weights, from safetensors files on disk and never from the network or a pickle. Heavy libraries are imported where
they are used, so that `resolve` stays quick.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_cp.config.checkpoint import VAE_SPATIAL, VAE_TEMPORAL, WEIGHT_STEMS, Checkpoint
from helios_cp.config.errors import CheckpointError, RequestError
from helios_cp.config.imports import without_progress_bars
from helios_cp.files.tensor_files import Reader, and_others, check_fit, read_json, stored_tensors, weight_files
from helios_cp.weights.hub import HubId, describe, download_weights, snapshot_in
from helios_cp.weights.presets import DEFAULT_CACHE, PRESETS, preset_folder

if TYPE_CHECKING:
    import torch
    from diffusers import HeliosDMDScheduler, HeliosScheduler
    from torch import nn
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

    from helios_cp.model.vae.autoencoder import Autoencoder
    from helios_cp.model.vae.config import VaeConfig

SCHEDULERS = ("HeliosScheduler", "HeliosDMDScheduler")


def resolve(model: str, cache: Path | None = None, *, weights: Iterable[str] = tuple(WEIGHT_STEMS)) -> Checkpoint:
    """The checkpoint that `model` stands for, without reading weights.

    `model` is, in this order, the name of a preset (written below `cache` on first use), a folder in the diffusers
    layout or of the hub's cache, or a hub id (`helios_cp.weights.hub`). Of a hub id the missing files are downloaded:
    small ones that describe it, and the `weights` of these parts; `()` is enough to check a request. A folder must hold
    all weights in any case. Raises `RequestError` if it is none of these, or not to be had.
    """
    folder, parts = Path(os.path.expanduser(model)), tuple(WEIGHT_STEMS)
    if model in PRESETS:
        folder, source = _preset_folder(model, cache), model
    elif os.path.isdir(folder):
        folder = snapshot_in(folder)
        source = os.path.abspath(folder)
    else:
        hub_id = HubId.parse(model)
        if hub_id is None or os.path.exists(folder):
            raise RequestError(
                f"--model {model}: no such folder; give a folder, a hub id owner/name or a preset: {', '.join(PRESETS)}"
            )
        folder, parts = describe(hub_id), tuple(weights)
        source = f"{hub_id.repository}@{folder.name}"
        download_weights(hub_id, folder, parts)
    checkpoint = Checkpoint.read(folder)
    try:
        for part in parts:
            weight_files(folder / part, WEIGHT_STEMS[part])
    except CheckpointError as error:
        raise RequestError(f"--model {model}: {error}") from None
    return replace(checkpoint, source=source)


def _preset_folder(name: str, cache: Path | None) -> Path:
    try:
        return preset_folder(name, cache)
    except OSError as error:
        raise RequestError(
            f"--model {name}: the cache folder {cache or DEFAULT_CACHE} cannot be written: "
            f"{error.strerror or error}; set HELIOS_CP_CACHE to one that can"
        ) from None
    except RuntimeError:  # of `Path.expanduser`
        raise RequestError(
            f"--model {name}: this user has no home folder for the cache {DEFAULT_CACHE}; set HELIOS_CP_CACHE to a "
            "folder"
        ) from None


def load_vae(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Autoencoder:
    """The VAE, in fp32 unless `dtype` says otherwise. Raises `CheckpointError`."""
    import torch

    from helios_cp.model.vae.autoencoder import Autoencoder

    folder = checkpoint.folder / "vae"
    config = _vae_config(folder, checkpoint.transformer.in_channels)
    stored = stored_tensors(folder, WEIGHT_STEMS["vae"])
    with torch.device("meta"):
        vae = Autoencoder(config).to(dtype or torch.float32)
    check_fit(folder, stored, {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()})
    allocate(vae, device)
    read = Reader(stored)
    vae.load_state_dict({name: read(name) for name in stored})
    return vae.eval().requires_grad_(False)


def allocate(model: nn.Module, device: str | torch.device) -> None:
    """Give a model on the meta device memory.

    As `to_empty`, whose `empty_like` of a meta tensor has torch import sympy, a third of a second. Sharded parameters
    are of a kind of their own, which `to_empty` knows.
    """
    import torch

    if not all(type(parameter) is torch.nn.Parameter for parameter in model.parameters()):
        model.to_empty(device=device)
        return
    model._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device))


def _vae_config(folder: Path, channels: int) -> VaeConfig:
    from helios_cp.model.vae.config import VaeConfig

    file = folder / "config.json"
    try:
        config = VaeConfig.from_dict(read_json(file))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    temporal = 2 ** sum(config.temperal_downsample)
    expectations = (
        ("scale_factor_temporal", config.scale_factor_temporal, temporal, "what its layers do"),
        ("scale_factor_spatial", config.scale_factor_spatial, config.spatial, "what its layers do"),
        ("scale_factor_temporal", config.scale_factor_temporal, VAE_TEMPORAL, "what Helios needs"),
        ("scale_factor_spatial", config.scale_factor_spatial, VAE_SPATIAL, "what Helios needs"),
        ("z_dim", config.z_dim, channels, "the transformer's in_channels"),
        ("the length of latents_mean", len(config.latents_mean), config.z_dim, "z_dim"),
        ("the length of latents_std", len(config.latents_std), config.z_dim, "z_dim"),
    )
    for name, found, expected, meaning in expectations:
        if found != expected:
            raise CheckpointError(f"{file}: {name} is {found}; it must be {expected}, {meaning}")
    return config


def load_text_encoder(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    """The tokenizer and the text encoder, in fp32 unless `dtype` says otherwise. Raises `CheckpointError`."""
    import torch
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    folder = checkpoint.folder / "text_encoder"
    with _blame(folder):
        width = UMT5Config.from_pretrained(folder, local_files_only=True).d_model
    if width != checkpoint.transformer.text_dim:
        raise CheckpointError(
            f"{folder / 'config.json'}: d_model is {width}; it must be {checkpoint.transformer.text_dim}, the "
            "transformer's text_dim"
        )
    stored_tensors(folder, WEIGHT_STEMS["text_encoder"])
    with _blame(folder), without_progress_bars():
        text_encoder, report = UMT5EncoderModel.from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # then the report names them
            local_files_only=True,
            output_loading_info=True,
        )
    _check_report(folder, report)
    _check_embeddings(folder, text_encoder)
    with _blame(checkpoint.folder / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    return tokenizer, text_encoder.to(device).eval().requires_grad_(False)


def _check_embeddings(folder: Path, text_encoder: UMT5EncoderModel) -> None:
    """Refuse a table of words that is empty, because some releases of transformers do not tie its two names."""
    used, shared = text_encoder.encoder.embed_tokens.weight, text_encoder.shared.weight
    if not used.any():
        raise CheckpointError(
            f"{folder}: encoder.embed_tokens.weight is all zeros, so every prompt would mean the same"
        )
    if used is not shared and not used.equal(shared):
        raise CheckpointError(f"{folder}: encoder.embed_tokens.weight differs from shared.weight; they are one table")


def load_scheduler(checkpoint: Checkpoint) -> HeliosScheduler | HeliosDMDScheduler:
    """The scheduler of the class that `scheduler_config.json` names. Raises `CheckpointError`."""
    import diffusers

    file = checkpoint.folder / "scheduler" / "scheduler_config.json"
    name = read_json(file).get("_class_name")
    if name not in SCHEDULERS:
        raise CheckpointError(f"{file}: _class_name is {name!r}; allowed are {', '.join(SCHEDULERS)}")
    with _blame(file):
        return getattr(diffusers, name).from_pretrained(file.parent, local_files_only=True)


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` if diffusers or transformers found keys that do not match."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report.get(kind, ())))
        if keys:
            raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {keys[0]}{and_others(keys)}")


@contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Turn a library's error into a `CheckpointError` of one line that names the file or folder."""
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: cannot be loaded: {reason}") from error
