"""Which files of tests take long: they run first, so that none is left alone at the end, and are `slow`.

Most of them start programs, ranks or clusters and wait for them. `make test` gives whole files to its workers, because
tests of a file share what they have made; files that share a server, a cluster or a browser go to one worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

ONE_SERVER = (
    "launchers/serve/live/test_sessions.py",
    "launchers/serve/live/test_changes.py",
    "launchers/serve/live/test_viewers.py",
    "launchers/serve/live/test_queue.py",
    "launchers/serve/live/test_unread.py",
    "launchers/serve/live/test_refused.py",
    "launchers/serve/test_observed.py",
    "launchers/serve/test_nginx.py",
    "launchers/serve/videos/test_openai.py",
    "launchers/serve/test_faults.py",
    "launchers/serve/test_restart.py",
)
"""They share a server, which those at the end kill and start again."""

ONE_CLUSTER = (
    "launchers/test_faults.py",
    "launchers/test_generate.py",
    "launchers/test_pipeline.py",
    "launchers/serve/test_cluster.py",
)
"""They share a Ray cluster of two nodes."""

ONE_BROWSER = ("browser/test_live_page.py", "browser/test_live_docs.py", "browser/test_player.py")
"""They share Chromium and a server."""

TOGETHER = {"one server": ONE_SERVER, "one cluster": ONE_CLUSTER, "one browser": ONE_BROWSER}
"""Files that one worker takes."""

LONGEST_FIRST = (
    *ONE_CLUSTER,
    "generate/test_torchrun.py",
    *ONE_SERVER,
    *ONE_BROWSER,
    "benchmarks/test_gpu_suite.py",
    "launchers/test_recipes.py",
    "pipeline/test_parallelize.py",
    "pipeline/test_pipeline.py",
    "weights/test_hub.py",
    "runtime/test_compilation.py",
    "launchers/test_job.py",
    "launchers/serve/videos/test_bodies.py",
    "launchers/serve/uploads/test_uploads.py",
    "generate/test_generate.py",
    "benchmarks/test_scaling.py",
    "benchmarks/test_gpu_suite_runner.py",
    "benchmarks/test_decode.py",
    "weights/test_sharded.py",
    "weights/test_quantize.py",
    "benchmarks/test_deviation.py",
    "benchmarks/test_fps.py",
    "benchmarks/test_live.py",
    "benchmarks/test_communication.py",
    "generate/test_resume.py",
    "benchmarks/test_attention.py",
    "benchmarks/test_calibrate.py",
    "model/vae/test_autoencoder.py",
    "runtime/test_offload.py",
    "tiny/test_train.py",
    "pipeline/test_split_codec.py",
    "weights/test_lora.py",
    "weights/test_presets.py",
    "benchmarks/test_guard.py",
    "model/test_block_cache.py",
    "benchmarks/test_quality.py",
    "pipeline/test_host_waits.py",
    "generate/test_runs.py",
)


def longest_first(items: list[pytest.Item], files: Sequence[str] = LONGEST_FIRST) -> None:
    """Sort the tests by their files, and mark those of the files that take long."""
    places = {str(TESTS / name): place for place, name in enumerate(files)}
    for item in items:
        if str(item.path) in places:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: places.get(str(item.path), len(files)))


def file_scheduling(config: pytest.Config, log):
    """xdist's scheduler of whole files, for which those that are `TOGETHER` are one."""
    from xdist.scheduler import LoadFileScheduling

    class FileScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((name for name, files in TOGETHER.items() if file.endswith(files)), file)

    return FileScheduling(config, log)
