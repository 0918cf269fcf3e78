"""Unit: how often the host waits for the device in whole chunks, with all that is between their steps. Counts, exact.

The device is PyTorch's meta device, which here has streams and pinned memory like a card: it computes nothing, and what
waits for it is written down. The first chunk does not count, in which tables are filled. What the thread that decodes
waits for stops nobody else.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.request import Request
from helios_cp.device import device, streams, timing
from helios_cp.files.tensor_files import read_json
from helios_cp.model.codec import Codec
from helios_cp.model.transformer import HeliosTransformer
from helios_cp.model.vae.autoencoder import Autoencoder
from helios_cp.model.vae.config import VaeConfig
from helios_cp.pipeline import decoding
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.start import Inputs
from helios_cp.sampling import denoise as sampling
from helios_cp.sampling import noise
from helios_cp.weights.load import load_scheduler
from tests.pipeline.crossings import META, Crossings

SETTINGS = {
    "random-base": {"num_inference_steps": 3},
    "random-mid": {"pyramid_num_inference_steps_list": (3, 1, 2)},
    "random-distilled": {"pyramid_num_inference_steps_list": (1, 1, 1)},
}
CHUNKS = 3
STOP, STEP_BEFORE, FRAMES = "the host stops", "it waits for the step before", "the decoder waits for frames"


class Log(list):
    """What happens, in order: steps, and what the host waits for."""

    def rest(self) -> list[str]:
        """From chunk 1 on."""
        return self[self.index("step of chunk 1") :]


class Mark:
    """Is reached when it is waited for. `what` says whom it is for."""

    def __init__(self, log: Log, what: str) -> None:
        self.log = log
        self.what = what

    def synchronize(self) -> None:
        self.log.append(FRAMES if threading.current_thread().name.startswith("decoder") else self.what)

    def elapsed_time(self, end: Mark) -> float:
        return 1.0


@pytest.fixture
def log(monkeypatch) -> Log:
    """The meta device as one with streams."""
    log = Log()
    stream = SimpleNamespace(synchronize=lambda: log.append(STOP))
    monkeypatch.setattr(device, "CARDS", (*device.CARDS, "meta"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: log.append(STOP))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(streams, "mark", lambda _: Mark(log, STEP_BEFORE))
    monkeypatch.setattr(timing, "mark", lambda _: Mark(log, STOP))
    monkeypatch.setattr(decoding, "to_host", lambda frames: torch.zeros(frames.shape, dtype=torch.uint8))
    return log


def make_video(folder, log: Log) -> list:
    """A whole video without any numbers; its chunks."""
    checkpoint = Checkpoint.read(folder)
    request = Request(
        height=64, width=64, num_frames=33 * CHUNKS, max_sequence_length=8, **SETTINGS[folder.name.rpartition("-")[0]]
    )
    with META:
        transformer = HeliosTransformer(checkpoint.transformer).eval()
        vae = Autoencoder(VaeConfig.from_dict(read_json(folder / "vae" / "config.json"))).eval()
        embeds = torch.zeros(1, 8, checkpoint.transformer.text_dim)
    pipeline = Pipeline(checkpoint, transformer, None, Codec(vae), load_scheduler(checkpoint))
    pipeline.decodes_beside = True
    vars(pipeline)["_side"] = None
    inputs = Inputs(prompt_embeds=embeds, negative_prompt_embeds=embeds)
    with Crossings(log):
        return list(pipeline.stream(request, inputs, on_step=lambda step: log.append(f"step of chunk {step.chunk}")))


@pytest.mark.parametrize("preset", SETTINGS)
def test_the_host_waits_for_steps_before_alone(presets, preset, log):
    chunks = make_video(presets[preset], log)
    (steps,) = SETTINGS[preset].values()
    steps = steps if isinstance(steps, int) else sum(steps)
    assert [chunk.index for chunk in chunks] == list(range(CHUNKS))
    stages = {f"denoise_{stage}" for stage in range(1, 2 if preset == "random-base" else 4)}
    assert stages | {"conditions", "decode"} <= chunks[-1].seconds.keys()
    rest = log.rest()
    waits = [each for each in rest if not each.startswith("step of")]
    assert [each for each in waits if each != FRAMES] == [STEP_BEFORE] * ((CHUNKS - 1) * steps - 1)
    assert log.count(FRAMES) == CHUNKS
    assert rest.count("step of chunk 1") == rest.count("step of chunk 2") == steps


def test_each_upload_that_stops_the_host_shows(presets, log, monkeypatch):
    """Noise of a chunk and of two stages, and timesteps of three, were they sent from pageable memory."""
    for module in (noise, sampling):
        monkeypatch.setattr(module, "to_device", Tensor.to)
    make_video(presets["random-distilled"], log)
    found = [each for each in log.rest() if "aten" in each]
    assert len(found) == 4 + 6  # what chunk 1 itself begins with is sent before its first step


def test_clocks_at_the_ends_of_stages_show(presets, log, monkeypatch):
    """Two stops for each of the three stages, and for both parts of the conditions, were the host's clock to time."""
    monkeypatch.setattr(timing, "make_mark", timing.HostMark)
    make_video(presets["random-distilled"], log)
    assert log.rest().count(STOP) >= 2 * 5 + 4
