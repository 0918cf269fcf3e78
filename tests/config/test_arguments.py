"""Unit: flags are made from the fields of dataclasses, and what is given of them comes back as those fields."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from helios_cp.config.arguments import OneLineParser, add_flags, as_typed, check_bounds, flag, flag_name, given
from helios_cp.config.call import Call
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter
from helios_cp.config.layout import AskedLayout
from helios_cp.config.paths import cache_folder
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.__main__ import build_parser

FLAGS = {
    "prompt": (["--prompt", "a", "--prompt", "b"], ("a", "b")),
    "negative_prompt": (["--negative-prompt", "blur"], "blur"),
    "prompt_schedule": (
        ["--prompt-schedule", "2", "a", "--prompt-schedule", "1", "b"],
        (ScheduledPrompt("a", 2), ScheduledPrompt("b", 1)),
    ),
    "interpolation_steps": (["--interpolation-steps", "5"], 5),
    "image": (["--image", "/a.png"], "/a.png"),
    "video": (["--video", "/a.mp4"], "/a.mp4"),
    "resize_mode": (["--resize-mode", "crop"], "crop"),
    "height": (["--height", "128"], 128),
    "width": (["--width", "192"], 192),
    "num_frames": (["--num-frames", "99"], 99),
    "fps": (["--fps", "30"], 30),
    "seed": (["--seed", "1", "2"], (1, 2)),
    "guidance_scale": (["--guidance-scale", "4"], 4.0),
    "num_inference_steps": (["--num-inference-steps", "7"], 7),
    "pyramid_num_inference_steps_list": (["--pyramid-steps", "1", "2", "3"], (1, 2, 3)),
    "is_amplify_first_chunk": (["--no-amplify-first-chunk"], False),
    "is_skip_first_chunk": (["--skip-first-chunk"], True),
    "keep_first_frame": (["--no-keep-first-frame"], False),
    "match_seams": (["--match-seams"], True),
    "history_sizes": (["--history-sizes", "8", "4", "2"], (8, 4, 2)),
    "num_latent_frames_per_chunk": (["--num-latent-frames-per-chunk", "5"], 5),
    "use_zero_init": (["--no-use-zero-init"], False),
    "zero_steps": (["--zero-steps", "3"], 3),
    "add_noise_to_image_latents": (["--no-add-noise-to-image-latents"], False),
    "image_noise_sigma_min": (["--image-noise-sigma", "0.25", "0.5"], 0.25),
    "image_noise_sigma_max": (["--image-noise-sigma", "0.25", "0.5"], 0.5),
    "add_noise_to_video_latents": (["--no-add-noise-to-video-latents"], False),
    "video_noise_sigma_min": (["--video-noise-sigma", "0.25", "0.5"], 0.25),
    "video_noise_sigma_max": (["--video-noise-sigma", "0.25", "0.5"], 0.5),
    "max_sequence_length": (["--max-sequence-length", "64"], 64),
}


def test_every_field_has_a_flag_but_two():
    """Sigmas are for Python alone, and `--lora` is a flag of all requests together."""
    assert set(FLAGS) == {field.name for field in dataclasses.fields(Request)} - {"sigmas", "lora"}


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_sets_its_field(field):
    """And differs from the default, so that a flag that is ignored would be found."""
    arguments, value = FLAGS[field]
    fields = given(Request, build_parser().parse_args(arguments))
    assert fields[field] == value != getattr(Request(), field)
    assert set(fields) == {name for name, (flags, _) in FLAGS.items() if flags == arguments}
    assert flag_name(Request, field) in [word.replace("--no-", "--") for word in arguments]
    Request(**fields)


def test_flags_left_out_are_left_to_the_request():
    assert given(Request, build_parser().parse_args([])) == {}


def test_every_flag_is_explained():
    """In `--help`, with the default where there is one."""
    parser = build_parser()
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help and action.help != argparse.SUPPRESS
        assert all(flag in text for flag in action.option_strings)
    for name in ("interpolation_steps", "height", "width", "num_frames", "fps", "max_sequence_length", "zero_steps"):
        assert f"(default: {getattr(Request(), name)})" in text


def test_values_are_told_as_they_are_typed():
    for field in ("height", "seed", "history_sizes", "pyramid_num_inference_steps_list", "prompt_schedule"):
        arguments, value = FLAGS[field]
        flag = arguments[0]
        words = [word for index, word in enumerate(arguments) if index == 0 or word != flag]
        assert as_typed(flag, value) == " ".join(words)
    assert as_typed("--prompt", ("a fox",)) == "--prompt 'a fox'"
    assert as_typed("--keep-first-frame", True) == "--keep-first-frame"
    assert as_typed("--keep-first-frame", False) == "--no-keep-first-frame"
    assert as_typed("--image", None) == "no --image"


def call(*words: str) -> Call:
    return Call.of(build_parser().parse_args(words))


def test_a_call_is_typed_and_what_is_left_out_is_none():
    made = call(
        "--output", "a.mp4", "--ulysses", "2", "--no-shard-weights", "--lora", "/a.safetensors:0.5", "--seed", "3"
    )
    assert made == Call(
        output=Path("a.mp4"),
        layout=AskedLayout(ulysses=2, shard_weights=False),
        request={"seed": (3,)},
        execution={"lora": (Adapter("/a.safetensors", 0.5),)},
    )
    assert call() == Call() and made.model is None and made.layout.ring is None
    assert made.layout.degrees == {"ulysses": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.output = None


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--output", lambda made: made.output),
        ("--save-latents", lambda made: made.save_latents),
        ("--report", lambda made: made.report),
        ("--checkpoint-dir", lambda made: made.checkpoint_dir),
        ("--resume", lambda made: made.resume),
        ("--prompt-file", lambda made: made.prompt_file),
        ("--image-folder", lambda made: made.image_folder),
        ("--prompt-schedule-file", lambda made: made.prompt_schedule_file),
        ("--image", lambda made: made.request["image"]),
        ("--video", lambda made: made.request["video"]),
        ("--hardware", lambda made: made.layout.hardware),
        ("--compile-cache", lambda made: made.execution["compile_cache"]),
        ("--lora", lambda made: made.execution["lora"][0].path),
    ],
)
def test_a_tilde_is_the_home_folder(flag, value, join, tmp_path, monkeypatch):
    """As in `--output=~/a`, which shells leave alone, and in a quoted `'~/a'`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    made = call(f"{flag}=~/a b") if join else call(flag, "~/a b")
    assert str(value(made)) == str(tmp_path / "a b")


def test_every_flag_of_a_path_is_in_the_test_above():
    """Those that name a FILE, a DIR or a PATH; `--model` and `--hardware` may also be a name."""
    paths = {
        action.option_strings[0]
        for action in build_parser()._actions
        if action.metavar in ("FILE", "DIR", "PATH[:WEIGHT]")
    }
    (parametrized,) = (mark for mark in test_a_tilde_is_the_home_folder.pytestmark if mark.args[0] != "join")
    assert paths | {"--hardware"} == {name for name, _ in parametrized.args[1]}


def test_a_home_folder_that_is_not_there(monkeypatch, capsys):
    for words in (["--output=~nobody-here/a"], ["--lora", "~nobody-here/a:0.5"]):
        with pytest.raises((SystemExit, RequestError)) as refused:
            call(*words)
        line = str(refused.value) if isinstance(refused.value, RequestError) else capsys.readouterr().err
        assert words[0].split("=")[0] in line and "~nobody-here/a: there is no such home folder" in line
    with pytest.raises(RequestError, match="HELIOS_CP_CACHE ~nobody-here: there is no such home folder"):
        cache_folder({"HELIOS_CP_CACHE": "~nobody-here"})


def test_the_cache_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder({"HELIOS_CP_CACHE": "~/cache"}) == tmp_path / "cache"
    assert cache_folder({}) is cache_folder({"HELIOS_CP_CACHE": ""}) is None


@dataclasses.dataclass(frozen=True)
class Bounded:
    count: int = flag(2, "how many", "N", least=1, most=4)
    share: float | None = flag(None, "how much", "X", above=0.0)
    sizes: tuple[int, ...] = flag((3, 2), "of each", "N", least=1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "--count 0: allowed is 1 to 4"),
        ({"count": 5}, "--count 5: allowed is 1 to 4"),
        ({"share": 0.0}, "--share 0: a finite number above 0 is allowed"),
        ({"share": float("nan")}, "--share nan: a finite number above 0 is allowed"),
        ({"sizes": (2, 0)}, "--sizes 2 0: at least 1 is allowed"),
    ],
)
def test_bounds_stand_beside_the_field(values, said):
    check_bounds(Bounded())
    check_bounds(Bounded(count=4, share=0.1, sizes=(1,)))
    with pytest.raises(RequestError, match=f"^{said}$"):
        check_bounds(Bounded(**values))


def test_help_tells_the_default():
    parser = OneLineParser()
    add_flags(parser, Bounded)
    text = " ".join(parser.format_help().split())
    assert "how many (default: 2)" in text and "of each (default: 3 2)" in text and "how much" in text


@pytest.mark.parametrize("program", ["helios_cp.generate", "launchers.generate", "helios_cp.plan"])
def test_help_loads_no_torch(program):
    code = f"""
import runpy, sys
sys.argv = ["{program}", "--help"]
try:
    runpy.run_module("{program}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "ray", "diffusers", "transformers", "av", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_processes_start_without_what_only_some_of_them_need():
    """Each rank and each worker is a process, and these take four seconds of CPU time to import."""
    code = """
import importlib, sys
for module in ("helios_cp.generate.run", "launchers.workers.decoder", "launchers.workers.denoiser"):
    importlib.import_module(module)
    heavy = {"diffusers", "transformers", "torch._dynamo"} & set(sys.modules)
    assert not heavy, (module, heavy)
from helios_cp.config.imports import import_schedulers
import_schedulers()
assert "torch._dynamo" not in sys.modules
from diffusers import HeliosScheduler
HeliosScheduler().set_timesteps(2, 0, mu=0.5)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_config_repeats_are_those_of_the_packages_that_need_torch():
    from helios_cp.config.layout import ENGINES, MACHINES
    from helios_cp.plan.hardware import PROFILES
    from parallel import engines

    assert set(MACHINES) == set(PROFILES) and set(ENGINES) == set(engines.ENGINES)


def test_importing_the_package_leaves_loggers_of_other_libraries_alone():
    code = """
import logging, sys
from helios_cp import Request
import helios_cp
assert "torch" not in sys.modules and Request.__module__ == "helios_cp.config.request"
assert all(logging.getLogger(name).level == logging.NOTSET for name in ("torchao", "torch.utils._pytree"))
try:
    helios_cp.Nothing
except AttributeError:
    sys.exit(0)
sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
