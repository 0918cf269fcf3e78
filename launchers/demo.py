"""Two videos at once on a Ray cluster of two nodes, both on this machine: `python -m launchers.demo --output DIR`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from helios_cp.config.arguments import OneLineParser
from helios_cp.config.errors import RequestError
from helios_cp.config.paths import user_path
from helios_cp.tiny.world import TRAINED_SIZE

PROMPTS = (
    "a green balloon floating to the left over a desert by day",
    "a red boat sailing to the right on the sea at night",
)
HEIGHT, WIDTH = TRAINED_SIZE
NODES = (3, 2)
"""Logical CPUs of each node: together what the text encoder, two groups and two decoders take, so both are used."""


def main(argv: list[str] | None = None) -> int:
    """Exit codes: those of `launchers.generate`. Of what is in DIR only its own files are replaced."""
    parser = OneLineParser(prog="launchers.demo", usage="python -m launchers.demo [--output DIR]", description=__doc__)
    parser.add_argument(
        "--output", type=user_path, default=Path("outputs/demo-ray"), metavar="DIR", help="default: outputs/demo-ray"
    )
    output = parser.parse_args(argv).output
    from helios_cp.files.whole_files import check_folder_target

    try:
        check_folder_target("--output", output)
    except RequestError as error:
        parser.error(str(error))
    output.mkdir(parents=True, exist_ok=True)
    for index in range(len(PROMPTS)):
        (output / f"{index}.mp4").unlink(missing_ok=True)  # what exists would be skipped
    prompts = output / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
    os.environ |= {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    from ray.cluster_utils import Cluster

    from launchers.generate.__main__ import main as generate

    store = {"object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": NODES[0], "include_dashboard": False, **store})
    try:
        cluster.add_node(num_cpus=NODES[1], **store)
        workers = ["--groups", "2", "--decoders", "2", "--wait", "60", "--device", "cpu"]
        request = ["--height", str(HEIGHT), "--width", str(WIDTH), "--num-frames", "264"]
        files = ["--prompt-file", str(prompts), "--output", str(output), "--timeline", str(output / "timeline.png")]
        code = generate(["--address", cluster.address, *workers, *request, *files])
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    if code == 0:
        from helios_cp.tiny.sheet import write_sheet_of_files

        videos = [output / f"{index}.mp4" for index in range(len(PROMPTS))]
        write_sheet_of_files(videos, 8, output / "sheet.png", (HEIGHT, WIDTH), scale=2)
        print(f"{output}/0.mp4, {output}/1.mp4, and who worked when: {output}/timeline.png")
        print(f"A contact sheet, a row a video: {output}/sheet.png")
    return code


if __name__ == "__main__":
    sys.exit(main())
