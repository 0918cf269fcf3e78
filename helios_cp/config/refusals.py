"""All flags that do not go together: one table, read in one order by commands, benchmarks and the Python API alike.

The bounds of a single flag stand at its field (`config.arguments`); whether files can be read or written is asked of
`helios_cp.files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helios_cp.config.arguments import as_typed, check_bounds
from helios_cp.config.call import Call
from helios_cp.config.checkpoint import DTYPES
from helios_cp.config.errors import Row, refuse
from helios_cp.config.execution import FEATURE_MULTIPLES, OFFLOADS, OWN_ENGINES, QUANTIZATIONS, Execution, Target
from helios_cp.config.layout import Layout


@dataclass(frozen=True)
class Setting:
    """What is about to run, as far as it is known. A field at its default refuses nothing.

    `stored` is how the weights in `folder` are quantised already. `features` are the sizes of linear layers by name.
    `unavailable` says by flag what this machine and its libraries cannot do. `backend` is that of several ranks.
    """

    execution: Execution = field(default_factory=Execution)
    layout: Layout = field(default_factory=Layout)
    target: Target | None = None
    backend: str | None = None
    dtype: str | None = None
    is_distilled: bool = False
    folder: Path | None = None
    stored: str | None = None
    features: tuple[tuple[str, int], ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)


def check_setting(setting: Setting) -> None:
    """Raises `RequestError` for the first row of the table that refuses."""
    check_bounds(setting.execution)
    refuse(_table(setting))


def check_call(call: Call) -> None:
    """Raises `RequestError` for files that do not go together."""
    refuse(_table_of_files(call))


def _table(setting: Setting) -> list[Row]:
    execution, layout = setting.execution, setting.layout
    kind = execution.quantize or setting.stored
    on = None if setting.target is None else setting.target.kind
    capability = (setting.target and setting.target.capability) or ()
    graphs, shards, offloads = execution.cuda_graphs, layout.shard_weights, execution.offload != "none"
    quantize, offload = f"--quantize {kind}", f"--offload {execution.offload}"
    block_cache = as_typed("--block-cache", execution.block_cache)
    rows = [
        (f"--quantize {execution.quantize}", kind not in (None, *QUANTIZATIONS), _allowed(QUANTIZATIONS)),
        (offload, execution.offload not in OFFLOADS, _allowed(OFFLOADS)),
        (f"--vae-dtype {execution.vae_dtype}", execution.vae_dtype not in DTYPES, _allowed(DTYPES)),
        (
            f"--compile-cache {execution.compile_cache}",
            execution.compile_cache is not None and not execution.compile,
            "only allowed beside --compile",
        ),
        # what a CUDA graph can hold
        ("--cuda-graphs", graphs and on not in (None, "cuda"), f"not on {on}; only --device cuda has them"),
        (
            f"--cuda-graphs with {offload}",
            graphs and offloads,
            "give one of the two; a graph needs its weights in one place on the card",
        ),
        (
            f"--cuda-graphs with {block_cache}",
            graphs and execution.block_cache is not None,
            "give one of the two; a graph skips no block",
        ),
        (
            "--cuda-graphs with --backend gloo",
            graphs and layout.degrees.world > 1 and setting.backend == "gloo",
            "give --backend nccl; a graph cannot hold messages that the host sends",
        ),
        (
            "--cuda-graphs with --shard-weights",
            graphs and shards,
            "give one of the two; a graph needs its weights in one place on the card",
        ),
        (
            f"--cuda-graphs with --attention {layout.attention}",
            graphs and layout.attention not in OWN_ENGINES,
            f"{_allowed(OWN_ENGINES)}; that package's messages are not made to be captured",
        ),
        # where weights are
        (
            f"--shard-weights with {offload}",
            shards and offloads,
            "give one of the two; --offload needs least of the card, --shard-weights little of the host",
        ),
        (
            f"--shard-weights with {quantize}",
            shards and kind is not None,
            "give one of the two, as sharded weights are gathered in the dtype of the model; with --layout auto add "
            "--no-shard-weights",
        ),
        (
            f"--shard-weights with --ffn-tp {layout.degrees.ffn_tp}",
            shards and layout.degrees.ffn_tp > 1,
            "give one of the two; --shard-weights saves more memory",
        ),
        # the checkpoint
        (
            block_cache,
            execution.block_cache is not None and setting.is_distilled,
            "Helios-Distilled has too few steps for it; only Base and Mid take it",
        ),
        *((f"--lora {each.path}", not Path(each.path).exists(), NO_FILE) for each in execution.lora),
        (
            f"--quantize {execution.quantize}",
            setting.stored is not None and execution.quantize not in (None, setting.stored),
            f"the weights in {setting.folder} are {setting.stored} already; leave it out, or give the folder that they "
            "were made from",
        ),
        *(
            (
                f"--lora {each.path}",
                setting.stored is not None,
                f"the weights in {setting.folder} are {setting.stored} already and cannot be adapted; give the folder "
                f"that they were made from, with --quantize {setting.stored}",
            )
            for each in execution.lora
        ),
        # what quantised weights can be multiplied by
        (
            "--quantize fp8",
            kind == "fp8" and on == "cuda" and () < capability < (9, 0),
            f"this card has compute capability {'.'.join(map(str, capability))}, 9.0 or higher is needed (Hopper and "
            "newer); int8 and int4 run on older cards",
        ),
        (
            f"--quantize fp8 with --dtype {setting.dtype}",
            kind == "fp8" and on == "cuda" and setting.dtype not in (None, "bfloat16"),
            "on CUDA only bfloat16 is allowed",
        ),
        (
            f"--quantize int8 with --dtype {setting.dtype}",
            kind == "int8" and setting.dtype == "float16",
            "sums of products would exceed its range; use bfloat16 or float32",
        ),
    ]
    multiple = 1 if kind == "fp8" and on != "cuda" else FEATURE_MULTIPLES.get(kind or "", 1)
    for name, size in setting.features:
        rows.append((quantize, size % multiple != 0, f"{name} is {size}; a multiple of {multiple} is needed"))
    return [*rows, *((given, True, reason) for given, reason in setting.unavailable.items())]


def _table_of_files(call: Call) -> list[Row]:
    many = call.prompt_file is not None
    output, resume = call.output or Path(), call.resume or Path()
    return [
        (
            f"--resume {call.resume} and --checkpoint-dir {call.checkpoint_dir}",
            call.resume is not None and call.checkpoint_dir is not None,
            "give one of the two; --resume goes on saving in its folder",
        ),
        *(
            (
                f"--prompt-schedule-file {call.prompt_schedule_file} and {name}",
                call.prompt_schedule_file is not None and is_given,
                "give one of the two",
            )
            for name, is_given in (
                ("--prompt", "prompt" in call.request),
                ("--prompt-schedule", "prompt_schedule" in call.request),
                ("--prompt-file", many),
            )
        ),
        (f"--image-folder {call.image_folder}", call.image_folder is not None and not many, BESIDE_PROMPT_FILE),
        (
            f"--interpolate-time {call.interpolate_time}",
            call.interpolate_time is not None and not many,
            BESIDE_PROMPT_FILE,
        ),
        (
            f"--save-latents {call.save_latents}",
            call.save_latents is not None and many,
            "not with --prompt-file; --checkpoint-dir keeps the latents of every video",
        ),
        (
            f"--output {call.output}",
            many and output.suffix.lower() == ".mp4",
            "with --prompt-file this is a folder; leave out .mp4",
        ),
        (
            f"--resume {call.resume}",
            many and not resume.is_dir(),
            "there is no such folder; start with --checkpoint-dir",
        ),
    ]


BESIDE_PROMPT_FILE = "only allowed beside --prompt-file"
NO_FILE = "there is no such file or folder"


def _allowed(values: Iterable[str]) -> str:
    return f"allowed are {', '.join(values)}"
