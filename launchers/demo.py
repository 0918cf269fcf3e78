"""Two videos at once on a Ray cluster of two nodes, both on this machine: `python -m launchers.demo --output DIR`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

PROMPTS = ("a red fox running through fresh snow", "a lighthouse in a storm at night")
NODES = (3, 2)
"""Logical CPUs of each node: together what the text encoder, two groups and two decoders take, so both are used."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launchers.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo-ray"), metavar="DIR")
    output = parser.parse_args(argv).output
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
    os.environ |= {"RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    from ray.cluster_utils import Cluster

    from launchers.generate import main as generate

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    prompts = output / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    store = {"object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": NODES[0], "include_dashboard": False, **store})
    try:
        cluster.add_node(num_cpus=NODES[1], **store)
        workers = ["--groups", "2", "--decoders", "2", "--wait", "60"]
        request = ["--height", "128", "--width", "192", "--num-frames", "264", "--pyramid-steps", "8", "8", "8"]
        files = ["--prompt-file", str(prompts), "--output", str(output), "--timeline", str(output / "timeline.png")]
        code = generate(["--address", cluster.address, *workers, *request, *files])
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    if code == 0:
        print(f"{output}/0.mp4, {output}/1.mp4, and who worked when: {output}/timeline.png")
    return code


if __name__ == "__main__":
    sys.exit(main())
