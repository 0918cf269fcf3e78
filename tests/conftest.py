"""Fixtures that several files share."""
# ruff: noqa: E402  some settings hold for what is imported after them

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import shutil
import signal
import site
import sys
import tempfile

# Whatever is imported stays: until all tests are collected no search for garbage, which took a third of that time.
gc.disable()

# Where nobody may keep bytecode, each of the many processes that tests start compiles the package anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# One thread, here and in the processes that tests start: the models are tiny, and threads that wait for each other on a
# busy machine cost more than they do. Set before torch is imported, which reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What sets more threads itself, as `benchmarks.decode` does, has them sleep while they wait, and not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from PIL import Image

from benchmarks.ranks.pool import RankPool, shared_pool
from helios_cp.weights.presets import RANDOM, preset_folder
from tests.order import file_scheduling, longest_first

# A home of this run's own, so that nothing that the programs and their libraries keep there is the user's, or left to
# them. Packages that the user has installed there are still found.
os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())
os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")
atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

# Whoever starts the tests in the background, or by nohup, has some signals ignored; here they act as elsewhere.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

if importlib.util.find_spec("hypothesis"):  # a machine with a GPU may lack it, and runs other tests
    from hypothesis import HealthCheck, settings

    # The same examples in every run, and none is too slow: a shared machine may stall any of them.
    slow = [HealthCheck.too_slow]
    settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=slow)
    settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """From here on garbage is searched for, but not in what was imported."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    return file_scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of presets of this test run's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def presets(cache):
    """The folder of each tiny checkpoint of random weights, by name."""
    return {name: preset_folder(name, cache) for name in RANDOM}


@pytest.fixture(scope="session")
def folders(presets) -> dict[str, str]:
    """As `presets`, in text, as ranks are given it."""
    return {name: str(folder) for name, folder in presets.items()}


@pytest.fixture(scope="session")
def pool() -> RankPool:
    """The gloo ranks that all tests of a process share."""
    return shared_pool()


@pytest.fixture(scope="session")
def astronaut() -> Image.Image:
    """A photograph, 512 × 512, shipped with scikit-image."""
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(data.astronaut())


@pytest.fixture(scope="session")
def clip(astronaut) -> list[Image.Image]:
    """70 frames of a camera that moves over the photograph: two chunks of 33 and a rest."""
    return [astronaut.crop((2 * i, i, 2 * i + 300, i + 300)).resize((80, 72)) for i in range(70)]


class WeightsReached(BaseException):
    """Raised where weights would be loaded; no handler of errors catches it."""


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever the command line would load weights with raises `WeightsReached`."""
    importlib.import_module("helios_cp.generate.run")

    def reached(*_, **__):
        raise WeightsReached

    for module in [module for name, module in sys.modules.items() if name.startswith("helios_cp.")]:
        for name in ("load_adaptable", "load_vae", "load_text_encoder", "load_scheduler"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, reached)
    loader = sys.modules["helios_cp.weights.loader"].Loader
    for name in ("transformer", "vae", "text_encoder", "scheduler"):
        monkeypatch.setattr(loader, name, reached)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
