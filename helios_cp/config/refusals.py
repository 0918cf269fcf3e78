"""All flags that do not go together: one table, read in one order by commands, benchmarks and the Python API alike.

The bounds of a single flag stand at its field (`config.arguments`); whether files can be read or written is asked of
`helios_cp.files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


def _table(setting: Setting) -> Iterator[Row]:
    execution, layout, stored = setting.execution, setting.layout, setting.stored
    kind = execution.quantize or stored
    on = None if setting.target is None else setting.target.kind
    has_offload, has_cache = execution.offload != "none", execution.block_cache is not None
    quantize, offload = f"--quantize {kind}", f"--offload {execution.offload}"
    block_cache = as_typed("--block-cache", execution.block_cache)

    yield f"--quantize {execution.quantize}", kind not in (None, *QUANTIZATIONS), _allowed(QUANTIZATIONS)
    yield offload, execution.offload not in OFFLOADS, _allowed(OFFLOADS)
    yield f"--vae-dtype {execution.vae_dtype}", execution.vae_dtype not in DTYPES, _allowed(DTYPES)
    alone = execution.compile_cache is not None and not execution.compile
    yield f"--compile-cache {execution.compile_cache}", alone, "only allowed beside --compile"

    if execution.cuda_graphs:
        moves = "give one of the two; a graph needs its weights in one place on the card"
        yield "--cuda-graphs", on not in (None, "cuda"), f"not on {on}; only --device cuda has them"
        yield f"--cuda-graphs with {offload}", has_offload, moves
        yield f"--cuda-graphs with {block_cache}", has_cache, "give one of the two; a graph skips no block"
        by_host = layout.degrees.world > 1 and setting.backend == "gloo"
        reason = "give --backend nccl; a graph cannot hold messages that the host sends"
        yield "--cuda-graphs with --backend gloo", by_host, reason
        yield "--cuda-graphs with --shard-weights", layout.shard_weights, moves
        reason = f"{_allowed(OWN_ENGINES)}; that package's messages are not made to be captured"
        yield f"--cuda-graphs with --attention {layout.attention}", layout.attention not in OWN_ENGINES, reason

    if layout.shard_weights:
        reason = "give one of the two; --offload needs least of the card, --shard-weights little of the host"
        yield f"--shard-weights with {offload}", has_offload, reason
        reason = (
            "give one of the two, as sharded weights are gathered in the dtype of the model; with --layout auto add "
            "--no-shard-weights"
        )
        yield f"--shard-weights with {quantize}", kind is not None, reason
        reason = "give one of the two; --shard-weights saves more memory"
        yield f"--shard-weights with --ffn-tp {layout.degrees.ffn_tp}", layout.degrees.ffn_tp > 1, reason

    reason = "Helios-Distilled has too few steps for it; only Base and Mid take it"
    yield block_cache, has_cache and setting.is_distilled, reason
    for adapter in execution.lora:
        yield f"--lora {adapter.path}", not Path(adapter.path).exists(), "there is no such file or folder"
    if stored is not None:
        already = f"the weights in {setting.folder} are {stored} already"
        reason = f"{already}; leave it out, or give the folder that they were made from"
        yield f"--quantize {execution.quantize}", execution.quantize not in (None, stored), reason
        reason = f"{already} and cannot be adapted; give the folder that they were made from, with --quantize {stored}"
        for adapter in execution.lora:
            yield f"--lora {adapter.path}", True, reason

    if kind == "fp8" and on == "cuda":
        capability = setting.target.capability or (9, 0)
        reason = (
            f"this card has compute capability {'.'.join(map(str, capability))}, 9.0 or higher is needed (Hopper and "
            "newer); int8 and int4 run on older cards"
        )
        yield "--quantize fp8", capability < (9, 0), reason
        is_other = setting.dtype not in (None, "bfloat16")
        yield f"--quantize fp8 with --dtype {setting.dtype}", is_other, "on CUDA only bfloat16 is allowed"
    reason = "sums of products would exceed its range; use bfloat16 or float32"
    yield f"--quantize int8 with --dtype {setting.dtype}", kind == "int8" and setting.dtype == "float16", reason
    multiple = 1 if kind == "fp8" and on != "cuda" else FEATURE_MULTIPLES.get(kind or "", 1)
    for name, size in setting.features:
        yield quantize, size % multiple != 0, f"{name} is {size}; a multiple of {multiple} is needed"
    for given, reason in setting.unavailable.items():
        yield given, True, reason


def _table_of_files(call: Call) -> Iterator[Row]:
    has_many = call.prompt_file is not None
    if call.resume is not None:
        reason = "give one of the two; --resume goes on saving in its folder"
        both = f"--resume {call.resume} and --checkpoint-dir {call.checkpoint_dir}"
        yield both, call.checkpoint_dir is not None, reason
    if call.prompt_schedule_file is not None:
        others = {
            "--prompt": "prompt" in call.request,
            "--prompt-schedule": "prompt_schedule" in call.request,
            "--prompt-file": has_many,
        }
        for name, is_given in others.items():
            yield f"--prompt-schedule-file {call.prompt_schedule_file} and {name}", is_given, "give one of the two"
    if has_many:
        reason = "not with --prompt-file; --checkpoint-dir keeps the latents of every video"
        yield f"--save-latents {call.save_latents}", call.save_latents is not None, reason
        is_file = call.output is not None and call.output.suffix.lower() == ".mp4"
        yield f"--output {call.output}", is_file, "with --prompt-file this is a folder; leave out .mp4"
        is_missing = call.resume is not None and not call.resume.is_dir()
        yield f"--resume {call.resume}", is_missing, "there is no such folder; start with --checkpoint-dir"
    else:
        reason = "only allowed beside --prompt-file"
        yield f"--image-folder {call.image_folder}", call.image_folder is not None, reason
        yield f"--interpolate-time {call.interpolate_time}", call.interpolate_time is not None, reason


def _allowed(values: Iterable[str]) -> str:
    return f"allowed are {', '.join(values)}"
