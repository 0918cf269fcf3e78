"""Texts that are no message of the protocol."""

from __future__ import annotations

import json
from typing import Any


def _start(**fields: Any) -> dict[str, Any]:
    return {"type": "session.start", "prompt": "a fox", **fields}


def _change(interaction: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "session.interaction", "interaction": interaction, **fields}


def _event(event: Any, **fields: Any) -> dict[str, Any]:
    return _change({"event": event, **fields})


TEXTS = [
    *(
        "",
        " ",
        "null",
        "true",
        "7",
        '"session.ping"',
        "[]",
        "{}",
        "{",
        "}",
        "[",
        "session.ping",
        "\0",
        "\ud83d",
        "'{}'",
    ),
    *('{"type": "session.ping"', '{"type": "session.ping"} {}', '{"type": NaN}', '{"type": Infinity}'),
    *('[{"type": "session.ping"}]', "[" * 100_000, '{"a":' * 20_000, "9" * 10_000, '"' + "a" * 100_000),
]
OBJECTS = [
    *({"type": kind} for kind in (None, 7, True, [], {}, "", "ping", "session", "session.unknown", "SESSION.PING")),
    {"type": "session.ping\0"},
    {"kind": "session.ping"},
    {"type": "x" * 100_000},
    {"type": "session.start"},
    *(_start(prompt=prompt) for prompt in (None, 7, [], ["a fox"], {}, "", "  ", "\n\t", "a" * 30_000)),
    *(_start(lead=lead) for lead in (0, 0.5, -1, 17, "1", [], True)),
    *(_start(transition_chunks=chunks) for chunks in (-1, 1.5, "3", None, 10**9, [])),
    *(_start(format=value) for value in (7, None, [])),
    *(_start(image=value) for value in (7, [], {})),
    _start(api_key=7),
    _start(streaming_buffer_seconds=-1),
    {"type": "session.attach"},
    {"type": "session.attach", "session_id": "1"},
    {"type": "session.attach", "token": "1"},
    {"type": "session.attach", "session_id": 1, "token": "1"},
    {"type": "session.attach", "session_id": "1", "token": ""},
    {"type": "session.attach", "session_id": "1" * 65, "token": "1"},
    {"type": "session.attach", "session_id": "1", "token": "1" * 300},
    {"type": "session.attach", "session_id": "1", "token": "1", "from_chunk": -2},
    {"type": "session.attach", "session_id": "1", "token": "1", "from_chunk": "0"},
    {"type": "session.interaction"},
    *(_change(value) for value in (None, 7, "a", [], {}, {"event": {}}, {"event": None}, {"prompt": "a"})),
    *(_event({"prompt": prompt}) for prompt in (None, 7, "", " ", [], "a" * 30_000)),
    _event({"prompt": "a", "camera": "left"}),
    _event({"prompt": "a"}, event_id=""),
    _event({"prompt": "a"}, event_id=7),
    _event({"prompt": "a"}, event_id="1" * 200),
    *(_event({"prompt": "a"}, transition_chunks=value) for value in (-1, 0.5, "1", 10**6)),
    _change({"event": {"prompt": "a"}}, prompt="a"),
    *({"type": f"session.{name}", "more": 1} for name in ("pause", "resume", "step", "stop", "reset")),
    *({"type": "session.reset", "seed": seed} for seed in (-1, 1.5, "7", 2**63, [])),
    *({"type": "session.reset", "prompt": prompt} for prompt in ("", " ", 7)),
    {"type": "session.position"},
    *({"type": "session.position", "media_time": value} for value in (-1, "1", None, 1e300, [])),
    {"type": "session.position", "media_time": 1, "displayed_chunk": "1"},
    {"type": "session.playback", "position_seconds": -0.1},
    {"type": "watch"},
    {"type": "watch", "token": 7},
]
MALFORMED = [*TEXTS, *(json.dumps(each) for each in OBJECTS)]
