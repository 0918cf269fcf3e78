"""Small Helios checkpoints, so that everything runs without a download: trained ones and ones of random weights.

A preset is a whole checkpoint folder that diffusers loads too: same classes, same layout, every switch of Helios on.
Its weights come from a fixed seed and are scaled so that each of them has a visible effect on the output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from helios_cp.config.errors import RequestError
from helios_cp.config.imports import without_progress_bars
from helios_cp.config.paths import user_path

LAYOUT = 1
"""Raise this when the code here writes other files than before. A changed preset needs no raise."""

EMBEDDED = Path(__file__).parent / "embedded"
"""Trained weights that the package carries; `helios_cp.tiny` makes them."""
DEFAULT_CACHE = Path("~/.cache/helios_cp")
SHARD_SIZE = "1MB"  # several shards even for a model this small, as real checkpoints have

TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "rope_dim": [8, 8, 8],
    "ffn_dim": 192,
    "num_layers": 3,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "guidance_cross_attn": True,
    "zero_history_timestep": True,
    "has_multi_term_memory_patch": True,
    "is_amplify_history": True,
    "history_scale_mode": "per_head",
}
VAE = {"z_dim": 16, "base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0}
TEXT_ENCODER = {
    "vocab_size": 384,  # what ByT5Tokenizer has: bytes, special tokens and sentinels
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
}

GAINS = {"proj_out.weight": 0.5, "decoder.conv_out.weight": 0.5}
"""Factors on single parameters. With them velocities have about unit variance, and decoded noise a standard deviation
of about 0.3, so that few pixels reach ±1."""


@dataclass(frozen=True)
class Preset:
    """How one tiny checkpoint differs from the others, in the words of diffusers."""

    description: str
    pipeline: str
    scheduler: str
    scheduler_config: Mapping[str, Any]
    seed: int
    flags: Mapping[str, bool] = field(default_factory=dict)
    weights: str | None = None
    """The file of the transformer in `EMBEDDED`, without its suffix; `None` where weights are random."""

    @property
    def digest(self) -> str:
        """Changes with anything that changes the files."""
        definition = [LAYOUT, SHARD_SIZE, TRANSFORMER, VAE, TEXT_ENCODER, GAINS, asdict(self)]
        if self.weights is not None:
            parts = (self.weights, "vae", "text_encoder")
            contents = [(EMBEDDED / f"{part}.safetensors").read_bytes() for part in parts]
            definition += [hashlib.sha256(content).hexdigest() for content in contents]
        return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


UNIPC = {"scheduler_type": "unipc", "use_dynamic_shifting": True, "time_shift_type": "exponential"}

RANDOM: Mapping[str, Preset] = {
    "random-base": Preset(
        description="one stage, UniPC, guidance",
        pipeline="HeliosPipeline",
        scheduler="HeliosScheduler",
        scheduler_config={"stages": 1, "stage_range": [0, 1], **UNIPC},
        seed=1,
    ),
    "random-mid": Preset(
        description="three stages, UniPC, CFG-Zero*",
        pipeline="HeliosPyramidPipeline",
        scheduler="HeliosScheduler",
        scheduler_config={"stages": 3, **UNIPC},
        seed=2,
        flags={"is_cfg_zero_star": True},
    ),
    "random-distilled": Preset(
        description="three stages, distilled to few steps, no guidance",
        pipeline="HeliosPyramidPipeline",
        scheduler="HeliosDMDScheduler",
        scheduler_config={"stages": 3, "use_dynamic_shifting": True, "time_shift_type": "linear"},
        seed=3,
        flags={"is_distilled": True},
    ),
}

PRESETS: Mapping[str, Preset] = {
    **{name.replace("random", "tiny"): replace(preset, weights=name.split("-")[1]) for name, preset in RANDOM.items()},
    **RANDOM,
}


def preset_folder(name: str, cache: Path | None = None) -> Path:
    """The checkpoint folder of a preset below `cache` (by default `~/.cache/helios_cp`), written on first use.

    Several processes may do this at once: a folder appears whole or not at all, and the first to finish wins.
    Raises `KeyError` for an unknown name and `OSError` if the cache cannot be written.
    """
    cache = (cache or DEFAULT_CACHE).expanduser()
    folder = cache / f"{name}-{PRESETS[name].digest}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".writing-") as temporary:
        written = Path(temporary) / name
        write_preset(name, written)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def write_preset(name: str, folder: Path) -> None:
    """Write the preset's checkpoint into `folder`. The same name gives the same bytes of weights every time.

    Raises `KeyError` for an unknown name.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    preset = PRESETS[name]
    if preset.weights is not None:
        write_trained(name, EMBEDDED, folder)
        return
    transformer = diffusers.HeliosTransformer3DModel(**TRANSFORMER)
    vae = diffusers.AutoencoderKLWan(**VAE)
    text_encoder = UMT5EncoderModel(UMT5Config(**TEXT_ENCODER))
    for module in (transformer, vae, text_encoder):
        _fill(module, preset.seed)
    _save(preset, transformer, vae, text_encoder, folder, random_weights=True)


def write_trained(name: str, weights: Path, folder: Path) -> None:
    """Write a checkpoint of the preset's kind with trained weights, from the files that `read_trained` reads.

    Raises `KeyError` for an unknown name and `RequestError` for weights that do not fit.
    """
    transformer, vae, text_encoder = read_trained(weights, name.removeprefix("tiny-"))
    _save(PRESETS[name], transformer, vae, text_encoder, folder, rendered_world=True)


def read_trained(folder: Path, variant: str) -> list[Any]:
    """The transformer of a variant ("base", "mid" or "distilled"), the VAE and the text encoder, as diffusers has them.

    A safetensors file each has the weights, and in its metadata the config. Raises `RequestError` when one is missing
    or holds no such part.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    makers = {
        variant: lambda config: diffusers.HeliosTransformer3DModel(**config),
        "vae": lambda config: diffusers.AutoencoderKLWan(**config),
        "text_encoder": lambda config: UMT5EncoderModel(UMT5Config(**config)),
    }
    parts = []
    for name, make in makers.items():
        path = folder / f"{name}.safetensors"
        try:
            parts.append(_read_part(path, make))
        except FileNotFoundError:
            raise RequestError(f"{path}: the file is missing; helios_cp.tiny.train embed writes it") from None
        except Exception as error:  # whatever a foreign file brings up
            raise RequestError(f"{path}: holds no weights of such a part: {error}") from None
    return parts


def _read_part(path: Path, make: Callable[[dict[str, Any]], Any]) -> Any:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        module = make(json.loads((file.metadata() or {})["config"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name: tensors[name].float() for name in module.state_dict() if name in tensors}
    missing = set(dict(module.named_parameters())) - set(state)
    if missing or len(state) < len(tensors):
        odd = min(missing or set(tensors) - set(state))
        raise ValueError(f"{odd} is not both in the file and in its config")
    module.load_state_dict(state, strict=False)  # tied parameters appear twice in the module and once in the file
    return module


def _save(preset: Preset, transformer: Any, vae: Any, text_encoder: Any, folder: Path, **about: bool) -> None:
    """Write the parts as a checkpoint folder of diffusers, `about` in its index: what `Checkpoint` reads there."""
    import diffusers
    from transformers import ByT5Tokenizer

    pipeline = getattr(diffusers, preset.pipeline)(
        tokenizer=ByT5Tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=getattr(diffusers, preset.scheduler)(**preset.scheduler_config),
        **preset.flags,
    )
    pipeline.register_to_config(**about)
    with without_progress_bars():
        pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_SIZE)


def _fill(module: Any, seed: int) -> None:
    """Draw all parameters anew, so that activations stay near unit variance and no parameter is neutral."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise) * GAINS.get(name, 1.0))


def _scaled(name: str, noise: Any) -> Any:
    """Standard normal `noise` to values that suit the parameter called `name`."""
    *_, parent, last = f".{name}".split(".")
    if last == "bias":
        return 0.1 * noise
    if last == "gamma" or "norm" in parent:
        return 1 + 0.1 * noise
    if last == "scale_shift_table":
        return 0.3 * noise
    if last == "history_key_scale" or parent in ("shared", "relative_attention_bias"):
        return noise
    return noise / math.sqrt(noise[0].numel())  # weights of linear layers and convolutions: 1 / sqrt(fan-in)


def main(arguments: list[str] | None = None) -> int:
    """Command line: write a preset into a folder and list its files."""
    parser = argparse.ArgumentParser(prog="python -m helios_cp.weights.presets", description=main.__doc__)
    parser.add_argument("--write", metavar="DIR", type=user_path, required=True, help="an empty or new folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="random-distilled")
    parser.add_argument(
        "--weights",
        metavar="DIR",
        type=user_path,
        help="trained weights, from helios_cp.tiny.train (default: random ones)",
    )
    options = parser.parse_args(arguments)
    folder: Path = options.write
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"--write {folder}: the folder must be empty or new", file=sys.stderr)
        return 2
    try:
        if options.weights is None:
            write_preset(options.preset, folder)
        else:
            write_trained(options.preset, options.weights, folder)
    except RequestError as error:
        print(f"--weights {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--write {folder}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    kind = "random weights" if options.weights is None else f"weights from {options.weights}"
    print(f"{options.preset}: {PRESETS[options.preset].description}; {kind}")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>10,}  {file.relative_to(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
