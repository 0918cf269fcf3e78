"""What a session tells its followers, as messages of the protocol: plain functions of its recording and its media."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from launchers.messages.messages import Span
from launchers.serve.media.store import MediaStore
from launchers.serve.sessions.recording import Change, Recording, for_viewers, told_of


def state(recording: Recording, store: MediaStore) -> dict[str, Any]:
    """`chunk` is the next to be shown."""
    told = {"type": "session.state", "state": recording.state, "chunk": len(store.chunks), "seconds": store.seconds}
    told |= {"take": max(len(recording.takes) - 1, 0), "lead": recording.lead}
    return told | ({"why": recording.why} if recording.why else {})


def done(recording: Recording, store: MediaStore) -> dict[str, Any]:
    return {
        "type": "session.done",
        "request_id": recording.id,
        "session_id": recording.id,
        "chunks": len(store.chunks),
        "frames": store.frames,
        "reason": recording.why,
        "stopped": recording.why == "stopped",
    }


def configuration(recording: Recording, model: str) -> dict[str, Any]:
    """All that decides the video."""
    return {
        "model": model,
        **for_viewers(recording.request),
        "lead": recording.lead,
        "is_endless": recording.is_endless,
    }


def start(recording: Recording, store: MediaStore, model: str) -> dict[str, Any]:
    """The initialization segment follows it as a binary frame."""
    asked = configuration(recording, model)
    return {
        "type": "video.start",
        "request_id": recording.id,
        "session_id": recording.id,
        "format": "m4s",
        "mime": store.mime,
        "configuration": asked,
        "config": asked,
        "chunk_frames": store.chunk_frames,
        "fps": store.fps,
    }


def chunk(recording: Recording, take: int, index: int, spans: Mapping[str, Span], number: int) -> dict[str, Any]:
    """What is told of a chunk beside its place, as it becomes ready; `index` counts in its take, `number` over the
    session. `spans` say when each stage worked on it."""
    begin = min((span.begin for span in spans.values()), default=0.0)
    end = max((span.end for span in spans.values()), default=0.0)
    frames = recording.request.frames_per_chunk
    return {
        "take": take,
        "is_reset": take > 0 and index == 0,
        "seconds": {stage: span.end - span.begin for stage, span in spans.items()},
        "fps": frames / (end - begin) if end > begin else None,
        "ready_at": time.time(),
        "lead": recording.lead,
        "prompt": recording.prompt_at(take, number),
        **told_of(recording.changes, take, number),
    }


def chunk_message(metadata: dict[str, Any], skipped: int = 0) -> dict[str, Any]:
    """With the names that vllm-omni has for the same. `skipped` chunks before it were not sent to a slow viewer."""
    return {
        "type": "video.chunk_metadata",
        "kind": "media",
        **metadata,
        "skipped": skipped,
        "generation_chunk_index": metadata["chunk"],
        "transport_chunk_index": metadata["chunk"],
        "num_frames": metadata["frames"],
        "byte_length": metadata["bytes"],
        "started_event_ids": metadata["started"],
        "active_event_ids": metadata["active"],
        "completed_event_ids": metadata["completed"],
    }


def queued(recording: Recording, store: MediaStore, change: Change, played: float) -> dict[str, Any]:
    """The receipt of a change: the first chunk that shows it, and how long until that is on screen, as things go.

    `played`: seconds of media.
    """
    media_time = change.chunk * store.chunk_seconds
    return {
        "type": "session.interaction.queued",
        "request_id": recording.id,
        "event_id": change.event_id,
        "chunk": change.chunk,
        "take": change.take,
        "media_time": media_time,
        "seconds": max(0.0, media_time - played),
        "supersedes": [each.event_id for each in recording.changes if each.superseded_by == change.event_id],
    }
