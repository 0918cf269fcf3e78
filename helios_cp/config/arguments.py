"""The command-line flags of a request, shared by every program that takes one.

Nothing here imports torch: a misspelt flag is answered at once.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.console import typed
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import OFFLOADS, QUANTIZATIONS
from helios_cp.config.request import RESIZE_MODES, Request, ScheduledPrompt

DEFAULTS = Request()
DEFAULT_TIMEOUT = 600.0
LONGEST_TIMEOUT = 1e6
"""Seconds that a rank waits for another."""

ENGINES = ("native", "cudnn", "flash", "yunchang", "xfuser")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line on stderr, without the usage text, and exits with 2; abbreviates no flags.

    `is_quiet` is for ranks other than 0, which would say the same.
    """

    is_quiet = False

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.removeprefix("argument ").split())
        if line.startswith("unrecognized arguments"):
            line += "; --help lists the flags, and a text of several words needs quotes"
        self.exit(2, None if self.is_quiet else f"{self.prog}: error: {line}\n")


def whole_number(text: str) -> int:
    """For `type=`: an int, or the error that argparse shows after the flag's name."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """For `type=`: a float, or the error that argparse shows after the flag's name."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a request. Flags that the user leaves out are absent from the namespace."""
    text = parser.add_argument_group("prompts")
    text.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what to show; repeat it for a batch of videos in one call"
    )
    text.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid; Base and Mid only (default: empty)")
    text.add_argument(
        "--prompt-schedule",
        action="append",
        nargs=2,
        metavar=("CHUNKS", "TEXT"),
        help="a prompt and for how many chunks it holds; repeat it to change the prompt while the video runs",
    )
    text.add_argument(
        "--interpolation-steps",
        type=whole_number,
        metavar="N",
        help=f"chunks over which a scheduled prompt blends into the next (default: {DEFAULTS.interpolation_steps})",
    )
    text.add_argument(
        "--max-sequence-length",
        type=whole_number,
        metavar="N",
        help=f"text tokens, longer prompts are cut (default: {DEFAULTS.max_sequence_length})",
    )

    media = parser.add_argument_group("picture or clip to start from")
    media.add_argument("--image", metavar="FILE", help="image to video: a picture, which becomes the first frame")
    media.add_argument("--video", metavar="FILE", help="video to video: the clip to go on from, 33 frames or more")
    media.add_argument(
        "--resize-mode",
        metavar="MODE",
        help=f"{', '.join(RESIZE_MODES)}: how a picture or clip of another shape is brought to --height and --width "
        f"(default: {DEFAULTS.resize_mode}, as diffusers does)",
    )
    for kind in ("image", "video"):
        low, high = getattr(DEFAULTS, f"{kind}_noise_sigma_min"), getattr(DEFAULTS, f"{kind}_noise_sigma_max")
        media.add_argument(
            f"--{kind}-noise-sigma",
            type=number,
            nargs="+",
            metavar=("MIN", "MAX"),
            help=f"two numbers, the range of the noise mixed into the {kind}'s latents (default: {low} {high})",
        )
        media.add_argument(
            f"--add-noise-to-{kind}-latents",
            action=argparse.BooleanOptionalAction,
            help="mix noise into them (default: on)",
        )

    size = parser.add_argument_group("size and seed")
    size.add_argument(
        "--height",
        type=whole_number,
        metavar="PIXELS",
        help=f"a multiple of 64, of 16 for Base (default: {DEFAULTS.height})",
    )
    size.add_argument("--width", type=whole_number, metavar="PIXELS", help=f"likewise (default: {DEFAULTS.width})")
    size.add_argument(
        "--num-frames",
        type=whole_number,
        metavar="N",
        help=f"rounded up to chunks of 33 (default: {DEFAULTS.num_frames})",
    )
    size.add_argument("--fps", type=whole_number, metavar="N", help=f"of the MP4 (default: {DEFAULTS.fps})")
    size.add_argument(
        "--seed",
        type=whole_number,
        nargs="+",
        metavar="N",
        help=f"one, counted upwards for a batch, or one for each prompt (default: {DEFAULTS.seed[0]})",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--guidance-scale", type=number, metavar="X", help="Base and Mid; Distilled ignores it (default: 5.0)"
    )
    sampling.add_argument("--num-inference-steps", type=whole_number, metavar="N", help="Base only (default: 50)")
    sampling.add_argument(
        "--pyramid-steps",
        type=whole_number,
        nargs="+",
        metavar="N",
        help="steps of each stage (default: 20 20 20 for Mid, 2 2 2 for Distilled)",
    )
    sampling.add_argument(
        "--amplify-first-chunk",
        action=argparse.BooleanOptionalAction,
        help="twice the steps for the first chunk; Distilled only (default: on there)",
    )
    sampling.add_argument(
        "--skip-first-chunk",
        action=argparse.BooleanOptionalAction,
        help="anchor the video on its second chunk, for pictures that stay too still (default: off)",
    )
    sampling.add_argument(
        "--keep-first-frame",
        action=argparse.BooleanOptionalAction,
        help="let every chunk see the first frame (default: on)",
    )
    sampling.add_argument(
        "--use-zero-init",
        action=argparse.BooleanOptionalAction,
        help="start from a zero velocity; Mid only (default: on)",
    )
    sampling.add_argument(
        "--zero-steps", type=whole_number, metavar="N", help="up to which step; Mid only (default: 1)"
    )
    sampling.add_argument(
        "--history-sizes",
        type=whole_number,
        nargs="+",
        metavar="N",
        help="three numbers, the latent frames of the long, mid and short history (default: 16 2 1)",
    )
    sampling.add_argument(
        "--num-latent-frames-per-chunk", type=whole_number, metavar="N", help="9 are 33 frames, as trained (default: 9)"
    )


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a layout. Flags that the user leaves out are absent from the namespace."""
    layout = parser.add_argument_group("layout of the ranks (cfg-parallel · ring · ulysses = number of ranks)")
    layout.add_argument(
        "--layout",
        choices=("auto",),
        help="auto: what is modelled as fastest here and fits in memory, see helios_cp.plan; flags given are kept",
    )
    layout.add_argument(
        "--hardware",
        metavar="NAME",
        help="what --layout auto plans for: h100, h200, a100-80, rtx4090, cpu, or a JSON file of benchmarks.calibrate "
        "(default: the cards here)",
    )
    layout.add_argument("--ulysses", type=whole_number, metavar="U", help="share the sequence, tokens against heads")
    layout.add_argument("--ring", type=whole_number, metavar="R", help="share the sequence, keys and values passed on")
    layout.add_argument(
        "--cfg-parallel", type=whole_number, metavar="C", help="2: a branch of guidance each; Base, Mid"
    )
    layout.add_argument("--ffn-tp", type=whole_number, metavar="T", help="split the feed-forward weights; saves memory")
    layout.add_argument("--vae-parallel", type=whole_number, metavar="V", help="split the VAE by rows of the picture")
    layout.add_argument(
        "--shard-weights",
        action=argparse.BooleanOptionalAction,
        help="spread the blocks' weights over all ranks, gathered one block ahead; saves most memory (default: off)",
    )
    layout.add_argument(
        "--attention", choices=ENGINES, help="kernels of the attention (default: native, PyTorch's own)"
    )
    layout.add_argument(
        "--backend", choices=("gloo", "nccl"), help="of the communication (default: nccl on CUDA, gloo elsewhere)"
    )
    layout.add_argument(
        "--timeout",
        type=number,
        metavar="SECONDS",
        help="how long a rank waits for another before the job ends with an error (default: 600)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which checkpoint runs where."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="MODEL",
        help="tiny-base, tiny-mid or tiny-distilled (random weights), a folder in the diffusers layout, or a hub id "
        "such as BestWishYsh/Helios-Distilled, also with @REVISION (default: tiny-distilled)",
    )
    model.add_argument(
        "--dtype",
        choices=(*DTYPES, "auto"),
        help="of the transformer and text encoder (default: auto, float32 on a CPU and bfloat16 elsewhere)",
    )
    model.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, mps, xpu, npu, or one card such as cuda:1 (default: auto, the best present)",
    )


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an execution. Flags that the user leaves out are absent from the namespace."""
    group = parser.add_argument_group("speed and memory of each card")
    add = group.add_argument
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the blocks and the VAE decoder; the first chunk waits for it (default: off)",
    )
    add("--compile-cache", metavar="DIR", help="keep compiled code there, for the next start")
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay each forward as one CUDA graph; helps where launching kernels takes longer than they do "
        "(default: off)",
    )
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        help="linear layers of the blocks: fp8 for speed, Hopper and newer; int8, int4 for memory (default: neither)",
    )
    add("--vae-dtype", choices=DTYPES, help="of the VAE (default: float32, as trained)")
    add(
        "--vae-channels-last",
        action=argparse.BooleanOptionalAction,
        help="lay the VAE's convolutions out channel by channel, as tensor cores read them (default: off)",
    )
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="let the VAE's convolutions in float32 run on TF32 tensor cores, as diffusers does; matrix products never "
        "do (default: on)",
    )
    add(
        "--offload",
        choices=OFFLOADS,
        help="keep weights in host memory: model, whole models while they rest; group, block by block (default: none)",
    )
    add("--lora", action="append", metavar="PATH[:WEIGHT]", help="a LoRA, DoRA, LoHa or LoKr; repeat it for several")
    add(
        "--block-cache",
        type=number,
        metavar="THRESHOLD",
        help="skip a step's other blocks while the first one's output changes by less than this share, such as 0.08; "
        "Base and Mid; not exact (default: off)",
    )


RENAMED = {
    "pyramid_steps": "pyramid_num_inference_steps_list",
    "amplify_first_chunk": "is_amplify_first_chunk",
    "skip_first_chunk": "is_skip_first_chunk",
}


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Request` that the user gave, by the names of `Request`. Raises `RequestError`."""
    values = {RENAMED.get(name, name): value for name, value in vars(arguments).items()}
    for kind in ("image", "video"):
        sigmas = values.pop(f"{kind}_noise_sigma", None)
        if sigmas is not None:
            if len(sigmas) != 2:
                given = " ".join(f"{sigma:g}" for sigma in sigmas)
                raise RequestError(f"--{kind}-noise-sigma {given}: two numbers are allowed, MIN MAX")
            values[f"{kind}_noise_sigma_min"], values[f"{kind}_noise_sigma_max"] = sigmas
    if "prompt" in values:
        values["prompt"] = [typed(text) for text in values["prompt"]]
    if "negative_prompt" in values:
        values["negative_prompt"] = typed(values["negative_prompt"])
    if "prompt_schedule" in values:
        values["prompt_schedule"] = [scheduled_prompt(*entry) for entry in values["prompt_schedule"]]
    fields = Request.__dataclass_fields__
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in fields}


def scheduled_prompt(chunks: str, prompt: str) -> ScheduledPrompt:
    try:
        return ScheduledPrompt(typed(prompt), whole_number(chunks))
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"--prompt-schedule {chunks} {prompt!r}: {error}; CHUNKS comes before TEXT") from None


def flag_of(field: str) -> str:
    """The flag that sets a field of `Request`."""
    names = {new: old for old, new in RENAMED.items()}
    name = names.get(field, field).removesuffix("_min").removesuffix("_max")
    return "--" + name.replace("_", "-")


def as_typed(flag: str, value: Any) -> str:
    """How a user would have given the value, for messages: "--seed 1 2", or "no --image" for one left out."""
    if value is None or value == ():
        return f"no {flag}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    values = value if isinstance(value, tuple) else (value,)
    words = [(str(v.chunks), v.prompt) if isinstance(v, ScheduledPrompt) else (str(v),) for v in values]
    return f"{flag} {shlex.join(word for group in words for word in group)}"


def absolute_media(fields: dict[str, Any]) -> dict[str, Any]:
    """Make the paths of media absolute, so that a run can be resumed from elsewhere."""
    return {k: str(Path(v).absolute()) if k in ("image", "video") and v is not None else v for k, v in fields.items()}
