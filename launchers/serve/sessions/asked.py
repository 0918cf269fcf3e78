"""From the fields of `session.start` to a request: defaults of the server, then what the client says, all checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.json_types import from_json
from helios_cp.config.request import Request
from launchers.serve.flags import ServeCall
from launchers.serve.loras import Loras
from launchers.serve.problems import Refusal

NAMES = frozenset(each.name for each in fields(Request)) - {"prompt_schedule", "sigmas", "image", "video"}
"""Fields of a request that a client may set; `lora` by names, see `launchers.serve.loras`."""

LISTS = ("prompt", "seed", "history_sizes", "pyramid_num_inference_steps_list")
"""Those of which one value may be given alone."""

PASSED_OVER = frozenset(
    (
        *("guidance_scale_2", "boundary_ratio", "flow_shift", "true_cfg_scale", "num_outputs_per_prompt", "n"),
        *("response_format", "stream", "streaming_output", "enable_frame_interpolation", "output_compression"),
        *("generate_audio", "user", "seconds", "size", "extra_params", "strength"),
    )
)
"""What vllm-omni's clients may send and nothing here depends on; the answer names those that were given."""


@dataclass(frozen=True)
class Asked:
    """A request that is resolved for the server's checkpoint; `ignored` are fields that change nothing."""

    request: Request
    is_endless: bool
    ignored: tuple[str, ...]


def request_of(values: Mapping[str, Any], call: ServeCall, checkpoint: Checkpoint, loras: Loras) -> Asked:
    """`values` by the names of `Request`, `prompt` among them. Raises `Refusal`."""
    ignored = tuple(sorted(name for name in values if name in PASSED_OVER))
    unknown = [name for name in values if name not in NAMES | PASSED_OVER]
    if unknown:
        raise Refusal("invalid_request", f"{unknown[0][:64]}: there is no such field", param=unknown[0][:64])
    given = {name: value for name, value in values.items() if name in NAMES and value is not None}
    for name in LISTS:
        if name in given and not isinstance(given[name], list):
            given[name] = [given[name]]
    if "lora" in given:
        given["lora"] = loras.chosen(given["lora"])
    is_endless = "num_frames" not in given
    try:
        request = from_json(Request, {**call.request, **given})
        if len(request.prompt) != 1 or len(request.seed) != 1:
            raise Refusal("invalid_request", "a session has one prompt and one seed")
        if is_endless:
            request = from_json(Request, {**call.request, **given, "num_frames": _most_frames(request, call)})
        request = request.resolve(checkpoint)
    except (TypeError, OverflowError) as error:  # a number of hundreds of digits is no float
        raise Refusal("invalid_request", str(error)) from None
    except RequestError as error:
        raise Refusal.of(error) from None
    call.check_request(request)
    return Asked(request, is_endless, ignored)


def _most_frames(request: Request, call: ServeCall) -> int:
    """Whole chunks, at least one."""
    request.check()  # fps and the length of a chunk are numbers that can be counted with
    chunk = request.frames_per_chunk
    return chunk * max(1, math.floor(call.longest * request.fps / chunk))
