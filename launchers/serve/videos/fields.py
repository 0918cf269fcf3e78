"""The body of `POST /v1/videos`, JSON or multipart, as the fields of a request and a file to start from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError

from helios_cp.config.request import Request as VideoRequest
from launchers.serve.problems import Refusal
from launchers.serve.realtime.messages import Prompt, first_fault, no_constant
from launchers.serve.uploads.kinds import CLIP, PICTURE

MOST_FIELDS = 64
MOST_DIGITS = 100
"""Of a number in JSON."""

Count = Annotated[int, Field(ge=1, le=10**6)]
Number = Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)]

REFERENCES = ("input_reference", "image_reference", "video_reference")
ADDRESSES = {"image_url": PICTURE, "video_url": CLIP}
"""Where a reference object holds its data URL, and of what."""


class Fields(BaseModel):
    """Names of OpenAI's, and beside them those of vllm-omni. `extra_params` holds other fields of a request."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    model: Annotated[str, Field(max_length=500)] | None = None
    seconds: str | float | None = None
    size: str | None = None
    user: str | None = None
    width: Count | None = None
    height: Count | None = None
    num_frames: Count | None = None
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    negative_prompt: Annotated[str, Field(max_length=20_000)] | None = None
    guidance_scale: Number | None = None
    num_inference_steps: Count | None = None
    lora: Any = None
    extra_params: dict[str, Any] | Json[dict[str, Any]] | None = None


NOT_OF_REQUEST = {"model", "seconds", "size", "user", "lora", "extra_params"}
"""A request has all others by the same names."""


@dataclass(frozen=True)
class Body:
    """`values` by the names of a request; `reference` is a file's bytes or a data URL, of one of `kinds`."""

    model: str | None
    values: dict[str, Any]
    reference: bytes | str | None = None
    kinds: tuple[str, ...] = (PICTURE, CLIP)


async def read(request: Request, most_bytes: int, fps: float) -> Body:
    """`fps` is the server's own, for `seconds` without one. Raises `Refusal`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        given, is_text = _object(await request.body()), False
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=most_bytes) as form:
            items = [(name, each if isinstance(each, str) else await each.read()) for name, each in form.multi_items()]
            given, is_text = _nested(items), True
    else:
        raise Refusal(
            "unsupported", f"content type {kind[:64]!r}: application/json and multipart/form-data are allowed"
        )
    references = {name: value for name in REFERENCES if (value := given.pop(name, None)) is not None}
    if len(references) > 1:
        raise Refusal("invalid_request", f"{' and '.join(references)}: give one of them", param=next(iter(references)))
    fields = _checked(given, is_text)
    reference = [_reference(*item) for item in references.items()]
    return Body(fields.model, _values(fields, fps), *(reference[0] if reference else ()))


def _object(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content, parse_constant=no_constant, parse_int=_int)
    except (ValueError, RecursionError):
        raise Refusal("invalid_request", "the body is no JSON") from None
    if not isinstance(values, dict):
        raise Refusal("invalid_request", 'the body is no JSON object; send one such as {"prompt": "a red fox"}')
    return values


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError("a number of many digits")
    return int(text)


def _nested(items: list[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Fields of a form. OpenAI's clients make a[b] of {"a": {"b": 1}}, and a[b][] of each item of a list there."""
    values: dict[str, Any] = {}
    for name, value in items:
        found = re.fullmatch(r"(\w+)\[(\w+)\](\[\])?", name)
        into, key = (values.setdefault(found[1], {}), found[2]) if found else (values, name)
        is_item = found is not None and found[3] is not None
        if not isinstance(into, dict) or (key in into and not (is_item and isinstance(into[key], list))):
            raise Refusal("invalid_request", f"{name[:64]}: it is given twice", param=name[:64])
        if is_item:
            into.setdefault(key, []).append(_typed(value))
        else:
            into[key] = _typed(value) if found else value
    return values


def _typed(value: str | bytes) -> Any:
    """What a form holds of a number, a truth or a text inside of an object."""
    try:
        return json.loads(value, parse_constant=no_constant) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _checked(given: Mapping[str, Any], is_text: bool) -> Fields:
    """`is_text`: all values are texts, as in a form."""
    try:
        return Fields.model_validate(given, strict=not is_text)
    except ValidationError as error:
        place, reason = first_fault(error)
    name = str(place[0])[:64] if place else "the body"
    raise Refusal("invalid_request", f"{name}: {reason}", param=name)


def _values(fields: Fields, fps: float) -> dict[str, Any]:
    values = fields.model_dump(exclude=NOT_OF_REQUEST, exclude_none=True)
    if fields.lora is not None:  # in a form, objects and lists of them may be given as JSON
        is_json = isinstance(fields.lora, str) and fields.lora.lstrip().startswith(("{", "["))
        values["lora"] = _typed(fields.lora) if is_json else fields.lora
    for name, value in (fields.extra_params or {}).items():
        if name in values or name in Fields.model_fields:
            raise Refusal("invalid_request", f"extra_params.{name}: give it as {name} alone", param="extra_params")
        values[name] = value
    if fields.size is not None:
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", fields.size)
        if found is None:
            raise Refusal("invalid_request", f"size {fields.size[:32]!r}: allowed is such as 640x384", param="size")
        for name, text in zip(("width", "height"), found.groups(), strict=True):
            if values.setdefault(name, int(text)) != int(text):
                raise Refusal(
                    "invalid_request", f"size {fields.size} and {name} {values[name]}: give one", param="size"
                )
    if fields.seconds is not None:
        if "num_frames" in values:
            raise Refusal("invalid_request", "seconds and num_frames: give one of the two", param="seconds")
        values["num_frames"] = math.ceil(_seconds(fields.seconds) * values.get("fps", fps))
    return {"num_frames": VideoRequest.num_frames, **values}


def _seconds(given: str | float) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 10**6:
        raise Refusal("invalid_request", f"seconds {str(given)[:32]!r}: a number above 0 is allowed", param="seconds")
    return seconds


def _reference(name: str, value: Any) -> tuple[bytes | str, tuple[str, ...]]:
    """A file, a data URL, or an object that holds one, also as text. Raises `Refusal`."""
    if isinstance(value, bytes):
        return value, (PICTURE, CLIP)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _object(value.encode("utf-8", "replace"))
    if isinstance(value, str):
        return value, (PICTURE, CLIP)
    if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), str):
        key, url = next(iter(value.items()))
        if key in ADDRESSES:
            return url, (ADDRESSES[key],)
    raise Refusal("unsupported", f"{name}: a file, or an object with image_url or video_url, a data URL", param=name)
