"""What a user should know of a request before its video is made, though nothing is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request
from helios_cp.files.clips import clip_remarks
from helios_cp.files.pictures import picture_remarks
from helios_cp.tiny.vocabulary import outside
from helios_cp.tiny.world import TRAINED_SIZE


def request_remarks(requests: Sequence[Request], checkpoint: Checkpoint) -> list[str]:
    """Of resolved requests whose pictures and clips were checked: each remark once."""
    found: list[str] = []
    for request in requests:
        size = request.height, request.width, request.resize_mode
        found += [] if request.image is None else picture_remarks(request.image, *size)
        found += [] if request.video is None else clip_remarks(request.video, *size, request.fps)
        found += _cut_prompts(request, checkpoint)
    if checkpoint.rendered_world:
        found += [remark for request in requests for remark in _outside(request)]
    ignored = {flag: value for request in requests for flag, value in request.ignored(checkpoint).items()}
    found += [
        f"{flag} {value}: Helios-Distilled has its guidance built in and does not read it"
        for flag, value in ignored.items()
    ]
    return list(dict.fromkeys(found))


def _outside(request: Request) -> list[str]:
    """What the embedded models do not know."""
    texts = (*request.prompt, *(entry.prompt for entry in request.prompt_schedule))
    found = [outside(text) for text in texts]
    found += [
        f"--{kind} {path}: the embedded models know pictures of their own world alone, which helios_cp.tiny renders; "
        "what they make of others says nothing of the real ones"
        for kind, path in (("image", request.image), ("video", request.video))
        if path is not None
    ]
    if (request.height, request.width) != TRAINED_SIZE:
        trained = " × ".join(map(str, TRAINED_SIZE))
        found.append(
            f"--height {request.height} --width {request.width}: the embedded models were trained at {trained} pixels, "
            "and show nothing at other sizes"
        )
    return [remark for remark in found if remark is not None]


def _cut_prompts(request: Request, checkpoint: Checkpoint) -> list[str]:
    most = request.max_sequence_length
    texts = [*request.prompt, *(entry.prompt for entry in request.prompt_schedule), request.negative_prompt]
    long = [text for text in texts if len(text.encode()) >= most]  # a token is a byte at least, and the last ends it
    if not long:
        return []
    from transformers import AutoTokenizer  # seconds to import, and most prompts are short

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    counts = {text: len(tokenizer(text).input_ids) for text in long}
    return [
        f"prompt {text[:40]!r}…: it has {count} tokens and is cut after {most}; --max-sequence-length takes more, "
        "and the checkpoints were trained with 512"
        for text, count in counts.items()
        if count > most
    ]
