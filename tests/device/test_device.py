"""Unit: devices by name, and steps for devices without float64; GPU: what a card answers.

Nothing here has a tolerance: a step computed on the CPU for a device that is a CPU gives the same bits. On a card it
may differ by the rounding of another machine's fp32 sums; see there.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request
from helios_cp.device import device as module
from helios_cp.device.device import (
    card_of_rank,
    device_name,
    has_float64,
    has_streams,
    has_tf32,
    make_current,
    pick_device,
    pick_dtype,
)
from helios_cp.device.memory import (
    allocated_memory,
    free_host_memory,
    free_memory,
    grow_segments,
    peak_memory,
    pin,
    reset_peak_memory,
)
from helios_cp.device.streams import wait_for
from helios_cp.generate.__main__ import main
from helios_cp.pipeline.pipeline import Pipeline
from helios_cp.pipeline.world import Ranks, pick_backend
from helios_cp.runtime.host_weights import _host_memory
from helios_cp.sampling import solvers
from helios_cp.sampling.solvers import HostSolver, solver_on

CPU = torch.device("cpu")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def accelerator(monkeypatch):
    """Pretends that two devices of a kind are there, or none at all."""

    def pretend(kind: str | None) -> None:
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)

    return pretend


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_devices_that_are_there(accelerator, kind):
    accelerator(kind)
    assert pick_device("auto") == pick_device(kind) == torch.device(kind)
    assert pick_device(f"{kind}:1") == torch.device(kind, 1)
    assert pick_device("cpu") == CPU
    with pytest.raises(RequestError, match=f"^--device {kind}:2: not present; allowed here are auto, cpu, {kind}, "):
        pick_device(f"{kind}:2")
    accelerator(None)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mps", "--device mps: not present; allowed here are auto, cpu"),
        ("xpu:0", "--device xpu:0: not present; allowed here are auto, cpu"),
        ("npu", "--device npu: it needs the package torch_npu, whose import fails (ModuleNotFoundError: No module"),
        ("cpu:x", "--device cpu:x: not present; allowed here are auto, cpu"),
        ("gpu", "--device gpu: no kind of device (those are cpu, cuda, mps, xpu, npu); allowed here are auto, cpu"),
        ("", "--device : no kind of device"),
    ],
)
def test_devices_that_are_not_there_end_in_one_line(accelerator, capsys, name, said):
    accelerator(None)
    with pytest.raises(SystemExit, match="2"):
        main(["--prompt", "a", "--device", name])
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_broken_torch_npu_is_one_line(accelerator, monkeypatch):
    def broken(name):
        assert name == "torch_npu"
        raise OSError("libascendcl.so:\ncannot open")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RequestError, match=r"OSError: libascendcl.so: cannot open\); install the one for this torch"):
        pick_device("npu:0")
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    accelerator(None)
    with pytest.raises(RequestError, match="--device npu: not present"):
        pick_device("npu")


def test_the_dtype_that_suits_a_device(monkeypatch):
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == pick_dtype("auto", torch.device("xpu")) == torch.bfloat16
    for is_new, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, is_new=is_new: is_new)
        assert pick_dtype("auto", torch.device("mps")) == dtype
    assert pick_dtype("float16", torch.device("mps")) == torch.float16
    with pytest.raises(RequestError, match="--dtype int8"):
        pick_dtype("int8", CPU)


def test_what_kinds_of_devices_have(monkeypatch):
    kinds = {kind: SimpleNamespace(type=kind) for kind in module.KINDS}
    assert [kind for kind in kinds if has_streams(kinds[kind])] == ["cuda", "xpu", "npu"]
    assert [kind for kind in kinds if has_float64(kinds[kind])] == ["cpu", "cuda", "xpu"]
    for version, found in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, version=version: version)
        assert has_tf32(torch.device("cuda")) is found
    assert not has_tf32(CPU) and not has_tf32(torch.device("xpu"))


def test_a_cpu_is_asked_nothing_that_it_cannot_answer():
    wait_for(CPU)
    make_current(CPU)
    reset_peak_memory(CPU)
    assert allocated_memory(CPU) == 0
    before = peak_memory(CPU)
    assert before > 50e6  # torch alone is more
    held = torch.ones(40_000_000)
    assert peak_memory(CPU) >= before and held.numel()
    assert device_name(CPU).startswith("cpu (")
    assert card_of_rank(CPU, 5) == CPU


def test_several_ranks_only_where_they_are_tested():
    for kind in ("mps", "xpu"):
        assert pick_backend(None, torch.device(kind), Ranks()) == "gloo"
        with pytest.raises(RequestError, match=f"^--device {kind}: one process only; 4 ranks run on cpu and cuda$"):
            pick_backend(None, torch.device(kind), Ranks(0, 0, 4, 4))


# Memory

SEGMENTS = """
import torch
from helios_cp.device.memory import grow_segments
grow_segments(torch.device("cpu"))
before = torch._C._accelerator_getAllocatorSettings()
grow_segments(torch.device("cuda"))
print(repr(before), repr(torch._C._accelerator_getAllocatorSettings()))
"""


@pytest.mark.parametrize(
    ("variables", "before", "after"),
    [
        ({}, "", "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128", "max_split_size_mb:128"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False", "expandable_segments:False"),
    ],
    ids=str,
)
def test_segments_grow_unless_the_user_has_settings(variables, before, after):
    """In a process of its own, as the settings are the process's; they can be changed before there is a card."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")} | variables
    command = [sys.executable, "-c", SEGMENTS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == f"{before!r} {after!r}"


@pytest.mark.parametrize(("settings", "expected"), [("", ["expandable_segments:True"]), ("max_split_size_mb:128", [])])
def test_an_older_torch_tells_its_settings_otherwise(monkeypatch, settings, expected):
    asked = []
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings", raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    snapshot = {"allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": settings}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    grow_segments(torch.device("cuda"))
    assert asked == expected


class Runtime:
    """CUDA's runtime as far as pinning goes: a call that fails leaves its error until somebody asks."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.left = 0
        self.pinned: set[int] = set()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % 4096 == size % 4096 == flags == 0
        self.left = self.error
        self.pinned |= set() if self.error else {address}
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        self.pinned.remove(address)

    def launch(self) -> None:
        """As PyTorch does: the kernel runs, and then CUDA is asked."""
        left, self.left = self.left, 0
        if left:
            raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def runtime(monkeypatch):
    """Pretends that there is a card, on which to fill a tensor is to launch a kernel. Says which one was current."""

    def pretend(error: int) -> tuple[Runtime, list[torch.device]]:
        found, current, ones = Runtime(error), [], torch.ones

        def fill(*size: int, device: torch.device | None = None) -> torch.Tensor:
            if device is not None and device.type == "cuda":
                found.launch()
            return ones(*size)

        monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
        monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or contextlib.nullcontext())
        monkeypatch.setattr(torch, "ones", fill)
        return found, current

    return pretend


def test_host_memory_is_pinned_for_its_own_card_while_it_lives(runtime):
    found, current = runtime(0)
    memory = _host_memory(5000, torch.device("cuda", 1))
    assert found.pinned == {memory.data_ptr()} and current == [torch.device("cuda", 1)]
    del memory
    gc.collect()
    assert found.pinned == set()


def test_a_failed_pin_leaves_no_error_for_the_next_kernel(runtime):
    found, _ = runtime(2)
    with pytest.warns(UserWarning, match=r"0\.0 GB .* cannot be pinned \(CUDA error 2; \d+\.\d GB are free\)") as told:
        memory = _host_memory(5000, torch.device("cuda"))
    assert len(told) == 1 and "\n" not in str(told[0].message)
    found.launch()
    assert found.pinned == set() and memory.numel() >= 5000
    found.cudaHostRegister(0, 0, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        found.launch()  # what would come of it


def test_a_pipeline_makes_its_card_current(presets, monkeypatch):
    """So that what names no card, such as a compiled kernel, goes to that of the pipeline."""
    current = []
    monkeypatch.setattr("helios_cp.pipeline.pipeline.make_current", current.append)
    Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32, device="cpu")
    assert current == [CPU]


def test_free_memory():
    assert free_memory(CPU) == 0
    assert 0 < free_host_memory() < 1 << 50


# Devices without float64

SETTINGS = {
    "random-base": {"num_inference_steps": 3, "guidance_scale": 4.0},
    "random-mid": {"pyramid_num_inference_steps_list": (3, 1, 1), "guidance_scale": 4.0},
    "random-distilled": {"pyramid_num_inference_steps_list": (2, 1, 1)},
}


def make_latents(pipeline: Pipeline, name: str) -> torch.Tensor:
    request = Request(prompt=("a fox",), height=64, width=64, num_frames=66, seed=(4,), **SETTINGS[name])
    chunks = pipeline.stream(request, output_type="latent")
    return torch.cat([chunk.latents.cpu() for chunk in chunks], 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_on_the_host_give_the_same_latents(presets, monkeypatch, name):
    pipeline = Pipeline.from_pretrained(str(presets[name]), dtype=torch.float32)
    expected = make_latents(pipeline, name)
    steps, solve = [], HostSolver.__call__
    monkeypatch.setattr(solvers, "has_float64", lambda device: False)
    monkeypatch.setattr(HostSolver, "__call__", lambda self, *tensors: steps.append(1) or solve(self, *tensors))
    assert torch.equal(make_latents(pipeline, name), expected) and steps
    monkeypatch.setattr(HostSolver, "__call__", lambda self, velocity, latents: latents - velocity)
    assert not torch.equal(make_latents(pipeline, name), expected)


class OnDevice(torch.Tensor):
    """A tensor that counts its way to the host, as there is no device here to come from."""

    fetched = 0

    def cpu(self):
        OnDevice.fetched += 1
        return self.as_subclass(torch.Tensor)


def test_a_step_fetches_its_tensors(presets, monkeypatch):
    pipeline = Pipeline.from_pretrained(str(presets["random-distilled"]), dtype=torch.float32)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(2, 0, device="cpu", mu=0.5)
    given = [torch.full((2,), value) for value in (3.0, 1.0, 2.0)]
    start, velocity, latents = (tensor.as_subclass(OnDevice) for tensor in given)
    after = solver_on(torch.device("mps"), scheduler, start)(velocity, latents)
    assert OnDevice.fetched == 3 and type(after) is torch.Tensor
    plain = solver_on(CPU, scheduler, given[0])
    assert not isinstance(plain, HostSolver) and torch.equal(plain(*given[1:]), after)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_on_the_host_for_a_card(presets, monkeypatch, name):
    """1e-4: fp32 elementwise products and sums round alike, exponentials and logarithms of the solver may not."""
    pipeline = Pipeline.from_pretrained(str(presets[name]), dtype=torch.float32, device="cuda")
    expected = make_latents(pipeline, name)
    monkeypatch.setattr(solvers, "has_float64", lambda device: False)
    assert (make_latents(pipeline, name) - expected).abs().max() <= 1e-4


@pytest.mark.gpu
@needs_card
def test_a_failed_pin_leaves_no_error_on_a_card():
    """Pages that are pinned already cannot be pinned again."""
    device = torch.device("cuda:0")
    memory = _host_memory(1 << 20, device)
    assert memory.is_pinned()
    assert pin(memory, device) != 0
    assert (torch.ones(3, device=device) + 1).tolist() == [2, 2, 2]


@pytest.mark.gpu
@needs_card
def test_free_memory_of_a_card():
    assert 0 < free_memory(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.gpu
@needs_card
def test_a_cards_memory_is_counted():
    device = torch.device("cuda:0")
    make_current(device)
    gc.collect()  # what other tests have left would be given back meanwhile
    before = allocated_memory(device)
    held = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    assert allocated_memory(device) == before + (1 << 20)
    reset_peak_memory(device)
    torch.empty(8 << 20, dtype=torch.uint8, device=device)
    assert peak_memory(device) == before + (9 << 20) and held.numel()
    wait_for(device)
    assert device_name(device) == torch.cuda.get_device_name(0)
