"""Unit: devices by name, and steps for devices without float64; GPU: what a card answers.

Nothing here has a tolerance: a step computed on the CPU for a device that is a CPU gives the same bits. On a card it
may differ by the rounding of another machine's fp32 sums; see there.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from helios_cp import device as module
from helios_cp import host_solver
from helios_cp.config import Request, RequestError
from helios_cp.device import (
    allocated_memory,
    card_of_rank,
    device_name,
    has_float64,
    has_streams,
    has_tf32,
    make_current,
    peak_memory,
    pick_device,
    pick_dtype,
    reset_peak_memory,
    wait_for,
)
from helios_cp.distributed import Ranks, pick_backend
from helios_cp.generate import main
from helios_cp.host_solver import HostSolver, solver_on
from helios_cp.pipeline import Pipeline

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


# Devices without float64

SETTINGS = {
    "tiny-base": {"num_inference_steps": 3, "guidance_scale": 4.0},
    "tiny-mid": {"pyramid_num_inference_steps_list": (3, 1, 1), "guidance_scale": 4.0},
    "tiny-distilled": {"pyramid_num_inference_steps_list": (2, 1, 1)},
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
    monkeypatch.setattr(host_solver, "has_float64", lambda device: False)
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
    pipeline = Pipeline.from_pretrained(str(presets["tiny-distilled"]), dtype=torch.float32)
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
    monkeypatch.setattr(host_solver, "has_float64", lambda device: False)
    assert (make_latents(pipeline, name) - expected).abs().max() <= 1e-4


@pytest.mark.gpu
@needs_card
def test_a_cards_memory_is_counted():
    device = torch.device("cuda:0")
    make_current(device)
    before = allocated_memory(device)
    held = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    assert allocated_memory(device) == before + (1 << 20)
    reset_peak_memory(device)
    torch.empty(8 << 20, dtype=torch.uint8, device=device)
    assert peak_memory(device) == before + (9 << 20) and held.numel()
    wait_for(device)
    assert device_name(device) == torch.cuda.get_device_name(0)
