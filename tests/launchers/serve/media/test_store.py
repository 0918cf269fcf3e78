"""Unit: a session's media on disk, and its HLS playlist as FFmpeg's demuxer reads it."""

from __future__ import annotations

import json

import av
import pytest

from launchers.serve.media.store import KEPT, MediaStore, blank_init, playlist
from tests.launchers.serve.media.test_fragments import FRAMES, segments

COUNT = 6
ABOUT = {"take": 0}


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    return segments(COUNT)


def store_in(folder) -> MediaStore:
    return MediaStore(folder, blank_init(64, 64, 24), 24, FRAMES)


def filled(folder, parts) -> MediaStore:
    store = store_in(folder)
    for part in parts:
        store.add(store.write(part, ABOUT))
    return store


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_player_reads_the_playlist(tmp_path, parts, is_finished):
    store = filled(tmp_path, parts)
    store.write_playlist(is_finished)
    options = {"live_start_index": "0", "allowed_extensions": "ALL", "extension_picky": "0", "max_reload": "1"}
    with av.open(str(tmp_path / "live.m3u8"), options=options) as container:
        shown = []
        for frame in container.decode(video=0):
            shown.append(frame.time)
            if len(shown) == COUNT * FRAMES:
                break
    assert shown == sorted(set(shown))
    assert len(shown) == COUNT * FRAMES


def test_the_playlist_is_what_the_standard_wants():
    lines = playlist([1.375, 1.375], 1.375, True, "?token=a").splitlines()
    assert lines[0] == "#EXTM3U"
    assert "#EXT-X-TARGETDURATION:2" in lines
    assert '#EXT-X-MAP:URI="init.mp4?token=a"' in lines
    assert lines[-1] == "#EXT-X-ENDLIST"
    assert lines[-2] == "00001.m4s?token=a"
    assert "#EXT-X-ENDLIST" not in playlist([1.375], 1.375, False)


def test_metadata_say_where_each_chunk_lies(tmp_path, parts):
    store = filled(tmp_path, parts)
    assert [each["first_frame"] for each in store.chunks] == [FRAMES * number for number in range(COUNT)]
    assert [each["media_time"] for each in store.chunks] == [FRAMES * number / 24 for number in range(COUNT)]
    assert store.seconds == COUNT * FRAMES / 24
    for number, each in enumerate(store.chunks):
        assert each["bytes"] == len(store.media(number)) == (tmp_path / f"{number:05d}.m4s").stat().st_size


def test_a_chunk_does_not_count_before_it_is_added(tmp_path, parts):
    store = store_in(tmp_path)
    store.write(parts[0], ABOUT)
    assert not store.chunks
    assert not (tmp_path / "live.m3u8").exists()


def test_memory_holds_the_newest_chunks_alone(tmp_path, parts):
    store = filled(tmp_path, parts)
    assert sorted(store._newest) == list(range(COUNT - KEPT, COUNT))
    assert store.media(0) == (tmp_path / "00000.m4s").read_bytes()


def test_a_later_server_takes_the_files_up(tmp_path, parts):
    before = filled(tmp_path, parts)
    store = store_in(tmp_path)
    store.load(COUNT)
    assert store.chunks == before.chunks


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "00002.m4s").unlink(),
        lambda folder: (folder / "00002.json").unlink(),
        lambda folder: _cut(folder / "00002.m4s"),
        lambda folder: (folder / "00002.json").write_text("{"),
        lambda folder: (folder / "00002.json").write_text(json.dumps({"chunk": 2})),
    ],
)
def test_what_is_not_whole_is_made_again(tmp_path, parts, spoil):
    before = filled(tmp_path, parts)
    spoil(tmp_path)
    store = store_in(tmp_path)
    store.load(COUNT)
    assert len(store.chunks) == 2
    for part in parts[2:]:
        store.add(store.write(part, ABOUT))
    assert store.chunks == before.chunks


def test_another_encoder_is_told(tmp_path, parts):
    store = MediaStore(tmp_path, blank_init(64, 128, 24), 24, FRAMES)
    with pytest.raises(ValueError, match="encoder"):
        store.write(parts[0], ABOUT)
