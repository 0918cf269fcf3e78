"""Unit: what the command line refuses, each case before any weight loads and without a trace on disk.

Every case is a whole command line, run in this process in a folder of its own with good and bad files. No tolerances.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from helios_cp.files.mp4 import encode_segment
from helios_cp.generate.__main__ import main
from tests.conftest import WeightsReached

SIZE = "--height 64 --width 64 --num-frames 33"

# name: (arguments, what the line on stderr says …), after SIZE and in a folder made by `workplace`.
CASES: dict[str, tuple[str, ...]] = {
    # sizes, frames and rates
    "height between two multiples": ("--prompt fox --height 96", "--height 96: ", "multiples of 64", "64 and 128"),
    "width between two multiples": ("--prompt fox --width 80", "--width 80: ", "multiples of 64", "64 and 128"),
    "size of a pyramid, model Mid": ("--prompt fox --model random-mid --width 144", "--width 144: ", "multiples of 64"),
    "size that not even Base takes": (
        "--prompt fox --model random-base --height 40",
        "--height 40: ",
        "multiples of 16",
    ),
    "height zero": ("--prompt fox --height 0", "--height 0: ", "multiples of 64"),
    "width negative": ("--prompt fox --width -64", "--width -64: ", "multiples of 64"),
    "height above what H.264 takes": ("--prompt fox --height 16448", "--height 16448: ", "at most 16384"),
    "height no number": ("--prompt fox --height tall", "--height: 'tall'", "whole number"),
    "height a fraction": ("--prompt fox --height 64.0", "--height: '64.0'", "whole number"),
    "frames zero": ("--prompt fox --num-frames 0", "--num-frames 0: ", "at least 1"),
    "frames negative": ("--prompt fox --num-frames -33", "--num-frames -33: ", "at least 1"),
    "fps zero": ("--prompt fox --fps 0", "--fps 0: ", "1 to 2147483647"),
    "fps no number": ("--prompt fox --fps 24fps", "--fps: '24fps'", "30000/1001"),
    "fps over zero": ("--prompt fox --fps 24/0", "--fps: '24/0'", "30000/1001"),
    "fps beyond 32 bits": ("--prompt fox --fps 2147483648", "--fps 2147483648: ", "1 to 2147483647"),
    "latent frames zero": (
        "--prompt fox --num-latent-frames-per-chunk 0",
        "--num-latent-frames-per-chunk 0: ",
        "at least 1",
    ),
    "text length zero": ("--prompt fox --max-sequence-length 0", "--max-sequence-length 0: ", "at least 1"),
    # pictures and clips
    "picture and clip": (
        "--prompt fox --image picture.png --video clip.mp4",
        "--image",
        "picture.png and --video",
        "give one of the two",
    ),
    "picture that is not there": ("--prompt fox --image none.png", "--image", "none.png: ", "give the path"),
    "picture that is text": ("--prompt fox --image notes.png", "--image", "notes.png: ", "PNG or JPEG"),
    "picture cut off": ("--prompt fox --image cut.png", "--image", "cut.png: ", "PNG or JPEG"),
    "picture empty": ("--prompt fox --image empty.png", "--image", "empty.png: ", "empty"),
    "picture that is a folder": ("--prompt fox --image folder", "--image", "folder: ", "give the path of a file"),
    "clip too short": ("--prompt fox --video short.mp4", "--video", "short.mp4: ", "32 frame", "33 are needed"),
    "clip too short for long chunks": (
        "--prompt fox --video clip.mp4 --num-latent-frames-per-chunk 10",
        "--video",
        "33 frame",
        "37 are needed",
    ),
    "clip cut off": ("--prompt fox --video cut.mp4", "--video", "cut.mp4: ", "give"),
    "clip that is text": ("--prompt fox --video notes.png", "--video", "notes.png: ", "give an MP4"),
    "clip that is not there": ("--prompt fox --video none.mp4", "--video", "none.mp4: ", "give the path"),
    "clip empty": ("--prompt fox --video empty.png", "--video", "empty.png: ", "empty"),
    "folder of compiled code that is a file": (
        "--prompt fox --compile --compile-cache notes.png",
        "--compile-cache ",
        "notes.png: ",
        "this is a file",
    ),
    # prompts
    "no prompt": ("", "--prompt: ", "at least one", "--prompt-file"),
    "prompt empty": ("--prompt ''", "--prompt ''", "more than white space"),
    "prompt of white space": ("--prompt ' \t\n'", "--prompt ' \\t\\n'", "more than white space"),
    "second prompt empty": ("--prompt fox --prompt ''", "--prompt ''", "more than white space"),
    "prompt without quotes": ("--prompt a fox", "unrecognized arguments: fox", "quotes"),
    "prompt that is no text": ("--prompt \udcff", "--prompt '\\udcff'", "UTF-8"),
    "prompt and schedule": ("--prompt fox --prompt-schedule 1 owl", "--prompt and --prompt-schedule", "one of the two"),
    "schedule without a number": ("--prompt-schedule owl 3", "--prompt-schedule owl", "whole number"),
    "schedule of no chunks": ("--prompt-schedule 0 owl", "--prompt-schedule 0: ", "at least 1"),
    "schedule with an empty prompt": ("--prompt-schedule 1 ' '", "--prompt-schedule ' '", "more than white space"),
    "schedule file and prompt": (
        "--prompt fox --prompt-schedule-file schedule.json",
        "--prompt-schedule-file schedule.json and --prompt: ",
        "one of the two",
    ),
    "schedule file beside a prompt file": (
        "--prompt-file good.txt --prompt-schedule-file schedule.json",
        "--prompt-schedule-file schedule.json and --prompt-file: ",
        "one of the two",
    ),
    "schedule file that is missing": ("--prompt-schedule-file no.json", "no.json: ", "cannot be read"),
    "schedule file that is no JSON": ("--prompt-schedule-file good.txt", "good.txt: ", "no valid JSON"),
    "schedule file of another kind": ("--prompt-schedule-file number.json", "number.json: ", "a list, or an object"),
    "schedule file with a bare text": (
        "--prompt-schedule-file texts.json",
        "entry 2: ",
        "prompt and chunks are needed",
    ),
    "schedule file with a wrong number": ("--prompt-schedule-file half.json", "entry 1: chunks is 1.5", "type int"),
    "schedule file with an unknown field": ("--prompt-schedule-file other.json", "other.json: speed is unknown"),
    "schedule file with a wrong field": ("--prompt-schedule-file tall.json", "tall.json: height is 'tall'"),
    "schedule file with no transition": ("--prompt-schedule-file zero.json", "its transition is 0", "at least 1"),
    "schedule file that is empty": ("--prompt-schedule-file empty.json", "--prompt: ", "at least one prompt"),
    "schedule with one word": ("--prompt-schedule 1", "--prompt-schedule: ", "2 arguments"),
    "interpolation over no chunk": (
        "--prompt-schedule 1 owl --interpolation-steps 0",
        "--interpolation-steps 0: ",
        "at least 1",
    ),
    # prompt files
    "prompt file not there": ("--prompt-file none.txt", "--prompt-file none.txt: ", "No such file"),
    "prompt file with another suffix": ("--prompt-file prompts.json", "--prompt-file prompts.json", ".txt, .csv"),
    "prompt file empty": ("--prompt-file blank.txt", "--prompt-file blank.txt: ", "no prompt"),
    "prompt file that is a folder": ("--prompt-file folder.txt", "--prompt-file folder.txt: ", "cannot be read"),
    "prompt file not in UTF-8": ("--prompt-file latin.txt", "--prompt-file latin.txt, line 1: ", "UTF-8"),
    "prompt file beside a prompt": ("--prompt fox --prompt-file good.txt", "--prompt-file good.txt: ", "no --prompt"),
    "prompt file beside a schedule": (
        "--prompt-schedule 1 owl --prompt-file good.txt",
        "--prompt-file good.txt: ",
        "--prompt-schedule",
    ),
    "prompt file and one MP4": ("--prompt-file good.txt --output out.mp4", "--output out.mp4: ", "folder"),
    "prompt file and latents": (
        "--prompt-file good.txt --save-latents l.safetensors",
        "--save-latents l.safetensors: ",
        "--checkpoint-dir",
    ),
    "prompt file and a wrong size": ("--prompt-file good.txt --height 65", "--height 65: ", "multiples of 64"),
    "CSV empty": ("--prompt-file empty.csv", "--prompt-file empty.csv: ", "none", "id and prompt"),
    "CSV without id": ("--prompt-file no-id.csv", "--prompt-file no-id.csv: ", "prompt", "id and prompt"),
    "CSV without prompt": ("--prompt-file no-prompt.csv", "--prompt-file no-prompt.csv: ", "id, text", "id and prompt"),
    "CSV with no row": ("--prompt-file header.csv", "--prompt-file header.csv: ", "no prompt"),
    "CSV with an empty prompt": ("--prompt-file empty-prompt.csv", "empty-prompt.csv, line 3: ", "'b' is empty"),
    "CSV with an id twice": ("--prompt-file twice.csv", "twice.csv, line 3: ", "'a' stands there twice"),
    "CSV with an empty id": ("--prompt-file no-name.csv", "no-name.csv, line 2: ", "''", "file name"),
    "CSV with a slash in an id": ("--prompt-file slash.csv", "slash.csv, line 2: ", "'a/b'", "no /"),
    "CSV with .. as id": ("--prompt-file dots.csv", "dots.csv, line 2: ", "'..'", "leading dot"),
    "CSV with a comma outside quotes": ("--prompt-file comma.csv", "comma.csv, line 2: ", "double quotes"),
    "CSV with a broken quote": ("--prompt-file quote.csv", "quote.csv, line ", "no valid CSV"),
    "CSV with a prompt_index in words": ("--prompt-file index.csv", "index.csv, line 2: ", "'first'", "whole number"),
    "CSV with a prompt_index twice": ("--prompt-file index-twice.csv", "index-twice.csv, line 3: ", "prompt_index 0"),
    "CSV with a picture not there": (
        "--prompt-file pictures.csv --image-folder folder",
        "pictures.csv, line 2: ",
        "'picture.png'",
        "folder",
        "--image-folder",
    ),
    "CSV without the picture's name": ("--prompt-file no-picture.csv", "no-picture.csv, line 2: ", "image_name ''"),
    "CSV with pictures, and a picture": (
        "--prompt-file pictures.csv --image picture.png",
        "--prompt-file pictures.csv: ",
        "no --image",
    ),
    "interactive CSV of no chunks": (
        "--prompt-file good.csv --interpolate-time 0",
        "--interpolate-time 0: ",
        "at least 1",
    ),
    "interpolate-time alone": ("--prompt fox --interpolate-time 3", "--interpolate-time 3: ", "--prompt-file"),
    "image-folder alone": ("--prompt fox --image-folder folder", "--image-folder folder: ", "--prompt-file"),
    # sampling
    "two stages of three": ("--prompt fox --pyramid-steps 2 2", "--pyramid-steps 2 2: ", "3 numbers"),
    "four stages of three": ("--prompt fox --pyramid-steps 2 2 2 2", "--pyramid-steps 2 2 2 2: ", "3 numbers"),
    "a stage of no steps": ("--prompt fox --pyramid-steps 2 0 2", "--pyramid-steps 2 0 2: ", "at least 1"),
    "pyramid steps in words": ("--prompt fox --pyramid-steps 2 two 2", "--pyramid-steps: 'two'", "whole number"),
    "pyramid for Base": (
        "--prompt fox --model random-base --pyramid-steps 2 2 2",
        "--pyramid-steps 2 2 2: ",
        "use --num-inference-steps",
    ),
    "steps for a pyramid": ("--prompt fox --num-inference-steps 9", "--num-inference-steps 9: ", "use --pyramid-steps"),
    "no steps": ("--prompt fox --model random-base --num-inference-steps 0", "--num-inference-steps 0: ", "at least 1"),
    "guidance NaN": ("--prompt fox --guidance-scale nan", "--guidance-scale nan: ", "finite"),
    "guidance infinite": ("--prompt fox --guidance-scale inf", "--guidance-scale inf: ", "finite"),
    "guidance negative": ("--prompt fox --guidance-scale -1.5", "--guidance-scale -1.5: ", "at least 0"),
    "guidance no number": ("--prompt fox --guidance-scale high", "--guidance-scale: 'high'", "number"),
    "image noise reversed": (
        "--prompt fox --image-noise-sigma 0.5 0.1",
        "--image-noise-sigma 0.5 0.1: ",
        "MIN <= MAX",
    ),
    "video noise NaN": ("--prompt fox --video-noise-sigma nan 0.5", "--video-noise-sigma nan 0.5: ", "MIN <= MAX"),
    "video noise above 1": ("--prompt fox --video-noise-sigma 0.1 1.5", "--video-noise-sigma 0.1 1.5: ", "<= 1"),
    "image noise below 0": ("--prompt fox --image-noise-sigma -0.1 0.1", "--image-noise-sigma -0.1 0.1: ", "0 <="),
    "image noise of one number": ("--prompt fox --image-noise-sigma 0.1", "--image-noise-sigma 0.1: ", "MIN MAX"),
    "zero steps negative": ("--prompt fox --model random-mid --zero-steps -1", "--zero-steps -1: ", "at least 0"),
    "seed negative": ("--prompt fox --seed -1", "--seed -1: ", "0 to 9223372036854775807"),
    "seed too large": (
        "--prompt fox --seed 9223372036854775808",
        "--seed 9223372036854775808: ",
        "0 to 9223372036854775807",
    ),
    "more seeds than prompts": ("--prompt fox --seed 1 2", "--seed 1 2: ", "2 seeds for 1 prompt"),
    "fewer seeds than prompts": ("--prompt a --prompt b --prompt c --seed 1 2", "--seed 1 2: ", "for 3 prompt"),
    "two history sizes": ("--prompt fox --history-sizes 16 2", "--history-sizes 16 2: ", "three sizes"),
    "history of no frames": ("--prompt fox --history-sizes 16 2 0", "--history-sizes 16 2 0: ", "at least 1"),
    "amplify for Mid": (
        "--prompt fox --model random-mid --amplify-first-chunk",
        "--amplify-first-chunk: ",
        "Distilled",
    ),
    "amplify for Base": (
        "--prompt fox --model random-base --amplify-first-chunk",
        "--amplify-first-chunk: ",
        "Helios-Base",
    ),
    # models and devices
    "unknown preset": ("--prompt fox --model tiny-dist", "--model tiny-dist: ", "random-distilled"),
    "folder that is not there": ("--prompt fox --model ./none", "--model ./none: ", "no such folder"),
    "folder without a checkpoint": ("--prompt fox --model folder", "--model ", "folder: ", "model_index.json"),
    "file as model": ("--prompt fox --model notes.png", "--model notes.png: ", "no such folder"),
    "another pipeline": ("--prompt fox --model models/wan", "models/wan: ", "'WanPipeline'", "HeliosPipeline"),
    "index that is no JSON": ("--prompt fox --model models/torn", "models/torn: ", "model_index.json", "read"),
    "index that is a list": ("--prompt fox --model models/list", "models/list: ", "model_index.json", "object"),
    "part missing": ("--prompt fox --model models/no-vae", "models/no-vae: ", "vae", "missing"),
    "config missing": ("--prompt fox --model models/no-config", "models/no-config: ", "scheduler_config.json"),
    "weights missing": ("--prompt fox --model models/no-weights", "models/no-weights: ", "transformer", ".safetensors"),
    "unsupported switch": ("--prompt fox --model models/switch", "models/switch: ", "qk_norm='layer_norm'", "only"),
    "image cross-attention": ("--prompt fox --model models/added", "models/added: ", "added_kv_proj_dim=64", "null"),
    "config of a wrong type": ("--prompt fox --model models/typed", "models/typed: ", "num_layers is 'three'", "int"),
    "config of no layers": ("--prompt fox --model models/none", "models/none: ", "num_layers 0", "at least 1"),
    "hub id while offline": (
        "--prompt fox --model owner/helios",
        "--model owner/helios: ",
        "HF_HUB_OFFLINE is set",
        "hf download",
    ),
    "unknown dtype": ("--prompt fox --dtype int8", "--dtype: ", "'int8'", "bfloat16"),
    "unknown device": ("--prompt fox --device gpu", "--device gpu: ", "auto, cpu"),
    "device without data": ("--prompt fox --device meta", "--device meta: ", "auto, cpu"),
    "device that is not there": ("--prompt fox --device cuda:99", "--device cuda:99: ", "auto, cpu"),
    # layout
    "ranks that are not there": ("--prompt fox --ulysses 2", "--ulysses 2: ", "world size 1"),
    "ring of none": ("--prompt fox --ring 0", "--ring 0: ", "at least 1"),
    "branches without guidance": ("--prompt fox --cfg-parallel 2", "--cfg-parallel 2: ", "no guidance"),
    "split weights on one rank": ("--prompt fox --ffn-tp 2", "--ffn-tp 2: ", "allowed are 1"),
    "split VAE on one rank": ("--prompt fox --vae-parallel 2", "--vae-parallel 2: ", "allowed are 1"),
    "unknown attention": ("--prompt fox --attention sdpa", "--attention: ", "'sdpa'", "native"),
    "attention of another device": ("--prompt fox --device cpu --attention flash", "--attention flash: ", "native"),
    "backend of another device": ("--prompt fox --device cpu --backend nccl", "--backend nccl: ", "gloo"),
    "timeout NaN": ("--prompt fox --timeout nan", "--timeout nan: ", "above 0"),
    "timeout without end": ("--prompt fox --timeout 1e30", "--timeout 1e+30: ", "up to 1e+06"),
    # resuming
    "other prompt": ("--resume run --prompt owl", "run folder run: ", "--prompt fox, not with --prompt owl"),
    "other seed": ("--resume run --seed 7", "run folder run: ", "--seed 42, not with --seed 7"),
    "other dtype": ("--resume run --dtype float16", "run folder run: ", "float32, not with --dtype float16"),
    "other model": (
        "--resume run --model random-mid",
        "run folder run: ",
        "tiny-distilled, not with --model random-mid",
    ),
    "picture on resuming": ("--resume run --image picture.png", "run folder run: ", "no --image, not with --image"),
    "other switch": ("--resume run --skip-first-chunk", "--no-skip-first-chunk, not with --skip-first-chunk"),
    "no run to resume": ("--resume folder", "run folder folder: ", "run.json is missing"),
    "nothing to resume": ("--resume none", "run folder none: ", "run.json is missing"),
    "no runs to resume with a prompt file": ("--resume none --prompt-file good.txt", "--resume none: ", "no such"),
    "run.json torn": ("--resume run-torn", "run folder run-torn: ", "run.json cannot be read"),
    "run.json of another version": ("--resume run-format", "run folder run-format: ", "format 99", "reads 1"),
    "run.json of a wrong type": ("--resume run-typed", "run folder run-typed: ", "height is '64'", "int"),
    "run.json with an unknown field": ("--resume run-unknown", "run folder run-unknown: ", "colour is unknown"),
    "state.json torn": ("--resume run-state-torn", "run folder run-state-torn: ", "state.json cannot be read"),
    "state.json beyond the end": ("--resume run-beyond", "run folder run-beyond: ", "state.json", "9 chunks of 1"),
    "state cut off": ("--resume run-state-cut", "run folder run-state-cut: ", "state-00001.safetensors"),
    "finished chunk missing": ("--resume run-hole", "run folder run-hole: ", "chunk-00000-0.mp4 is missing"),
    "resume and checkpoint-dir": (
        "--prompt fox --resume run --checkpoint-dir new",
        "--resume run and --checkpoint-dir new: ",
        "one of the two",
    ),
    "checkpoint-dir with another run": (
        "--prompt owl --checkpoint-dir run",
        "run folder run: ",
        "--prompt fox, not with --prompt owl",
        "another folder",
    ),
    "checkpoint-dir with what is left of a run": (
        "--prompt fox --checkpoint-dir run-left",
        "run folder run-left: ",
        "run.json is missing",
    ),
    "checkpoint-dir that is a file": (
        "--prompt fox --checkpoint-dir notes.png",
        "--checkpoint-dir notes.png: ",
        "file",
    ),
    "checkpoint-dir below a file": (
        "--prompt fox --checkpoint-dir notes.png/run",
        "--checkpoint-dir notes.png/run: ",
        "not a folder",
    ),
    # where the results go
    "output without suffix": ("--prompt fox --output out", "--output out: ", "allowed is .mp4"),
    "output of another kind": ("--prompt fox --output out.avi", "--output out.avi: ", "allowed is .mp4"),
    "output that is a folder": ("--prompt fox --output folder.mp4", "--output folder.mp4: ", "folder"),
    "output below a file": ("--prompt fox --output notes.png/o.mp4", "--output notes.png/o.mp4: ", "not a folder"),
    "output with too long a name": (f"--prompt fox --output {'o' * 250}.mp4", "--output ooo", "too long"),
    "output with an impossible name": ("--prompt fox --output 'o\0.mp4'", "--output 'o\\x00.mp4'", "zero byte"),
    "output over the clip": ("--prompt fox --video clip.mp4 --output clip.mp4", "--output clip.mp4: ", "another name"),
    "outputs below a file": (
        "--prompt-file good.txt --output notes.png",
        "--output notes.png/0.mp4: ",
        "notes.png is not a folder",
    ),
    "latents of another kind": ("--prompt fox --save-latents l.pt", "--save-latents l.pt: ", "allowed is .safetensors"),
    "report of another kind": ("--prompt fox --report r.txt", "--report r.txt: ", "allowed is .json"),
    "report that is a folder": ("--prompt fox --report folder", "--report folder: ", "folder"),
    "report below a file": ("--prompt fox --report notes.png/r.json", "--report notes.png/r.json: ", "not a folder"),
    # flags
    "unknown flag": ("--prompt fox --cfg 3", "unrecognized arguments: --cfg 3", "--help"),
    "abbreviated flag": ("--prompt fox --num-f 66", "unrecognized arguments: --num-f 66", "--help"),
    "flag without its value": ("--prompt fox --seed", "--seed: ", "expected at least one argument"),
    "switch with a value": ("--prompt fox --skip-first-chunk=yes", "--skip-first-chunk", "'yes'"),
}

GOOD: dict[str, str] = {
    "prompt": "--prompt fox",
    "batch with seeds": "--prompt fox --prompt owl --seed 3 4",
    "small sizes for Base": "--prompt fox --model random-base --height 16 --width 48 --num-inference-steps 1",
    "picture": "--prompt fox --image picture.png --image-noise-sigma 0 1",
    "clip": "--prompt fox --video clip.mp4 --output new/folder/out.MP4",
    "schedule": "--prompt-schedule 1 fox --prompt-schedule 2 owl",
    "prompt file": "--prompt-file good.txt --output new --checkpoint-dir runs",
    "interactive prompt file": "--prompt-file good.csv --interpolate-time 1",
    "prompt file with pictures": "--prompt-file pictures.csv",
    "folder": "--prompt fox --model models/whole --report r.json --save-latents l.safetensors",
    "no amplifying for Mid": "--prompt fox --model random-mid --no-amplify-first-chunk --guidance-scale 0",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, presets, cache, astronaut) -> Path:
    """The files that the cases name; `models` is a link, as checkpoints are too large to copy for each case."""
    place = tmp_path_factory.mktemp("workplace")
    _write_media(place, astronaut)
    _write_prompt_files(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIOS_CP_CACHE", str(cache))
        patch.chdir(place)
        run = f"{SIZE} --prompt fox --pyramid-steps 1 1 1 --dtype float32 --device cpu --checkpoint-dir run"
        assert main(run.split()) == 0
    _write_runs(place)
    models = tmp_path_factory.mktemp("models")
    _write_models(models, presets["random-distilled"])
    (place / "models").symlink_to(models)
    return place


def _write_media(place: Path, astronaut: Image.Image) -> None:
    astronaut.resize((64, 64)).save(place / "picture.png")
    (place / "cut.png").write_bytes((place / "picture.png").read_bytes()[:2000])
    (place / "notes.png").write_text("these are notes")
    (place / "empty.png").touch()
    (place / "folder").mkdir()
    (place / "folder.mp4").mkdir()
    (place / "folder.txt").mkdir()
    frames = torch.from_numpy(np.array(astronaut.resize((64, 64)))).expand(33, 64, 64, 3)
    for name, count in (("clip", 33), ("short", 32)):
        (place / f"{name}.mp4").write_bytes(encode_segment(frames[:count], 24))
    clip = (place / "clip.mp4").read_bytes()
    (place / "cut.mp4").write_bytes(clip[: len(clip) * 2 // 3])


def _write_prompt_files(place: Path) -> None:
    texts = {
        "good.txt": "a fox\nan owl\n",
        "blank.txt": " \n\n",
        "prompts.json": '["fox"]',
        "schedule.json": '[{"prompt": "fox", "chunks": 1}]',
        "number.json": "3",
        "texts.json": '[{"prompt": "fox", "chunks": 1}, "owl"]',
        "half.json": '[{"prompt": "fox", "chunks": 1.5}]',
        "zero.json": '[{"prompt": "fox", "chunks": 1}, {"prompt": "owl", "chunks": 1, "transition": 0}]',
        "other.json": '{"prompt_schedule": [], "speed": 3}',
        "tall.json": '{"prompt_schedule": [], "height": "tall"}',
        "empty.json": "[]",
        "good.csv": 'id,prompt_index,prompt\nx,1,an owl\nx,0,"a fox, red"\n',
        "empty.csv": "",
        "no-id.csv": "prompt\nfox\n",
        "no-prompt.csv": "id,text\na,fox\n",
        "header.csv": "id,prompt\n",
        "empty-prompt.csv": "id,prompt\na,fox\nb, \n",
        "twice.csv": "id,prompt\na,fox\na,owl\n",
        "no-name.csv": "id,prompt\n,fox\n",
        "slash.csv": "id,prompt\na/b,fox\n",
        "dots.csv": "id,prompt\n..,fox\n",
        "comma.csv": "id,prompt\na,a fox, red\n",
        "quote.csv": 'id,prompt\na,"a fox\n',
        "index.csv": "id,prompt_index,prompt\na,first,fox\n",
        "index-twice.csv": "id,prompt_index,prompt\na,0,fox\na,0,owl\n",
        "pictures.csv": "id,image_name,prompt\na,picture.png,fox\n",
        "no-picture.csv": "id,image_name,prompt\na,,fox\n",
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    (place / "latin.txt").write_bytes("a fox café".encode("latin-1"))


def _write_runs(place: Path) -> None:
    def spoil(name: str, file: str, change: Callable[[bytes], bytes]) -> None:
        shutil.copytree(place / "run", place / name)
        (place / name / file).write_bytes(change((place / name / file).read_bytes()))

    def change_request(**fields: object) -> Callable[[bytes], bytes]:
        def change(content: bytes) -> bytes:
            values = json.loads(content)
            values["request"].update(fields)
            return json.dumps(values).encode()

        return change

    spoil("run-torn", "run.json", lambda content: content[:-20])
    spoil("run-format", "run.json", lambda content: content.replace(b'"format": 1', b'"format": 99'))
    spoil("run-typed", "run.json", change_request(height="64"))
    spoil("run-unknown", "run.json", change_request(colour="red"))
    spoil("run-state-torn", "state.json", lambda content: content[:-5])
    spoil("run-beyond", "state.json", lambda content: content.replace(b'"chunks": 1', b'"chunks": 9'))
    spoil("run-state-cut", "state-00001.safetensors", lambda content: content[:-100])
    for name, file in (("run-hole", "chunk-00000-0.mp4"), ("run-left", "run.json")):
        shutil.copytree(place / "run", place / name)
        (place / name / file).unlink()


def _write_models(models: Path, whole: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, models / name, copy_function=os.link))

    def rewrite(path: Path, **values: object) -> None:
        content = json.loads(path.read_text()) | values
        path.unlink()  # the original has the same inode
        path.write_text(json.dumps(content))

    copy("whole")
    rewrite(copy("wan") / "model_index.json", _class_name="WanPipeline")
    for name, text in (("torn", '{"_class_name": "Helios'), ("list", "[]")):
        (copy(name) / "model_index.json").unlink()
        (models / name / "model_index.json").write_text(text)
    shutil.rmtree(copy("no-vae") / "vae")
    (copy("no-config") / "scheduler" / "scheduler_config.json").unlink()
    for file in (copy("no-weights") / "transformer").glob("*.safetensors"):
        file.unlink()
    rewrite(copy("switch") / "transformer" / "config.json", qk_norm="layer_norm")
    rewrite(copy("added") / "transformer" / "config.json", added_kv_proj_dim=64)
    rewrite(copy("typed") / "transformer" / "config.json", num_layers="three")
    rewrite(copy("none") / "transformer" / "config.json", num_layers=0)


@pytest.fixture
def place(workplace, cache, monkeypatch, no_weights) -> Path:
    """The workplace to run in, without a network and with nothing that loads weights; no test may change it."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HELIOS_CP_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable was read on import
    return workplace


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, and every folder."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def refusal(arguments: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused call leaves on stderr."""
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert contents(folder) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("helios_cp.generate: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", CASES)
def test_refused(name, place, capfd):
    arguments, *says = CASES[name]
    line = refusal([*SIZE.split(), *shlex.split(arguments)], place, capfd)
    assert not [part for part in says if part not in line], line
    if says[0].endswith(": "):
        assert line.startswith(f"helios_cp.generate: error: {says[0]}") or not says[0].startswith("--"), line


def test_the_table_has_enough_cases():
    assert len(CASES) >= 50
    assert len({arguments for arguments, *_ in CASES.values()}) == len(CASES)


@pytest.mark.parametrize("name", GOOD)
def test_good_input_goes_on_to_the_weights(name, place, capfd):
    """So that no case above is refused for a reason of its surroundings, and the traps would catch."""
    before = contents(place)
    with pytest.raises(WeightsReached):
        main([*SIZE.split(), *shlex.split(GOOD[name])])
    assert contents(place) == before


@pytest.mark.parametrize("value", ["2", "two", ""])
def test_ranks_that_torchrun_did_not_start(value, place, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    line = refusal([*SIZE.split(), "--prompt", "fox"], place, capfd)
    assert "WORLD_SIZE" in line and "torchrun" in line


@pytest.mark.parametrize("cache_name", ["notes.png", "notes.png/cache"])
def test_a_cache_that_cannot_be_written(cache_name, place, capfd, monkeypatch):
    monkeypatch.setenv("HELIOS_CP_CACHE", cache_name)
    line = refusal([*SIZE.split(), "--prompt", "fox"], place, capfd)
    assert cache_name in line and "set HELIOS_CP_CACHE" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(place, capfd):
    line = refusal([*SIZE.split(), "--prompt", "fox", "--device", "cuda"], place, capfd)
    assert "--device cuda: " in line and "auto, cpu" in line


def test_a_state_of_another_shape_of_file(place, tmp_path, capfd):
    """A safetensors file that is whole but holds no state."""
    run, header = tmp_path / "run", b"{}      "
    shutil.copytree(place / "run", run)
    (run / "state-00001.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "'history' is missing" in refusal(["--resume", str(run)], place, capfd)
