"""Unit: the folder of adapters of a server: what is offered, and what it is refused for before anything starts."""

from __future__ import annotations

import json

import pytest

from helios_cp.config.errors import RequestError
from helios_cp.weights.load import resolve
from launchers.generate import checks
from launchers.serve.__main__ import main
from launchers.serve.loras import Loras
from launchers.serve.run import with_example
from launchers.serve.server import Server
from tests.launchers.conftest import write_adapter
from tests.launchers.serve.conftest import call_of, client_of


@pytest.fixture(scope="module")
def model(presets) -> str:
    return str(presets["random-distilled"])


@pytest.fixture(scope="module")
def checkpoint(model):
    return resolve(model, None, weights=())


@pytest.fixture
def folder(tmp_path):
    """A file, a folder of PEFT, and what is no adapter."""
    loras = tmp_path / "loras"
    (loras / "motion").mkdir(parents=True)
    write_adapter(loras / "ink.safetensors")
    write_adapter(loras / "motion" / "adapter_model.safetensors", seed=1)
    (loras / "motion" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (loras / "README.md").write_text("mine")
    (loras / ".cache").mkdir()
    (loras / "notes").mkdir()
    return loras


def test_files_and_folders_are_offered_by_name(folder, checkpoint):
    loras = Loras.of(folder, checkpoint)
    assert loras.paths == {"ink": str(folder / "ink.safetensors"), "motion": str(folder / "motion")}
    assert Loras.of(None, checkpoint).names == []


def test_the_server_tells_their_names_alone(folder, model, tmp_path):
    call = call_of(tmp_path, model=model, device="cpu", lora_folder=folder)
    checked = checks.check_session(with_example(call), None, 1, "cpu")
    client = client_of(Server(call, checked, loras=Loras.of(folder, checked.checkpoint)))
    answer = client.get("/v1/server")
    assert answer.json()["loras"] == ["ink", "motion"]
    assert str(tmp_path) not in answer.text.replace(model, "")


DAMAGES = {
    "another width": (lambda folder: write_adapter(folder / "wide.safetensors", width=97), "wide.safetensors: "),
    "a pickle": (lambda folder: (folder / "old.pt").write_bytes(b""), "old.pt is a pickle"),
    "a text": (lambda folder: (folder / "text.safetensors").write_text("adapter"), "text.safetensors: "),
    "two of a name": (lambda folder: write_adapter(folder / "motion.safetensors"), "both named motion"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_before_anything_starts(folder, model, tmp_path, capsys, damage):
    spoil, named = DAMAGES[damage]
    spoil(folder)
    flags = ["--model", model, "--device", "cpu", "--data", str(tmp_path / "data"), "--port", "0"]
    with pytest.raises(SystemExit) as end:
        main([*flags, "--lora-folder", str(folder)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--lora-folder" in line and named in line


@pytest.mark.parametrize("name", ["none", "ink.safetensors"])
def test_no_folder(folder, checkpoint, name):
    with pytest.raises(RequestError, match=r"--lora-folder .*: it cannot be read"):
        Loras.of(folder / name, checkpoint)
