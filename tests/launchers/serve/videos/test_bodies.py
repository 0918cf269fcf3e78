"""Unit: `/v1/videos` of a server whose workers are not loaded yet: what is refused, listed and deleted."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

from helios_cp.config.execution import Adapter
from launchers.generate import checks
from launchers.serve.access import Access
from launchers.serve.loras import Loras
from launchers.serve.run import with_example
from launchers.serve.server import Server
from launchers.serve.videos.fields import Fields
from launchers.serve.videos.record import STATUSES, Record
from tests.launchers.serve.conftest import call_of, client_of
from tests.launchers.serve.uploads.files import BAD_FILES, clip, data_url, picture

LORAS = Loras({"ink": "/loras/ink.safetensors"})
KEY = {"Authorization": "Bearer first-key-0123456789"}
GOOD = {"prompt": "a red fox", "size": "64x64"}

BAD_FIELDS = {
    "no prompt": {"prompt": None},
    "empty prompt": {"prompt": ""},
    "white prompt": {"prompt": " \n\t"},
    "long prompt": {"prompt": "x" * 30_000},
    "number for a prompt": {"prompt": 7},
    "list for a prompt": {"prompt": ["a", "b"]},
    "object for a prompt": {"prompt": {"text": "a"}},
    "half a letter": {"prompt": "\ud800"},
    "unknown field": {"colour": "red"},
    "unknown model": {"model": "sora-2"},
    "model by number": {"model": 3},
    "size in words": {"size": "large"},
    "size of zero": {"size": "0x64"},
    "size below zero": {"size": "-64x64"},
    "size by a star": {"size": "64*64"},
    "size that is no multiple": {"size": "65x64"},
    "size that is too large": {"size": "8192x8192"},
    "size that is huge": {"size": "999999x999999"},
    "size of many digits": {"size": "1" * 400 + "x64"},
    "size and another width": {"width": 128},
    "width below zero": {"size": None, "width": -64, "height": 64},
    "width in words": {"size": None, "width": "wide", "height": 64},
    "width as a fraction": {"size": None, "width": 64.5, "height": 64},
    "no seconds": {"seconds": 0},
    "seconds below zero": {"seconds": "-4"},
    "seconds in words": {"seconds": "four"},
    "seconds without end": {"seconds": "inf"},
    "seconds that are none": {"seconds": "nan"},
    "too many seconds": {"seconds": "100000"},
    "seconds and frames": {"seconds": "4", "num_frames": 33},
    "no frames": {"num_frames": 0},
    "too many frames": {"num_frames": 900_000},
    "frames of many digits": {"num_frames": 10**60},
    "frames as a truth": {"num_frames": True},
    "no fps": {"fps": 0},
    "little fps": {"fps": 1e-300},
    "much fps": {"fps": 1e300},
    "seed below zero": {"seed": -1},
    "seed of 64 bits": {"seed": 2**63},
    "seed as a list": {"seed": [1, 2]},
    "guidance below zero": {"guidance_scale": -1},
    "guidance in words": {"guidance_scale": "much"},
    "steps of another model": {"num_inference_steps": 50},
    "no steps": {"num_inference_steps": 0},
    "lora of a path": {"lora": {"path": "/etc/passwd"}},
    "lora that is unknown": {"lora": "motion"},
    "lora as a path": {"lora": "/etc/passwd"},
    "lora of another key": {"lora": {"name": "ink", "weight": 1}},
    "lora that is too strong": {"lora": [{"name": "ink", "scale": 1e9}]},
    "lora of a scale without end": {"lora": {"name": "ink", "scale": float("inf")}},
    "lora as an extra": {"extra_params": {"lora": "ink"}},
    "extra that is no object": {"extra_params": [1]},
    "extra that is no JSON": {"extra_params": "{"},
    "unknown extra": {"extra_params": {"colour": "red"}},
    "extra that is given already": {"extra_params": {"prompt": "a hare"}},
    "an image by its path": {"extra_params": {"image": "/etc/passwd"}},
    "a video by its path": {"extra_params": {"video": "/etc/passwd"}},
    "extra of another type": {"extra_params": {"zero_steps": "many"}},
    "extra of many digits": {"extra_params": {"max_sequence_length": 10**90}},
    "extra that takes all memory": {"extra_params": {"max_sequence_length": 10**9}},
    "history that takes all memory": {"extra_params": {"history_sizes": [10**6, 2, 1]}},
    "chunks that take all memory": {"extra_params": {"num_latent_frames_per_chunk": 10**6}},
    "steps without end": {"extra_params": {"pyramid_num_inference_steps_list": [10**9, 1, 1]}},
    "wrong stages": {"extra_params": {"pyramid_num_inference_steps_list": [1]}},
    "sigmas": {"extra_params": {"sigmas": [1.0]}},
    "a file of the server": {"input_reference": {"image_url": "file:///etc/passwd"}},
    "an address in the server's network": {"input_reference": {"image_url": "http://169.254.169.254/latest"}},
    "a file's number": {"input_reference": {"file_id": "file-1"}},
    "an empty reference": {"input_reference": {}},
    "a list of references": {"input_reference": [1]},
    "two addresses": {"input_reference": {"image_url": data_url(picture()), "video_url": data_url(clip())}},
    "two references": {"input_reference": data_url(picture()), "image_reference": {"image_url": data_url(picture())}},
    "a clip as a picture": {"image_reference": {"image_url": data_url(clip(), "image/png")}},
    "a picture as a clip": {"video_reference": {"video_url": data_url(picture(), "video/mp4")}},
    "a picture of no base64": {"input_reference": "data:image/png;base64,****"},
    "a picture with a script": {"input_reference": data_url(BAD_FILES["svg"], "image/svg+xml")},
    "a short clip": {"input_reference": data_url(clip(5), "video/mp4")},
    "half a picture": {"input_reference": data_url(picture()[:1000])},
}
"""By what is wrong: what is put into a good body; `None` takes a field out."""

BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a text": b'"a fox"',
    "a number": b"1",
    "NaN": b'{"prompt": "a fox", "fps": NaN}',
    "many digits": b'{"prompt": "a fox", "seed": ' + b"9" * 5000 + b"}",
    "deep": b'{"prompt": ' * 50_000,
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "a zero byte": b"\x00",
}


@pytest.fixture(scope="module")
def checked(presets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    call = call_of(folder, model=str(presets["random-distilled"]), device="cpu")
    return checks.check_session(with_example(call), None, 1, "cpu")


@pytest.fixture
def server(tmp_path, checked, key_file):
    call = call_of(tmp_path, model=checked.model, upload_bytes=2**20, message_bytes=2**22, requests=10_000, queue=4)
    return Server(call, checked, Access.of(key_file), LORAS)


@pytest.fixture
def client(server):
    with client_of(server) as client:  # one event loop for all requests
        client.headers.update(KEY)
        yield client


def is_refused(answer, status: int | None = None) -> dict[str, str]:
    """An error in OpenAI's shape, and nothing of the server's inside."""
    assert 400 <= answer.status_code < 500 if status is None else answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    assert not re.search(r"Traceback|File \"|/data/|site-packages|\.py", answer.text)
    return error


def is_clean(server) -> bool:
    """Nothing is left of what was refused."""
    data = server.call.data
    return not [each for each in data.rglob("*") if each.is_file() or each.parent.name == "videos"]


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_as_json(client, server, name):
    body = {key: value for key, value in {**GOOD, **BAD_FIELDS[name]}.items() if value is not None}
    is_refused(client.post("/v1/videos", content=json.dumps(body), headers={"content-type": "application/json"}))
    assert is_clean(server)
    assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize("name", [each for each in BAD_FIELDS if each not in ("half a letter", "number for a prompt")])
def test_bad_fields_as_a_form(client, server, name):
    body = {key: value for key, value in {**GOOD, **BAD_FIELDS[name]}.items() if value is not None}
    body = {key: value if isinstance(value, str) else json.dumps(value) for key, value in body.items()}
    if name in ("list for a prompt", "object for a prompt", "model by number"):
        body["prompt"] = ""  # a form has texts only
    is_refused(client.post("/v1/videos", files={key: (None, value) for key, value in body.items()}))
    assert is_clean(server)


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]
)
def test_bad_bodies(client, server, name, kind):
    is_refused(client.post("/v1/videos", content=BAD_BODIES[name], headers={"content-type": kind}), 400)
    assert is_clean(server)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(client, server, name):
    files = {"input_reference": ("fox.png", BAD_FILES[name], "image/png")}
    error = is_refused(client.post("/v1/videos", data=GOOD, files=files), 400)
    assert error["param"] == "input_reference"
    assert is_clean(server)


def test_files_that_are_too_large(client, server):
    files = {"input_reference": ("fox.png", picture() + bytes(2**20), "image/png")}
    assert is_refused(client.post("/v1/videos", data=GOOD, files=files), 413)["code"] == "too_large"
    files = {"input_reference": ("fox.png", bytes(2**22), "image/png")}
    assert is_refused(client.post("/v1/videos", data=GOOD, files=files), 413)["code"] == "too_large"
    assert is_clean(server)


def test_forms_of_many_fields_and_files(client, server):
    many = {f"field{number}": (None, "x") for number in range(100)}
    is_refused(client.post("/v1/videos", files=many), 400)
    two = [("input_reference", ("a.png", picture())), ("input_reference", ("b.png", picture()))]
    is_refused(client.post("/v1/videos", data=GOOD, files=two), 400)
    is_refused(client.post("/v1/videos", files=[("prompt", (None, "a")), ("prompt", (None, "b"))]), 400)
    assert is_clean(server)


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer wrong", "Basic first-key-0123456789", "first-key-0123456789"]
)
def test_without_the_key_nothing_is_told(server, key):
    client = client_of(server)
    headers = {} if key is None else {"Authorization": key}
    for method, path in [
        ("post", ""),
        ("get", ""),
        ("get", "/video_1"),
        ("get", "/video_1/content"),
        ("delete", "/video_1"),
    ]:
        answer = client.request(method, "/v1/videos" + path, headers=headers)
        assert is_refused(answer, 401)["type"] == "authentication_error"


@pytest.mark.parametrize(
    "video", ["video_1", "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "video.json", "x" * 5000, "%00", "\u00e4"]
)
def test_unknown_videos(client, video):
    for method, path in (("get", ""), ("get", "/content"), ("delete", "")):
        answer = client.request(method, f"/v1/videos/{video}{path}")
        assert answer.status_code in (404, 405)
        if answer.json().get("error", {}).get("code") != "method_not_allowed":
            assert answer.status_code == 404


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=-1", "order=up", "after=" + "x" * 200])
def test_bad_pages(client, query):
    is_refused(client.get(f"/v1/videos?{query}"), 400)


def test_a_page_after_a_video_that_is_not_there(client):
    is_refused(client.get("/v1/videos?after=video_1"), 404)


def create(client, **fields) -> dict:
    answer = client.post("/v1/videos", json={**GOOD, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_is_asked_is_told(client, server):
    extra = {"pyramid_num_inference_steps_list": [1, 1, 1]}
    made = create(client, seconds="4", seed=3, extra_params=extra, negative_prompt="dogs", user="me")
    assert re.fullmatch(r"video_[0-9a-f]{32}", made["id"])
    assert (made["object"], made["status"], made["progress"]) == ("video", "queued", 0)
    assert (made["size"], made["prompt"], made["seed"]) == ("64x64", "a red fox", 3)
    assert (made["num_frames"], made["seconds"]) == (99, "4.125")  # whole chunks
    (record,) = server.videos
    assert record.request.pyramid_num_inference_steps_list == (1, 1, 1)
    assert record.request.negative_prompt == "dogs"
    assert client.get(f"/v1/videos/{made['id']}").json() == made


LORA_FORMS = [
    {"lora": "ink"},
    {"lora[name]": "ink", "lora[scale]": "1"},
    {"lora": '{"name": "ink"}'},
    {"lora": '[{"name": "ink", "scale": 1}]'},
]


@pytest.mark.parametrize("form", LORA_FORMS)
def test_adapters_of_a_form(client, server, form):
    answer = client.post("/v1/videos", data={**GOOD, **form})
    assert answer.status_code == 200, answer.text
    assert "/loras" not in answer.text
    (record,) = server.videos
    assert record.request.lora == (Adapter("/loras/ink.safetensors"),)


@pytest.mark.parametrize("kind", ["file", "data URL", "object", "text of an object"])
def test_a_picture_to_start_from(client, server, kind):
    url = data_url(picture("JPEG"), "image/jpeg")
    files = {name: (None, value) for name, value in GOOD.items()}
    if kind == "file":
        files["input_reference"] = ("x.txt", picture("JPEG"), "text/plain")
    elif kind == "object":
        files["input_reference[image_url]"] = (None, url)
    else:
        files["input_reference"] = (None, url if kind == "data URL" else json.dumps({"image_url": url}))
    answer = client.post("/v1/videos", files=files)
    assert answer.status_code == 200, answer.text
    (record,) = server.videos
    assert record.request.image == str((record.folder / "start.png").absolute())
    assert sorted(each.name for each in record.folder.iterdir()) == ["start.png", "video.json"]


def test_a_clip_to_go_on_from(client, server):
    create(client, video_reference={"video_url": data_url(clip(), "video/mp4")})
    (record,) = server.videos
    assert record.request.video == str((record.folder / "start.mp4").absolute())


def test_pages(client):
    made = [create(client)["id"] for _ in range(3)]
    newest = client.get("/v1/videos?limit=2").json()
    assert [each["id"] for each in newest["data"]] == made[:0:-1]
    assert (newest["object"], newest["has_more"]) == ("list", True)
    assert (newest["first_id"], newest["last_id"]) == (made[2], made[1])
    rest = client.get(f"/v1/videos?limit=2&after={made[1]}").json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([made[0]], False)
    assert [each["id"] for each in client.get("/v1/videos?order=asc").json()["data"]] == made


def test_a_queue_that_is_full(client):
    for _ in range(5):  # one would be made, four wait
        create(client)
    answer = client.post("/v1/videos", json=GOOD)
    assert is_refused(answer, 503)["code"] == "busy"
    assert answer.headers["retry-after"]


def test_a_queued_video_is_deleted_with_its_files(client, server):
    made = create(client, input_reference=data_url(picture()))
    is_refused(client.get(f"/v1/videos/{made['id']}/content"), 409)
    assert client.delete(f"/v1/videos/{made['id']}").json() == {
        "id": made["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    is_refused(client.get(f"/v1/videos/{made['id']}"), 404)
    is_refused(client.delete(f"/v1/videos/{made['id']}"), 404)
    client.portal.call(lambda: _settled(server))
    assert is_clean(server)


async def _settled(server) -> None:
    while server.videos._tasks:
        await asyncio.wait(server.videos._tasks)


def test_another_start_takes_up_what_is_there(client, server, checked):
    made = [create(client)["id"] for _ in range(2)]
    (server.videos.folder / "video_dead").mkdir()  # what is left of a deleted one
    broken = server.videos.folder / "video_broken"
    broken.mkdir()
    (broken / "video.json").write_text("{")
    again = Server(server.call, checked, server.access)
    again.restore()
    assert [each.id for each in again.videos] == made
    assert [each.told() for each in again.videos] == [each.told() for each in server.videos]
    assert not (server.videos.folder / "video_dead").exists()
    assert broken.exists()  # nobody knows what it is, so nobody deletes it


@pytest.mark.parametrize("keep", [24.0, None])
def test_old_videos_go_and_others_stay(tmp_path, checked, keep):
    """Also those that an earlier server has finished."""
    hour, now = 3600.0, 1e9
    ages = {"old": 25, "failed": 25, "new": 23, "queued": None, "in_progress": None}
    for name, age in ages.items():
        folder = tmp_path / "data" / "videos" / f"video_{name}"
        record = Record(folder.name, folder, checked.jobs[0].request, "model", now - 99 * hour)
        record.status = name if name in STATUSES else "completed"
        record.completed_at = None if age is None else now - age * hour
        record.save()
    server = Server(call_of(tmp_path, model=checked.model, keep=keep), checked)
    server.restore()

    async def clean_up() -> None:
        await server.videos.delete_expired(now)
        await _settled(server)

    asyncio.run(clean_up())
    left = {f"video_{name}" for name in ages if keep is None or name not in ("old", "failed")}
    assert {each.id for each in server.videos} == left == {each.name for each in server.videos.folder.iterdir()}
    assert server.videos.find("video_new").told()["expires_at"] == (None if keep is None else int(now + hour))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*Fields.model_fields, "input_reference", "image_reference", "video_reference"])


@given(fields=st.dictionaries(NAMES, JSON, max_size=4), extra=st.dictionaries(st.text(max_size=10), JSON, max_size=2))
@with_settings(max_examples=150)
def test_any_bodies(tmp_path_factory, checked, fields, extra):
    """Whatever is sent is a video, or refused in OpenAI's shape with nothing left; never a fault."""
    call = call_of(tmp_path_factory.mktemp("any"), model=checked.model, requests=10_000)
    server = Server(call, checked)
    with client_of(server) as client:
        answer = client.post(
            "/v1/videos",
            json=None,
            content=json.dumps({**GOOD, **fields, **extra}),
            headers={"content-type": "application/json"},
        )
    if answer.status_code == 200:
        assert answer.json()["object"] == "video"
    else:
        is_refused(answer)
        assert is_clean(server)


@given(
    content=st.binary(max_size=200),
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"]),
)
@with_settings(max_examples=150)
def test_any_bytes(tmp_path_factory, checked, content, kind):
    server = Server(call_of(tmp_path_factory.mktemp("any"), model=checked.model, requests=10_000), checked)
    with client_of(server) as client:
        if kind.startswith("multipart"):
            content = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + content
        is_refused(client.post("/v1/videos", content=content, headers={"content-type": kind}))
    assert is_clean(server)
