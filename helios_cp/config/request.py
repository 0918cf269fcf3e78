"""What a user asks of a checkpoint, checked before anything heavy is loaded; nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from helios_cp.config.arguments import check_bounds, flag, frame_rate
from helios_cp.config.checkpoint import VAE_SPATIAL, VAE_TEMPORAL, Checkpoint
from helios_cp.config.console import typed
from helios_cp.config.errors import RequestError, Row, refuse
from helios_cp.config.execution import Adapter
from helios_cp.config.paths import absolute_path_text

MAX_SIDE = 16384
"""Pixels of a side that x264 takes."""

RESIZE_MODES = ("stretch", "crop", "fit")
"""How pictures and clips are brought to the size of the video; see `helios_cp.files.pictures`."""

MAX_FPS = 2**31 - 1
"""FFmpeg counts frame rates in 32 bits."""


@dataclass(frozen=True)
class ScheduledPrompt:
    """One entry of an interactive schedule: a prompt, for how many chunks it holds, and how it takes over.

    `transition`: within how many chunks it takes over from what was shown before, 1 for at once. `None` is diffusers'
    blend, over `Request.interpolation_steps`. See `helios_cp.pipeline.prompts`.
    """

    prompt: str
    chunks: int
    transition: int | None = None

    def __str__(self) -> str:
        """As it is typed, but for the transition, which only a file can give."""
        transition = "" if self.transition is None else f" (transition {self.transition})"
        return f"{self.chunks} {shlex.quote(self.prompt)}{transition}"

    @classmethod
    def parse(cls, words: Sequence[str]) -> ScheduledPrompt:
        """From CHUNKS and TEXT. Raises `RequestError`."""
        chunks, prompt = words
        try:
            return cls(typed(prompt), int(chunks))
        except ValueError:
            raise RequestError(
                f"--prompt-schedule {chunks} {prompt!r}: {chunks!r} is no whole number; CHUNKS comes before TEXT"
            ) from None


def _noise(kind: str) -> Any:
    about = f"two numbers, the range of the noise mixed into the {kind}'s latents"
    sets = (f"{kind}_noise_sigma_min", f"{kind}_noise_sigma_max")
    return flag(0.111, about, ("MIN", "MAX"), name=f"--{kind}-noise-sigma", nargs="+", sets=sets)


@dataclass(frozen=True)
class Request:
    """One video, or a batch of videos that share everything but prompt and seed. Names are those of diffusers.

    `None` means "what this checkpoint is meant for"; `resolve` fills it in. `image` and `video` are paths; the pipeline
    also takes loaded pictures and tensors in their place. `lora` are the adapters of this request alone, `()` for none;
    with `None` it has those of the pipeline (`Execution.lora`).
    """

    prompt: tuple[str, ...] = flag(
        (),
        "what to show; repeat it for a batch of videos in one call",
        "TEXT",
        group="prompts",
        parse=typed,
        repeat=True,
    )
    negative_prompt: str = flag("", "what to avoid; Base and Mid only (default: empty)", "TEXT", parse=typed)
    prompt_schedule: tuple[ScheduledPrompt, ...] = flag(
        (),
        "a prompt and for how many chunks it holds; repeat it to change the prompt while the video runs",
        ("CHUNKS", "TEXT"),
        nargs=2,
        repeat=True,
        convert=ScheduledPrompt.parse,
    )
    interpolation_steps: int = flag(3, "chunks over which a scheduled prompt blends into the next", "N", least=1)
    max_sequence_length: int = flag(512, "text tokens, longer prompts are cut", "N", least=1)

    image: str | None = flag(
        None,
        "image to video: a picture, which becomes the first frame",
        "FILE",
        group="picture or clip to start from",
        parse=absolute_path_text,
    )
    video: str | None = flag(
        None, "video to video: the clip to go on from, 33 frames or more", "FILE", parse=absolute_path_text
    )
    resize_mode: str = flag(
        "stretch",
        f"{', '.join(RESIZE_MODES)}: how a picture or clip of another shape is brought to --height and --width "
        "(default: stretch, as diffusers does)",
        "MODE",
    )
    image_noise_sigma_min: float = _noise("image")
    image_noise_sigma_max: float = 0.135
    add_noise_to_image_latents: bool = flag(True, "mix noise into them")
    video_noise_sigma_min: float = _noise("video")
    video_noise_sigma_max: float = 0.135
    add_noise_to_video_latents: bool = flag(True, "mix noise into them")

    height: int = flag(384, "a multiple of 64, of 16 for Base", "PIXELS", group="size and seed", most=MAX_SIDE)
    width: int = flag(640, "likewise", "PIXELS", most=MAX_SIDE)
    num_frames: int = flag(132, "rounded up to chunks of 33", "N", least=1)
    fps: float = flag(24, "of the MP4, such as 24, 29.97 or 30000/1001", "N", parse=frame_rate, least=1, most=MAX_FPS)
    seed: tuple[int, ...] = flag(
        (42,), "one, counted upwards for a batch, or one for each prompt", "N", least=0, most=2**63 - 1
    )

    guidance_scale: float | None = flag(
        None, "Base and Mid; Distilled ignores it (default: 5.0)", "X", group="sampling", least=0.0
    )
    num_inference_steps: int | None = flag(None, "Base only (default: 50)", "N", least=1)
    pyramid_num_inference_steps_list: tuple[int, ...] | None = flag(
        None, "steps of each stage (default: 20 20 20 for Mid, 2 2 2 for Distilled)", "N", name="--pyramid-steps"
    )
    sigmas: tuple[float, ...] | None = None
    lora: tuple[Adapter, ...] | None = None
    is_amplify_first_chunk: bool | None = flag(
        None, "twice the steps for the first chunk; Distilled only (default: on there)", name="--amplify-first-chunk"
    )
    is_skip_first_chunk: bool = flag(
        False, "anchor the video on its second chunk, for pictures that stay too still", name="--skip-first-chunk"
    )
    keep_first_frame: bool = flag(True, "let every chunk see the first frame")
    match_seams: bool = flag(
        False,
        "match light and colour of a chunk's first frames to the last frame before; not exact, and of use where chunks "
        "do not join smoothly",
    )
    use_zero_init: bool = flag(True, "start from a zero velocity; Mid only")
    zero_steps: int = flag(1, "up to which step; Mid only", "N", least=0)
    history_sizes: tuple[int, ...] = flag(
        (16, 2, 1), "three numbers, the latent frames of the long, mid and short history", "N", least=1
    )
    num_latent_frames_per_chunk: int = flag(9, "9 are 33 frames, as trained", "N", least=1)

    def with_schedule(self, schedule: tuple[ScheduledPrompt, ...]) -> Request:
        """The same with this schedule in place of its prompts, or as it is if that is empty."""
        return dataclasses.replace(self, prompt=(), prompt_schedule=schedule) if schedule else self

    def with_change(self, chunk: int, prompt: str, transition: int | None = 1) -> Request:
        """The same video up to `chunk`, and another prompt from there to its end; see `ScheduledPrompt`.

        What was planned for `chunk` and later goes. Raises `RequestError` for a batch, and for a change that no video
        may have.
        """
        if self.batch_size > 1:
            raise RequestError(
                f"prompt {prompt!r}: a batch of {self.batch_size} videos takes no change; make each alone"
            )
        if not 0 <= chunk < self.num_chunks:
            raise RequestError(f"prompt {prompt!r}: all {self.num_chunks} chunks have begun; none can show it")
        entries, start = [], 0
        for entry in self.prompt_schedule or (ScheduledPrompt(self.prompt[0], self.num_chunks),):
            if start < chunk:
                entries.append(dataclasses.replace(entry, chunks=min(entry.chunks, chunk - start)))
            start += entry.chunks
        if entries:  # the last one holds up to the change, however long it was to last
            held = sum(entry.chunks for entry in entries[:-1])
            entries[-1] = dataclasses.replace(entries[-1], chunks=chunk - held)
        entries.append(ScheduledPrompt(prompt, self.num_chunks - chunk, transition if entries else None))
        request = self.with_schedule(tuple(entries))
        refuse(request._rows_of_prompts())
        return request

    @property
    def batch_size(self) -> int:
        return 1 if self.prompt_schedule else len(self.prompt)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed a video: those given, or the single one given counted upwards."""
        if len(self.seed) == self.batch_size:
            return self.seed
        return tuple(self.seed[0] + i for i in range(self.batch_size))

    @property
    def frames_per_chunk(self) -> int:
        """33 for the default 9 latent frames."""
        return (self.num_latent_frames_per_chunk - 1) * VAE_TEMPORAL + 1

    @property
    def num_chunks(self) -> int:
        asked = -(-self.num_frames // self.frames_per_chunk)  # rounded up
        return max(asked, sum(entry.chunks for entry in self.prompt_schedule))

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.height // VAE_SPATIAL, self.width // VAE_SPATIAL

    @property
    def history_frames(self) -> tuple[int, int, int]:
        """Latent frames of the long, mid and short history, without the anchor.

        Without an anchor (`keep_first_frame=False`) its place goes to one more short frame.
        """
        long, mid, short = sorted(self.history_sizes, reverse=True)
        return long, mid, short if self.keep_first_frame else short + 1

    def resolve(self, checkpoint: Checkpoint) -> Request:
        """Fill in what the checkpoint decides, then check everything. Raises `RequestError`."""
        is_distilled = checkpoint.is_distilled
        refuse(self._rows_of_a_kind(checkpoint))
        meant: dict[str, Any] = {"guidance_scale": 1.0 if is_distilled else 5.0, "is_amplify_first_chunk": is_distilled}
        if checkpoint.is_pyramid:
            meant["pyramid_num_inference_steps_list"] = (2, 2, 2) if is_distilled else (20, 20, 20)
        else:
            meant["num_inference_steps"] = len(self.sigmas) if self.sigmas else 50
        filled = {name: value for name, value in meant.items() if getattr(self, name) is None}
        request = dataclasses.replace(self, **filled)
        request.check()
        refuse(request._rows_of_a_checkpoint(checkpoint))
        return request

    def ignored(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Flags with values that this checkpoint does not read, though they are given."""
        if not checkpoint.is_distilled:
            return {}
        scale = {} if self.guidance_scale in (None, 1.0) else {"--guidance-scale": self.guidance_scale}
        return scale | ({"--negative-prompt": repr(self.negative_prompt)} if self.negative_prompt else {})

    def check(self) -> None:
        """What needs no checkpoint, so that one need not be downloaded first. Raises `RequestError`.

        The message names the flag, the value and what is allowed; see `tests/generate/test_bad_input.py`.
        """
        refuse(self._rows_of_prompts())
        refuse(self._rows_of_numbers())

    def _rows_of_prompts(self) -> Iterator[Row]:
        schedule = self.prompt_schedule
        yield "--prompt and --prompt-schedule", bool(self.prompt and schedule), "give one of the two"
        needed = "at least one prompt is needed; or use --prompt-schedule or --prompt-file"
        yield "--prompt", not self.prompt and not schedule, needed
        for entry in schedule:
            yield f"--prompt-schedule {entry.chunks}", entry.chunks < 1, "a prompt holds for at least 1 chunk"
            yield (
                f"--prompt-schedule {entry.chunks} {entry.prompt!r}",
                entry.transition is not None and entry.transition < 1,
                f"its transition is {entry.transition}; at least 1 chunk is allowed",
            )
        texts = [("--prompt", prompt) for prompt in self.prompt]
        texts += [("--prompt-schedule", entry.prompt) for entry in schedule]
        for name, text in texts:
            yield f"{name} {text!r}", not text.strip(), "a prompt must hold more than white space"
        for name, text in [*texts, ("--negative-prompt", self.negative_prompt)]:
            has_surrogate = any("\ud800" <= character <= "\udfff" for character in text)
            yield f"{name} {text!r}", has_surrogate, "this is not valid UTF-8 text"

    def _rows_of_numbers(self) -> Iterator[Row]:
        yield (
            f"--seed {_joined(self.seed)}",
            len(self.seed) not in (1, self.batch_size),
            f"{len(self.seed)} seeds for {self.batch_size} prompt(s); give one, or one for each prompt",
        )
        check_bounds(self)
        allowed = f"allowed are {', '.join(RESIZE_MODES)}"
        yield f"--resize-mode {self.resize_mode}", self.resize_mode not in RESIZE_MODES, allowed
        for name in ("image", "video"):
            low, high = getattr(self, f"{name}_noise_sigma_min"), getattr(self, f"{name}_noise_sigma_max")
            is_in_order = 0 <= low <= high <= 1  # false for NaN too
            yield f"--{name}-noise-sigma {low} {high}", not is_in_order, "allowed is 0 <= MIN <= MAX <= 1"
        for adapter in self.lora or ():
            yield f"--lora {adapter}", not math.isfinite(adapter.weight), "a finite weight is allowed"
        sizes = f"--history-sizes {_joined(self.history_sizes)}"
        yield sizes, len(self.history_sizes) != 3, "three sizes of at least 1 are allowed"
        yield (
            f"--match-seams with {sizes}",
            self.match_seams and sum(self.history_frames) < self.num_latent_frames_per_chunk,
            f"the history must hold a chunk of {self.num_latent_frames_per_chunk} latent frames",
        )
        both = self.image is not None and self.video is not None
        yield f"--image {self.image} and --video {self.video}", both, "give one of the two"

    def _rows_of_a_kind(self, checkpoint: Checkpoint) -> Iterator[Row]:
        """What this Helios does not have."""
        helios, steps = f"Helios-{checkpoint.variant.capitalize()}", self.pyramid_num_inference_steps_list
        if checkpoint.is_pyramid:
            yield (
                f"--num-inference-steps {self.num_inference_steps}",
                self.num_inference_steps is not None,
                f"only Helios-Base takes it; this is {helios}: use --pyramid-steps",
            )
            only_base = "only Helios-Base takes a sigma schedule of its own; leave it out"
            yield "sigmas", self.sigmas is not None, only_base
        else:
            no_pyramid = "Helios-Base has no pyramid: use --num-inference-steps"
            yield f"--pyramid-steps {_joined(steps or ())}", steps is not None, no_pyramid
        yield (
            "--amplify-first-chunk",
            bool(self.is_amplify_first_chunk) and not checkpoint.is_distilled,
            f"only Helios-Distilled has it, this is {helios}",
        )

    def _rows_of_a_checkpoint(self, checkpoint: Checkpoint) -> Iterator[Row]:
        steps = self.pyramid_num_inference_steps_list if checkpoint.is_pyramid else None
        if steps is not None:
            yield (
                f"--pyramid-steps {_joined(steps)}",
                len(steps) != checkpoint.stages or min(steps) < 1,
                f"{checkpoint.stages} numbers of at least 1 are allowed, one a stage of this checkpoint",
            )
        if self.sigmas is not None:
            given = f"{len(self.sigmas)} given for --num-inference-steps {self.num_inference_steps}"
            yield "sigmas", len(self.sigmas) != self.num_inference_steps, given
        multiple = VAE_SPATIAL * checkpoint.transformer.patch_size[1] * 2 ** (len(steps or (1,)) - 1)
        for name, value in (("--height", self.height), ("--width", self.width)):
            below = max(value, 0) // multiple * multiple
            near = [str(size) for size in (below, below + multiple) if 0 < size <= MAX_SIDE]
            yield (
                f"{name} {value}",
                value < multiple or value % multiple != 0,
                f"Helios-{checkpoint.variant.capitalize()} takes multiples of {multiple}; the nearest are "
                f"{' and '.join(near)}",
            )


def _joined(numbers: Iterable[float]) -> str:
    return " ".join(map(str, numbers))
