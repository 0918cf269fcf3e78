"""What a controller or a viewer may send, as one discriminated union: `parse` gives a checked message, or refuses it.

Names are those of vllm-omni where it has one. A field that no message has is refused by name; `session.start` alone
passes over what vllm-omni takes and this server has no use for, and says so.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from launchers.serve.problems import Refusal

MOST_PROMPT = 20_000
"""Letters of a prompt; the text encoder reads some hundred tokens of it."""

Prompt = Annotated[str, Field(min_length=1, max_length=MOST_PROMPT, pattern=r"\S")]
Token = Annotated[str, Field(min_length=1, max_length=256)]
EventId = Annotated[str, Field(min_length=1, max_length=128)]
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Transition = Annotated[int, Field(ge=0, le=1000)]
"""Chunks until a new prompt holds alone. vllm-omni's 0 is a change at once, as 1 is."""


class Message(BaseModel):
    """Types are taken as they are: "7" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Start(Message):
    """Begin a session. Other fields are those of a request by their names in Python; see `sessions.asked`."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["session.start"]
    prompt: Prompt
    model: str | None = None
    format: str = "m4s"
    image: str | None = None
    video: str | None = None
    transition_chunks: Transition = 1
    lead: Annotated[float, Field(ge=1, le=16, allow_inf_nan=False)] | None = None
    streaming_buffer_seconds: Seconds | None = None
    api_key: str | None = Field(default=None, repr=False)

    @property
    def others(self) -> dict[str, Any]:
        return self.model_extra or {}


class Attach(Message):
    """Come back to a session, as its controller; chunks from `from_chunk` on, or from the newest."""

    type: Literal["session.attach"]
    session_id: Annotated[str, Field(max_length=64)]
    token: Token = Field(repr=False)
    from_chunk: Annotated[int, Field(ge=-1)] = -1


class Event(Message):
    prompt: Prompt


class Change(Message):
    event: Event
    event_id: EventId | None = None
    transition_chunks: Transition | None = None


class Interaction(Message):
    """Change the prompt."""

    type: Literal["session.interaction"]
    interaction: Change


class Pause(Message):
    type: Literal["session.pause"]


class Resume(Message):
    type: Literal["session.resume"]


class Step(Message):
    """One chunk, while paused."""

    type: Literal["session.step"]


class Reset(Message):
    """Begin again in the same session."""

    type: Literal["session.reset"]
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    prompt: Prompt | None = None


class Position(Message):
    """How much the controller's player has played, which pacing reads; not answered."""

    type: Literal["session.position"]
    media_time: Seconds
    displayed_chunk: int | None = None


class Playback(Message):
    """vllm-omni's name for a position."""

    type: Literal["session.playback"]
    position_seconds: Seconds


class Ping(BaseModel):
    """Answered with the same fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["session.ping"]


class Stop(Message):
    type: Literal["session.stop"]


class Watch(Message):
    """A viewer's first message, where its token is in no header and no address."""

    type: Literal["watch"]
    token: Token = Field(repr=False)


KINDS: tuple[type[BaseModel], ...] = (
    *(Start, Attach, Interaction, Pause, Resume, Step, Reset, Position, Playback, Ping, Stop, Watch),
)
TYPES = tuple(each.model_fields["type"].annotation.__args__[0] for each in KINDS)
_MESSAGE: TypeAdapter[Any] = TypeAdapter(Annotated[Union[KINDS], Field(discriminator="type")])  # noqa: UP007


def parse(text: str) -> Any:
    """A message from the text of a frame. Raises `Refusal`, with `event_id` where the text holds one."""
    try:
        values = json.loads(text, parse_constant=no_constant)
    except RecursionError:
        raise Refusal("invalid_message", "the message is nested too deeply") from None
    except ValueError:
        raise Refusal("invalid_message", "the message is no JSON") from None
    if not isinstance(values, dict):
        raise Refusal("invalid_message", "the message is no JSON object; send one with a type, such as session.ping")
    kind = values.get("type")
    if kind not in TYPES:
        raise Refusal("invalid_message", f"type {_short(kind)}: allowed are {', '.join(TYPES)}")
    try:
        return _MESSAGE.validate_python(values)
    except RecursionError:
        raise Refusal("invalid_message", f"{kind}: it is nested too deeply") from None
    except ValidationError as error:
        place, reason = first_fault(error)
        name = ".".join(_short(part, 64).strip("'") for part in place[1:]) or "the message"  # after its type
        raise Refusal("invalid_message", f"{kind}: {name}: {reason}") from None


def event_id_of(text: str) -> str | None:
    """Of a message that is refused, so that its sender knows which one."""
    try:
        found = json.loads(text)["interaction"]["event_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found[:128] if isinstance(found, str) else None


def no_constant(name: str) -> None:
    """For `json.loads`, which takes NaN and Infinity by itself."""
    raise ValueError(f"{name} is no JSON")


def first_fault(error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """Where the first thing is that is wrong, and what; without the value: it may be a token, or megabytes."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    reasons = {"extra_forbidden": "there is no such field", "missing": "it is missing"}
    return first["loc"], reasons.get(first["type"], first["msg"])


def _short(value: Any, most: int = 100) -> str:
    shown = repr(value)
    return shown if len(shown) <= most else shown[:most] + "…"
