"""Unit, beside a hub on this machine: what programs in an environment of their own download, and what they say."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from helios_cp.weights.hub import HubId
from tests.forked import ForkServer
from tests.hub_server import Fault, HubServer

ROOT = Path(__file__).parents[2]
NAME = "owner/helios"
LONG = 300
"""Seconds after which something hangs."""

RESOLVE = """
import sys
assert "huggingface_hub" not in sys.modules
from helios_cp.config.errors import RequestError
from helios_cp.weights import hub
from helios_cp.weights.load import resolve

hub.PAUSES = (0, 0, 0)
try:
    for model, parts in zip(sys.argv[1::2], sys.argv[2::2]):
        checkpoint = resolve(model, weights=filter(None, parts.split(",")))
        print(checkpoint.source)
        print(checkpoint.folder)
except RequestError as error:
    sys.exit(str(error))
"""
ALL = "transformer,vae,text_encoder"


@pytest.fixture(scope="module")
def model(presets) -> Path:
    return presets["random-distilled"]


@pytest.fixture
def hub(model):
    with HubServer() as server:
        server.add(NAME, model)
        yield server


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    (tmp_path / "home").mkdir()
    paths = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    return paths | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def forks():
    """Of a process that has imported all but `huggingface_hub`, which reads the environment when it is imported."""
    paths = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with contextlib.closing(ForkServer(paths, "helios_cp.weights.load")) as server:
        yield server


@pytest.fixture
def resolve(environment, forks, tmp_path):
    """Resolves models one after the other in one process, and returns the code, stdout's lines and stderr's."""

    def run(*models: str, parts: str = ALL, **changes: str) -> tuple[int, list[str], list[str]]:
        words = [word for each in models for word in (each, parts)]
        done = forks.run(RESOLVE, words, environment | changes, tmp_path, LONG)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    return run


def weights_of(model: Path) -> list[str]:
    return sorted(str(path.relative_to(model)) for path in model.rglob("*.safetensors"))


def same_files(folder: str, model: Path) -> bool:
    return all((Path(folder) / name).read_bytes() == (model / name).read_bytes() for name in weights_of(model))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/name@v1.0", HubId("owner/name", "v1.0")),
        ("https://huggingface.co/owner/name", HubId("owner/name")),
        ("https://huggingface.co/owner/name/tree/refs/pr/1/", HubId("owner/name", "refs/pr/1")),
        ("hf.co/owner/name", HubId("owner/name")),
        ("https://mirror.example/hub/owner/name", HubId("owner/name")),
        ("https://example.com/owner/name", None),
        ("owner/name@", None),
        ("a/b/c", None),
        ("name", None),
    ],
)
def test_what_is_a_hub_id(text, meant, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hub/")
    assert HubId.parse(text) == meant


def test_the_first_use(hub, resolve, model):
    """What describes the model comes first, then all weights, each file once; after that nothing but a question."""
    code, (source, folder), told = resolve(NAME)
    assert code == 0, told
    assert source == f"{NAME}@{hub.models[NAME].revisions['main']}"
    assert same_files(folder, model)
    assert sorted(hub.downloads("safetensors")) == weights_of(model)
    assert len(hub.downloads()) == len(set(hub.downloads()))
    first = next(index for index, name in enumerate(hub.downloads()) if name.endswith("safetensors"))
    assert not [name for name in hub.downloads()[first:] if name.endswith("json")]
    assert re.match(rf"{NAME}: downloading \d+\.\d MB to .*/home/\.cache/huggingface/hub$", told[0])
    assert [line.split()[1] for line in told[1:]] == weights_of(model)

    hub.requests.clear()
    assert resolve(NAME) == (0, [source, folder], [])
    assert hub.downloads() == [] and len(hub.requests) <= 2
    hub.requests.clear()
    assert resolve(source)[0] == 0
    assert hub.requests == [], "a commit does not change"


@pytest.mark.parametrize(("parts", "folders"), [("", set()), ("text_encoder", {"text_encoder"})])
def test_only_what_is_asked_for_comes_and_no_pickles(parts, folders, hub, resolve, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for extra in ("README.md", "vae/model.bin", "text_encoder/model.fp16.safetensors", "extra/model.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x" * 9)
    hub.add("owner/more", folder)
    code, _, told = resolve("owner/more", parts=parts)
    assert code == 0, told
    assert {name.split("/")[0] for name in hub.downloads("safetensors")} == folders
    assert not {"README.md", "vae/model.bin", "text_encoder/model.fp16.safetensors"} & set(hub.downloads())


def test_a_model_with_a_variant_alone(hub, resolve, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    hub.add("owner/half", folder)
    code, _, (line,) = resolve("owner/half", parts="vae")
    assert code == 1 and "the hub has no vae/diffusion_pytorch_model.safetensors of it, and no shards" in line


def test_processes_that_come_at_once_download_once(hub, environment, model):
    command = [sys.executable, "-c", RESOLVE, NAME, ALL]
    calls = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(call.communicate(timeout=LONG)[1][-500:], call.returncode)[1] for call in calls] == [0, 0, 0]
    assert sorted(hub.downloads("safetensors")) == weights_of(model)


def test_a_connection_that_breaks_half_way_goes_on_where_it_was(hub, resolve, model, tmp_path):
    """The file is larger than what `huggingface_hub` takes from a connection at a time, 10 MB."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(25_000_000))
    hub.add(NAME, folder)
    hub.faults.append(Fault("GET /store/.*vae/", after=12_000_000))
    code, (_, kept), told = resolve(NAME)
    assert code == 0 and same_files(kept, folder), told
    again = [line for line in hub.requests if "safetensors bytes=" in line]
    assert len(again) == 1 and re.search(r"vae/.* bytes=[1-9]\d{6,}-$", again[0]), again
    assert len(hub.downloads("safetensors")) == len(weights_of(model)) + 1


@pytest.mark.parametrize("fault", [{"after": 5000, "reset": True}, {"status": 500}], ids=["reset", "500"])
def test_a_fault_on_the_way_is_tried_again_and_told(fault, hub, resolve, model):
    hub.faults.append(Fault("GET /store/.*vae/", **fault))
    code, (_, folder), told = resolve(NAME)
    assert code == 0 and same_files(folder, model), told
    assert len(hub.downloads("safetensors")) == len(weights_of(model)) + 1, "the other files come once"
    (line,) = [line for line in told if "another try" in line]
    assert "vae/diffusion_pytorch_model.safetensors could not be downloaded: " in line
    assert "secret" not in "".join(told), "addresses of the store are signed"


def test_what_came_whole_is_kept_when_a_call_is_killed(hub, environment, resolve, model):
    fault = Fault("GET /store/.*vae/", after=5000, stall=threading.Event())
    hub.faults.append(fault)
    process = subprocess.Popen([sys.executable, "-c", RESOLVE, NAME, ALL], env=environment, stderr=subprocess.DEVNULL)
    assert fault.reached.wait(LONG)
    process.kill()
    process.wait()
    fault.stall.set()
    code, (_, folder), _ = resolve(NAME)
    assert code == 0 and same_files(folder, model)
    again = {name for name in hub.downloads("safetensors") if hub.downloads("safetensors").count(name) > 1}
    assert again == {"vae/diffusion_pytorch_model.safetensors"}


def test_an_interrupt_ends_a_download_at_once(hub, environment):
    fault = Fault("GET /store/.*transformer/", after=5000, stall=threading.Event())
    hub.faults.append(fault)
    process = subprocess.Popen([sys.executable, "-c", RESOLVE, NAME, ALL], env=environment, stderr=subprocess.PIPE)
    assert fault.reached.wait(LONG)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=LONG)[1] and process.returncode != 0
    fault.stall.set()


def test_progress_on_a_terminal(hub, environment):
    terminal, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 100))
    call = subprocess.Popen([sys.executable, "-c", RESOLVE, NAME, ALL], env=environment, stderr=other)
    os.close(other)
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # the other end is closed
        os.close(terminal)
    assert call.wait(LONG) == 0
    assert b"downloading" in shown and re.search(rb"model\S*\.safetensors: 100%", shown), shown.decode()


def test_a_revision(hub, resolve, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"v1" * 20000)
    tagged = hub.add(NAME, folder, "v1")
    code, (source, kept), told = resolve(f"{NAME}@v1")
    assert code == 0, told
    assert source == f"{NAME}@{tagged}" and same_files(kept, folder)


def test_a_model_that_changes_meanwhile(hub, resolve, model, tmp_path):
    """What a call checked is what it loads; the next call has the new files, and those that stayed are not fetched."""
    source, _ = resolve(NAME, parts="")[1]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"new" * 20000)
    changed = hub.add(NAME, folder)
    code, found, told = resolve(source, NAME)
    assert code == 0, told[-1]
    old, old_folder, new, new_folder = found
    assert old == source and same_files(old_folder, model)
    assert new == f"{NAME}@{changed}" and same_files(new_folder, folder)
    assert len(hub.downloads("safetensors")) == len(weights_of(model)) + 1


def test_tokens(hub, resolve):
    """The token goes to the hub alone: the store would fail the test."""
    hub.models[NAME].is_gated = True
    hub.tokens |= {"hf_accepted"}
    code, _, told = resolve(NAME, HF_TOKEN="hf_accepted")
    assert code == 0, told


SHARD = "transformer/diffusion_pytorch_model-00001-of-00004.safetensors"
REFUSED = {
    "unknown": ("other/name", {}, [], ["neither a folder nor a public model", "hf auth login"]),
    "private": ("owner/private", {}, [], ["if it is private", "hf auth login", "HF_TOKEN"]),
    "token of nobody": (NAME, {"HF_TOKEN": "hf_old"}, [], ["does not take the token (401)", "hf auth login"]),
    "gated": ("owner/gated", {}, [], ["it is gated", "/owner/gated, then log in with `hf auth login`"]),
    "gated and not accepted": ("owner/gated", {"HF_TOKEN": "hf_known"}, [], ["it is gated", "accept its terms on"]),
    "no right": (NAME, {"HF_TOKEN": "hf_known"}, [Fault("/resolve/.*json", 99, 403)], ["no right to read it (403)"]),
    "no right to a file": (NAME, {}, [Fault("GET .*00001-of", 99, 403)], [SHARD, "no right to read it (403)"]),
    "revision": (f"{NAME}@v9", {}, [], ["no revision 'v9'", "its page lists"]),
    "a file that is gone": (NAME, {}, [Fault("GET /store/.*00001-of", 99, 404)], [SHARD, "(404)"]),
    "too many requests": (
        NAME,
        {},
        [Fault("/api/models", 99, 429)],
        ["(429)", "wait some minutes"],
    ),
    "down": (
        NAME,
        {},
        [Fault("/api/models", 99, 503)],
        ["the hub fails (503)", "hf download"],
    ),
    "down for a file": (NAME, {}, [Fault("GET /store/.*00001-of", 99, 502)], [SHARD, "fails (502)", "are kept"]),
    "breaks off for ever": (
        NAME,
        {},
        [Fault("GET /store/.*00001-of", 99, after=100, reset=True)],
        [SHARD, "breaks off (ReadError)", "are kept"],
    ),
    "no hub there": (NAME, {"HF_ENDPOINT": "http://127.0.0.1:9"}, [], ["127.0.0.1:9 cannot be reached", "hf download"]),
    "offline": (f"{NAME}@v1", {"HF_HUB_OFFLINE": "1"}, [], ["HF_HUB_OFFLINE is set", "--revision v1 --local-dir DIR"]),
    "a login page": (NAME, {}, [Fault("/resolve/", 99, 200)], ["does not answer as a hub does", "HF_ENDPOINT"]),
    "no folder for the cache": (NAME, {"HF_HOME": "/proc/none"}, [], ["/proc/none/hub", "set HF_HOME to a folder"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_with_cause_and_cure(case, hub, resolve, model):
    name, changes, faults, said = REFUSED[case]
    for other in ("owner/private", "owner/gated"):
        hub.add(other, model)
    hub.models["owner/private"].is_private = hub.models["owner/gated"].is_gated = True
    hub.tokens |= {"hf_known"}
    hub.faults += [Fault(**vars(fault)) for fault in faults]
    code, _, told = resolve(name, **changes)
    assert code == 1 and told[-1].startswith(f"--model {name}"), told
    assert all(words in told[-1] for words in said), told[-1]
    assert all(line.startswith((NAME, "--model")) for line in told), "and nothing but what is ours"


def test_what_hf_download_brings_is_enough(hub, environment, resolve, tmp_path):
    """As docs/models.md and docs/cluster.md say: into a folder, and into the cache; nothing is asked for again."""
    for flags in ([], ["--local-dir", str(tmp_path / "helios")]):
        command = [Path(sys.executable).with_name("hf"), "download", NAME, *flags]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=LONG)
    hub.requests.clear()
    code, _, told = resolve(str(tmp_path / "helios"))
    assert code == 0 and hub.requests == [], told
    assert resolve(NAME)[0] == 0 and hub.downloads() == []


@pytest.mark.parametrize("how", ["offline", "down", "unreachable"])
def test_what_is_all_in_the_cache_needs_no_hub(how, hub, resolve):
    assert resolve(NAME)[0] == 0
    hub.faults.append(Fault("/api", 99, 503))
    changes = {"offline": {"HF_HUB_OFFLINE": "1"}, "unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    code, out, told = resolve(NAME, **changes.get(how, {}))
    assert code == 0 and len(out) == 2, told


def test_a_disk_without_room_is_said_before_the_download(hub, model, tmp_path, monkeypatch):
    """The disk is real, and the file is said to be larger than any."""
    from huggingface_hub import constants

    from helios_cp.config.errors import RequestError
    from helios_cp.weights import hub as hub_files

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    hub_files._check_room(HubId(NAME), 1)
    with pytest.raises(RequestError, match=r"take 1000000000\.0 GB, and the disk of .*/not/yet has .* HF_HOME"):
        hub_files._check_room(HubId(NAME), 10**18)


WITH_A_DISK = """
mount -t tmpfs -o size=64m none "$HOME" && exec "$0" "$@"
"""
"""Runs a program that has a disk of its own for its home, in a namespace that other programs do not see."""


def test_a_disk_that_fills_up_meanwhile(hub, environment):
    """Something else takes the room that was there when the download began."""
    apart = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("this machine lets no user mount a disk of their own")
    fault = Fault("GET /store/.*vae/", after=5000, stall=threading.Event())
    hub.faults.append(fault)
    command = [*apart, "sh", "-c", WITH_A_DISK, sys.executable, "-c", RESOLVE, NAME, ALL]
    call = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert fault.reached.wait(LONG)
    other = Path(f"/proc/{call.pid}/root{environment['HOME']}/other")
    with pytest.raises(OSError, match="No space left"), other.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    fault.stall.set()
    told = call.communicate(timeout=LONG)[1].splitlines()
    assert call.returncode == 1 and "Traceback" not in "".join(told)
    why = r"the disk of .* is full; free some, or set HF_HOME .*; run the same command again"
    assert re.search(rf"vae/\S+ could not be downloaded: {why}", told[-1])


NOBODY = """
import os, pwd

def unknown(user):
    raise KeyError(user)

pwd.getpwuid = unknown
del os.environ["HOME"]
"""


@pytest.mark.parametrize(("name", "variable"), [(NAME, "HF_HOME"), ("random-base", "HELIOS_CP_CACHE")])
def test_a_user_without_a_home(name, variable, hub, environment):
    """As in a container with a user number of nobody: no HOME, and no entry in the list of users."""
    command = [sys.executable, "-c", NOBODY + RESOLVE, name, ALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"--model {name}: ") and f"set {variable} to a folder" in line


def test_the_folder_of_a_model_in_the_cache(hub, resolve, model, tmp_path):
    assert resolve(NAME, HF_HOME=str(tmp_path / "hf"))[0] == 0
    folder = tmp_path / "hf" / "hub" / "models--owner--helios"
    code, (_, found), told = resolve(str(folder))
    assert code == 0 and found.endswith(hub.models[NAME].revisions["main"]), told
    (folder / "snapshots" / ("b" * 40)).mkdir()
    assert resolve(str(folder))[1][1] == found, "the main branch is meant"
    (folder / "refs" / "main").unlink()
    code, _, (line,) = resolve(str(folder))
    assert code == 1 and "/snapshots/COMMIT, or its hub id" in line


def test_the_page_of_a_model(hub, resolve):
    code, (source, _), told = resolve(f"{hub.endpoint}/{NAME}")
    assert code == 0 and source.startswith(f"{NAME}@"), told


MAIN = """
import sys
from helios_cp.generate.__main__ import main

for line in sys.stdin:
    try:
        main(line.split())
    except SystemExit as refused:
        assert refused.code == 2
    print("next", flush=True)
"""


def test_a_call_that_is_refused_has_fetched_no_more_than_it_took(hub, environment, tmp_path):
    """First nothing, then what describes the model; its weights only when nothing is left to refuse."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    base = f"--model {NAME} --prompt fox --output fox.mp4"

    def call(flags: str) -> None:
        process.stdin.write(f"{base} {flags}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "next\n"

    with process:
        for bad in ("--seed -1", "--image none.png", "--output out.avi"):
            call(bad)
        assert hub.requests == []
        for bad in ("--height 96", "--num-inference-steps 5", "--cfg-parallel 2", "--block-cache 0.1"):
            call(bad)
        assert hub.downloads("json") and not hub.downloads("safetensors")
        process.stdin.close()
        assert process.wait(LONG) == 0


SMALL = ["--height", "64", "--width", "64", "--num-frames", "33", "--pyramid-steps", "1", "1", "1"]


def commands_of_the_readme() -> list[list[str]]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return [
        shlex.split(line) for line in re.findall(r"^(?:python|torchrun) .*BestWishYsh/Helios-Distilled.*$", text, re.M)
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_of_the_readme(ranks, hub, environment, model, tmp_path):
    """As written, with a smaller video and, of several ranks, two; what they need comes once."""
    hub.add("BestWishYsh/Helios-Distilled", model)
    program = "python" if ranks == 1 else "torchrun"
    words = next(words for words in commands_of_the_readme() if words[0] == program)
    many = {"--nproc_per_node": "2", "--ulysses": "2", "--vae-parallel": "2"}
    words = [many.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    extra = ["--standalone"] if ranks > 1 else []
    done = subprocess.run(
        [words[0], *extra, *words[1:], *SMALL],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "fox.mp4").stat().st_size > 0
    assert sorted(hub.downloads("safetensors")) == weights_of(model)
