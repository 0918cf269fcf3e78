"""Unit tests of a video's chunks on disk and of what they become; one test kills child processes. All exact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file, save

from helios_cp.files import chunk_files
from helios_cp.files.chunk_files import ChunkFiles
from helios_cp.files.mp4 import encode_segment

FRAMES = 5
ROOT = Path(chunk_files.__file__).parents[2]


@pytest.fixture(scope="module")
def segments() -> list[bytes]:
    pictures = torch.randint(0, 256, (4, FRAMES, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    return [encode_segment(frames.to(torch.uint8), 24) for frames in pictures]


def latents(chunk: int) -> torch.Tensor:
    """`[B, C, T, h, w]`."""
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(chunk))


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_each_video_of_a_batch_has_its_mp4_and_all_share_the_latents(tmp_path, segments):
    outputs = [tmp_path / "new" / "a.mp4", tmp_path / "b.mp4"]
    files = ChunkFiles.beside(outputs)
    for chunk in range(3):
        files.save(chunk, [segments[chunk], segments[chunk + 1]], latents(chunk))
    assert files.join(outputs, tmp_path / "l" / "all.safetensors") == files.count() == 3
    assert [frames_in(path) for path in outputs] == [3 * FRAMES] * 2
    assert outputs[0].read_bytes() != outputs[1].read_bytes()
    whole = {"latents": torch.cat([latents(chunk) for chunk in range(3)], dim=2)}
    assert (tmp_path / "l" / "all.safetensors").read_bytes() == save(whole)
    files.remove()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.mp4", "all.safetensors", "b.mp4"]
    files.remove()


def test_latents_are_joined_with_one_chunk_in_memory(tmp_path, segments):
    """Twenty chunks of 1 MB each: the heap holds a few of them at most. Python's heap has numpy's memory too."""
    files = ChunkFiles(tmp_path / "chunks")
    chunk = torch.zeros(1, 16, 16, 32, 32)
    for index in range(20):
        files.save(index, [segments[0]], chunk)
    tracemalloc.start()
    try:
        files.join([], tmp_path / "all.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * chunk.nbytes
    assert load_file(tmp_path / "all.safetensors")["latents"].shape == (1, 16, 320, 32, 32)


def test_chunks_play_before_they_are_joined(tmp_path, segments):
    files = ChunkFiles.beside([tmp_path / "out.mp4"])
    files.save(0, [segments[0]])
    (path,) = (tmp_path / ".out.mp4.chunks").iterdir()
    assert path.name == "chunk-00000-0.mp4" and frames_in(path) == FRAMES
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.mp4.chunks"]


def test_without_a_chunk_nothing_is_written(tmp_path):
    files = ChunkFiles.beside([tmp_path / "folder" / "out.mp4"])
    assert files.join([tmp_path / "folder" / "out.mp4"], tmp_path / "l.safetensors") == 0
    files.remove()
    assert list(tmp_path.iterdir()) == []


def test_chunks_after_a_gap_do_not_count(tmp_path, segments):
    files = ChunkFiles(tmp_path, videos=2)
    files.save(0, segments[:2])
    files.save(2, segments[:2])
    (tmp_path / "chunk-00001-0.mp4").write_bytes(segments[0])  # half a chunk
    assert files.count() == 1


def test_a_chunk_may_be_written_again_and_joined_again(tmp_path, segments):
    """As by a worker that was lost before it could answer."""
    path = tmp_path / "out.mp4"
    files = ChunkFiles.beside([path])
    for chunk in (0, 1, 1):
        files.save(chunk, [segments[chunk]])
    files.join([path])
    once = path.read_bytes()
    files.join([path])
    assert path.read_bytes() == once and frames_in(path) == 2 * FRAMES


def test_folders_that_are_half_removed_count_nothing(tmp_path, segments, monkeypatch):
    """Or the file that is finished would be joined again from what is left."""
    files = ChunkFiles(tmp_path / "chunks")
    for chunk in range(3):
        files.save(chunk, [segments[chunk]])
    monkeypatch.setattr(chunk_files.shutil, "rmtree", lambda *_, **__: None)
    files.remove()
    assert files.count() == 0


def test_a_link_is_written_through(tmp_path, segments):
    (tmp_path / "big").mkdir()
    link = tmp_path / "link.mp4"
    link.symlink_to("big/real.mp4")
    for _ in range(2):  # a link to nowhere at first
        files = ChunkFiles.beside([link])
        assert files.path == tmp_path / "big" / ".real.mp4.chunks"
        files.save(0, [segments[0]], latents(0))
        files.join([link])
        files.remove()
        assert link.is_symlink() and frames_in(tmp_path / "big" / "real.mp4") == FRAMES
        assert [path.name for path in (tmp_path / "big").iterdir()] == ["real.mp4"]


def test_a_full_disk_leaves_the_chunks_and_names_the_file(tmp_path, segments):
    """A limit on the size of files makes the kernel refuse the rest of one, as a full disk does."""
    resource = pytest.importorskip("resource")
    files, path = ChunkFiles.beside([tmp_path / "out.mp4"]), tmp_path / "out.mp4"
    files.save(0, [segments[0]])
    files.save(1, [segments[1]])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(segments[0]) + 100, hard))
        with pytest.raises(OSError) as caught:
            files.join([path])
        assert str(path) in str(caught.value)
        with pytest.raises(OSError, match="chunk-00002"):
            files.save(2, [segments[2] * 2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.count() == 2 and not path.exists()
    assert [each.name for each in tmp_path.iterdir()] == [".out.mp4.chunks"]
    assert files.join([path]) == 2 and frames_in(path) == 2 * FRAMES


WRITE_FOREVER = """
import itertools, pathlib, sys
from helios_cp.files.chunk_files import ChunkFiles
segment = pathlib.Path(sys.argv[2]).read_bytes()
files = ChunkFiles.beside([pathlib.Path(sys.argv[1])])
for chunk in itertools.count():
    files.save(chunk, [segment])
    print(chunk, flush=True)
"""


def test_a_killed_process_leaves_chunks_that_play(tmp_path, segments):
    (tmp_path / "segment").write_bytes(segments[0])
    output = tmp_path / "video" / "out.mp4"
    command = [sys.executable, "-c", WRITE_FOREVER, str(output), str(tmp_path / "segment")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert [next(child.stdout).strip() for _ in range(3)] == ["0", "1", "2"]
        finally:
            child.send_signal(signal.SIGKILL)
    files = ChunkFiles.beside([output])
    count = files.count()
    assert count >= 3
    assert files.join([output]) == count and frames_in(output) == count * FRAMES
