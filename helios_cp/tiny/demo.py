"""What the embedded models can do, on two ranks of this machine: `python -m helios_cp.tiny.demo --output DIR`.

A prompt, a prompt that changes while the video runs, and a picture to start from; each is a call of
`helios_cp.generate`, which is shown. Other words: `--prompt TEXT`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.console import typed
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import user_path
from helios_cp.tiny.world import TRAINED_SIZE

MODEL = "tiny-distilled"
PROMPT = "a red balloon drifting to the left over a meadow at sunset"
CHANGE = (
    "a blue car driving to the right through a desert by day",
    "a blue car driving to the right through a desert at night",
)
FROM_PICTURE = "a yellow boat sailing to the right on the sea at sunset"
HEIGHT, WIDTH = TRAINED_SIZE
COLUMNS = 8


def main(argv: list[str] | None = None) -> int:
    """Exit codes: those of `helios_cp.generate`. Of what is in DIR only its own files are replaced."""
    parser = OneLineParser(
        prog="helios_cp.tiny.demo",
        usage="python -m helios_cp.tiny.demo [--output DIR] [--prompt TEXT]",
        description=__doc__.splitlines()[0],
    )
    default = Path("outputs/demo")
    parser.add_argument("--output", type=user_path, default=default, metavar="DIR", help=f"default: {default}")
    parser.add_argument("--prompt", type=typed, default=PROMPT, metavar="TEXT", help=f"default: {PROMPT}")
    options = parser.parse_args(argv)
    from helios_cp.files.whole_files import check_folder_target
    from helios_cp.tiny.sheet import write_sheet_of_files
    from helios_cp.tiny.vocabulary import KNOWN

    try:
        check_folder_target("--output", options.output)
    except RequestError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{KNOWN[:1].upper()}{KNOWN[1:]}.", flush=True)
    paths = []
    for name, flags in requests(options.prompt, write_picture(options.output / "picture.png")).items():
        path = options.output / f"{name}.mp4"
        call = ["helios_cp.generate", "--model", MODEL, "--height", str(HEIGHT), "--width", str(WIDTH), *flags]
        call += ["--output", str(path), "--report", str(path.with_suffix(".json"))]
        print(f"\ntorchrun --nproc_per_node 2 -m {shlex.join(call)}", flush=True)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
        code = subprocess.run([*launch, *call]).returncode
        if code:
            return code
        paths.append(path)
    sheet = options.output / "sheet.png"
    write_sheet_of_files(paths, COLUMNS, sheet, (HEIGHT, WIDTH), scale=2)
    print(f"\nA contact sheet, a row a video: {sheet}")
    return 0


def requests(prompt: str, picture: Path) -> dict[str, list[str]]:
    """What each video is asked for, by its name."""
    before, after = CHANGE
    return {
        "prompt": ["--prompt", prompt, "--num-frames", "99"],
        "schedule": ["--prompt-schedule", "2", before, "--prompt-schedule", "2", after, "--interpolation-steps", "1"],
        "picture": ["--prompt", FROM_PICTURE, "--image", str(picture), "--num-frames", "66"],
    }


def write_picture(path: Path) -> Path:
    """A picture of the models' world, of what `FROM_PICTURE` says."""
    from PIL import Image

    from helios_cp.tiny.clips import render
    from helios_cp.tiny.world import Scene

    scene = Scene("sea", "sunset", "boat", "yellow", "right", mirrored=False, x=0.0, size=1.0)
    (frame,) = render(scene, [0], HEIGHT, WIDTH)
    Image.fromarray(((frame + 1) * 127.5).round().astype("uint8")).save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
