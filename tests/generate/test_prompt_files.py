"""Unit: from flags and prompt files to requests. Exact comparisons only."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_cp.config.checkpoint import Checkpoint
from helios_cp.config.errors import RequestError
from helios_cp.config.execution import Adapter
from helios_cp.config.json_types import from_json
from helios_cp.config.request import Request, ScheduledPrompt
from helios_cp.generate.prompt_files import INTERPOLATE_TIME, Job, read_prompt_file, single_job

# Prompt files


def read(path: Path, content: str | bytes, request: Request | None = None, **options) -> list[Job]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_file(path, request or Request(), Path("videos"), **options)


def prompts(jobs: list[Job]) -> dict[str, tuple[str, ...]]:
    return {str(job.output[0]): job.request.prompt for job in jobs}


def test_txt_has_a_prompt_a_line(tmp_path):
    request = Request(seed=(7,), height=64)
    jobs = read(tmp_path / "p.txt", "a fox\n\n  an owl, at night \r\nein Fuchs im Schnee ❄", request)
    assert prompts(jobs) == {
        "videos/0.mp4": ("a fox",),
        "videos/1.mp4": ("an owl, at night",),
        "videos/2.mp4": ("ein Fuchs im Schnee ❄",),
    }
    assert all(job.request == dataclasses.replace(request, prompt=job.request.prompt) for job in jobs)


def test_rows_with_schedules_and_adapters(tmp_path):
    """In both kinds of files; an adapter lies beside the file, and a row without one has those of all."""
    (tmp_path / "style.safetensors").touch()
    schedule = [{"prompt": "a fox", "chunks": 2}, {"prompt": "an owl", "chunks": 1, "transition": 2}]
    expected = (ScheduledPrompt("a fox", 2), ScheduledPrompt("an owl", 1, 2))
    lines = [{"prompt_schedule": schedule, "lora": "style.safetensors"}, {"prompt": "a cat", "lora_scale": None}]
    lines.append({"prompt": "a dog", "lora": str(tmp_path / "style.safetensors"), "lora_scale": 0.5})
    found = [job.request for job in read(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))]
    style = str(tmp_path / "style.safetensors")
    assert [request.lora for request in found] == [(Adapter(style),), None, (Adapter(style, 0.5),)]
    assert [request.prompt_schedule for request in found] == [expected, (), ()]
    assert [request.prompt for request in found] == [(), ("a cat",), ("a dog",)]
    quoted = json.dumps(schedule).replace('"', '""')
    (job,) = read(tmp_path / "p.csv", f'id,prompt_schedule,lora,lora_scale\na,"{quoted}",style.safetensors,-1\n')
    assert (job.request.prompt_schedule, job.request.lora) == (expected, (Adapter(style, -1.0),))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a", "lora": "no.safetensors"}, "the lora 'no.safetensors' of 'x' is no file or folder"),
        ({"prompt": "a", "lora": "p.jsonl", "lora_scale": "strong"}, "the lora_scale 'strong' of 'x' is no finite"),
        ({"prompt": "a", "lora": "p.jsonl", "lora_scale": "inf"}, "the lora_scale 'inf' of 'x' is no finite"),
        ({"prompt": "a", "lora_scale": 1}, "a lora_scale and no lora"),
        ({"prompt": "a", "prompt_schedule": [{"prompt": "b", "chunks": 1}]}, "give one of the two"),
        ({"prompt_schedule": [{"prompt": "b"}]}, "entry 1: prompt and chunks are needed"),
        ({"prompt_schedule": "a fox"}, "the prompt_schedule of 'x' is none"),
        ({"prompt_schedule": []}, "the prompt of 'x' is empty"),
        ({"prompt_schedule": [], "prompt": "a", "prompt_index": 0}, "exclude each other"),
    ],
)
def test_bad_schedules_and_adapters_of_rows(tmp_path, row, named):
    with pytest.raises(RequestError, match=named):
        read(tmp_path / "p.jsonl", json.dumps({"id": "x", **row}))


def test_only_line_ends_end_a_prompt(tmp_path):
    """Python's `splitlines` would also break at these."""
    odd = "a\x0bb\x0cc\x1cd\x85e\u2028f"
    assert [job.request.prompt for job in read(tmp_path / "p.txt", f"{odd}\ng")] == [(odd,), ("g",)]


@pytest.mark.parametrize("name", ["p.txt", "P.TXT"])
def test_byte_order_mark_is_no_part_of_the_prompt(tmp_path, name):
    assert prompts(read(tmp_path / name, b"\xef\xbb\xbfa fox")) == {"videos/0.mp4": ("a fox",)}


def test_csv_of_prompts(tmp_path):
    """As spreadsheets write it: a byte order mark, CR LF, other columns, quoted cells with commas, quotes and lines."""
    content = 'id,mood,prompt\r\nfox,calm,"a ""red"" fox,\r\nin the snow"\r\n\r\n2.b,,an owl\r\n'
    assert prompts(read(tmp_path / "p.csv", b"\xef\xbb\xbf" + content.encode())) == {
        "videos/fox.mp4": ('a "red" fox,\nin the snow',),
        "videos/2.b.mp4": ("an owl",),
    }


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("1,plain,refined", "refined"),
        ("1,plain,", "plain"),
        ("1,plain, ", "plain"),
        ("1,plain", "plain"),
        ("1,,r", "r"),
    ],
)
def test_refined_prompt_comes_first_where_it_is_filled_in(tmp_path, row, prompt):
    (job,) = read(tmp_path / "p.csv", f"id,prompt,refined_prompt\n{row}\n")
    assert job.request.prompt == (prompt,)


def test_refined_prompt_alone(tmp_path):
    (job,) = read(tmp_path / "p.csv", "id,refined_prompt\n1,fox\n")
    assert job.request.prompt == ("fox",)


@pytest.mark.parametrize("folder", [None, "pictures"])
def test_csv_of_pictures(tmp_path, monkeypatch, folder):
    """Names are relative to the CSV's folder or to the one given, and become absolute."""
    place = tmp_path / folder if folder else tmp_path
    (place / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (place / name).write_bytes(b"checked later")
    monkeypatch.chdir(tmp_path)
    content = "id,image_name,prompt\nx,a.png,fox\ny,deep/b.png,owl\n"
    jobs = read(Path("p.csv"), content, image_folder=Path(folder) if folder else None)
    assert [(job.request.prompt, job.request.image) for job in jobs] == [
        (("fox",), str(place / "a.png")),
        (("owl",), str(place / "deep" / "b.png")),
    ]


def test_one_picture_for_all_prompts(tmp_path):
    jobs = read(tmp_path / "p.csv", "id,prompt\nx,fox\ny,owl\n", Request(image="/a.png"))
    assert [job.request.image for job in jobs] == ["/a.png", "/a.png"]


@pytest.mark.parametrize("chunks", [INTERPOLATE_TIME, 2])
def test_csv_of_interactive_videos(tmp_path, chunks):
    content = "id,prompt_index,prompt,refined_prompt\nx,2,c,\nfox,0,d,e\nx,-1,a,\nx,10,b,\n"
    jobs = read(tmp_path / "p.csv", content, chunks=chunks)
    assert [(str(job.output[0]), job.request.prompt_schedule) for job in jobs] == [
        ("videos/x.mp4", tuple(ScheduledPrompt(text, chunks) for text in "acb")),
        ("videos/fox.mp4", (ScheduledPrompt("e", chunks),)),
    ]
    assert all(job.request.prompt == () for job in jobs)
    assert jobs[0].request.num_chunks == max(3 * chunks, 4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id,prompt\na,fox\n", None),
        ("id,prompt\na\\b,fox\n", r"'a\\\\b'"),
        ("id,prompt\n.hidden,fox\n", "'.hidden'"),
        ("id,prompt\na\0b,fox\n", r"p\.csv"),
        (f"id,prompt\na,{'x' * 200_000}\n", "field larger"),
        ("id,prompt,image_name,prompt_index\na,fox,b.png,0\n", "exclude each other"),
    ],
)
def test_more_files_that_are_refused(tmp_path, content, says):
    """Beside those in `test_bad_input.py`; the first of them is fine, to show what the others lack."""
    if says is None:
        assert len(read(tmp_path / "p.csv", content)) == 1
        return
    with pytest.raises(RequestError, match=says) as caught:
        read(tmp_path / "p.csv", content)
    assert str(caught.value).startswith(f"--prompt-file {tmp_path / 'p.csv'}")


READ = {
    "semicolons": ("csv", "id;prompt\r\n1;a fox, red\r\n", {"1": "a fox, red"}),
    "the line for Excel": ("csv", "sep=;\r\nid;prompt\r\n1;fox\r\n", {"1": "fox"}),
    "tabs": ("csv", "id\tprompt\n1\tfox\n", {"1": "fox"}),
    "tabs by suffix": ("tsv", "id\tprompt\n1\ta fox, red; small\n", {"1": "a fox, red; small"}),
    "UTF-16": ("csv", "id,prompt\r\n1,füchslein\r\n".encode("utf-16"), {"1": "füchslein"}),
    "UTF-16, a prompt a line": ("txt", "a fox\r\nan owl\r\n".encode("utf-16"), {"0": "a fox", "1": "an owl"}),
    "empty rows at the end": ("csv", "id,prompt,more\n1,fox,5\n,,\n , ,\n", {"1": "fox"}),
    "an empty column": ("csv", "id,prompt,\n1,fox,\n2,owl,,,\n", {"1": "fox", "2": "owl"}),
    "a column without a name": ("csv", ",id,prompt\n0,a,fox\n1,b,owl\n", {"a": "fox", "b": "owl"}),
    "capitals and blanks in the header": ("csv", "ID , Prompt\n1, fox\n", {"1": "fox"}),
    "quotes after blanks": ("csv", 'id, prompt\n1, "a fox, red"\n', {"1": "a fox, red"}),
    "carriage returns": ("csv", "id,prompt\r1,fox\r2,owl\r", {"1": "fox", "2": "owl"}),
    "a quote in the middle": ("csv", 'id,prompt\n1,a 5" fox\n', {"1": 'a 5" fox'}),
    "an id with the suffix": ("csv", "id,prompt\nfox.mp4,a\n", {"fox": "a"}),
    "objects": ("jsonl", '{"id": 7, "prompt": "fox"}\n\n{"ID": "b", "prompt": null, "refined_prompt": "owl"}\n',
                {"7": "fox", "b": "owl"}),
    "objects without ids": ("jsonl", '{"prompt": "fox", "seconds": 5}\n{"prompt": "owl"}\n', {"0": "fox", "1": "owl"}),
    "lines without a suffix": ("", "a fox\nan owl", {"0": "a fox", "1": "an owl"}),
    "rows without a suffix": ("", "id,prompt\na,fox", {"a": "fox"}),
    "objects without a suffix": ("", '{"prompt": "fox"}', {"0": "fox"}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_as_spreadsheets_and_programs_write_them(tmp_path, name):
    suffix, content, expected = READ[name]
    jobs = read(tmp_path / f"p.{suffix}" if suffix else tmp_path / "p", content)
    assert prompts(jobs) == {f"videos/{name}.mp4": (prompt,) for name, prompt in expected.items()}


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        ("csv", "id,prompt\n1,a “fox”\n".encode("cp1252"), "line 2: this is no UTF-8 text; save the file as UTF-8"),
        ("txt", "a fox\nan\0 owl\n", "line 2: a zero byte"),
        ("csv", 'id,prompt\n"a\nb",fox\n', "no /, .*, line break"),
        ("csv", "id,prompt,Prompt\n1,fox,owl\n", "column prompt stands there twice"),
        ("csv", "sep=;\nid;prompt\n1;fox\n1;owl\n", "line 4: '1' stands there twice"),
        ("csv", "id,prompt_index,prompt\na,0.5,x\n", "'0.5' of 'a' is no whole number"),
        ("jsonl", '{"prompt": "fox"}\n{"prompt"\n', "line 2: it is no valid JSON"),
        ("jsonl", '["fox"]\n', "line 1: an object is allowed, such as"),
        ("jsonl", '{"prompt": ["fox"]}\n', r"line 1: prompt is \[\"fox\"\]; a text is allowed"),
        ("jsonl", '{"id": "a"}\n', "the prompt of 'a' is empty"),
        ("json", "[]", "allowed are .txt, .csv, .tsv, .jsonl or none"),
    ],
)
def test_what_is_not_clear_is_refused_with_line_and_cure(tmp_path, suffix, content, says):
    with pytest.raises(RequestError, match=says):
        read(tmp_path / f"p.{suffix}", content)


def test_whole_numbers_as_pandas_writes_them(tmp_path):
    (job,) = read(tmp_path / "p.csv", "id,prompt_index,prompt\na,1.0,y\na,0.0,x\n")
    assert [entry.prompt for entry in job.request.prompt_schedule] == ["x", "y"]


def test_pictures_as_windows_names_them(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "fox.png").touch()
    (job,) = read(tmp_path / "p.csv", "id,image_name,prompt\n1,img\\fox.png,fox\n")
    assert job.request.image == str(tmp_path / "img" / "fox.png")
    with pytest.raises(RequestError, match=r"there is fox\.png, and capitals matter"):
        read(tmp_path / "p.csv", "id,image_name,prompt\n1,img/FOX.png,fox\n")


def test_a_pipe_is_read_once_and_may_be_asked_twice():
    """One call is checked several times on a cluster."""
    reads, writes = os.pipe()
    os.write(writes, b"a fox\n")
    os.close(writes)
    try:
        for _ in range(2):
            jobs = read_prompt_file(Path(f"/dev/fd/{reads}"), Request(), Path("videos"))
            assert prompts(jobs) == {"videos/0.mp4": ("a fox",)}
    finally:
        os.close(reads)


# Names of the outputs


def test_one_output_a_video():
    one, three = Request(prompt=("a",)), Request(prompt=("a", "b", "c"))
    scheduled = Request(prompt_schedule=(ScheduledPrompt("a", 1), ScheduledPrompt("b", 1)))
    assert single_job(one, Path("d/out.mp4")) == Job(one, (Path("d/out.mp4"),))
    assert single_job(scheduled, Path("out.mp4")).output == (Path("out.mp4"),)
    assert single_job(three, Path("d/my.out.MP4")).output == tuple(Path(f"d/my.out-{i}.MP4") for i in range(3))


# Requests as JSON

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
COUNT = st.integers(-(2**70), 2**70)
REQUESTS = st.builds(
    Request,
    prompt=st.lists(TEXT, max_size=3).map(tuple),
    negative_prompt=TEXT,
    prompt_schedule=st.lists(st.builds(ScheduledPrompt, prompt=TEXT, chunks=COUNT), max_size=3).map(tuple),
    image=st.none() | TEXT,
    height=COUNT,
    seed=st.lists(COUNT, min_size=1, max_size=3).map(tuple),
    guidance_scale=st.none() | st.floats(allow_nan=False) | COUNT,
    pyramid_num_inference_steps_list=st.none() | st.lists(COUNT, max_size=4).map(tuple),
    sigmas=st.none() | st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    is_amplify_first_chunk=st.none() | st.booleans(),
    keep_first_frame=st.booleans(),
    history_sizes=st.lists(COUNT, max_size=4).map(tuple),
    image_noise_sigma_max=st.floats(allow_nan=False),
)


@given(REQUESTS)
def test_json_and_back(request):
    again = from_json(Request, json.loads(json.dumps(dataclasses.asdict(request))))
    assert again == request
    assert hash(again) == hash(request)  # tuples, not lists


def test_a_request_of_an_earlier_version_takes_the_defaults():
    assert from_json(Request, {"prompt": ["fox"], "height": 64}) == Request(prompt=("fox",), height=64)


@pytest.mark.parametrize(
    "change",
    [
        {"height": "64"},
        {"height": 64.0},
        {"height": True},
        {"seed": [1, "2"]},
        {"seed": 1},
        {"prompt": "fox"},
        {"keep_first_frame": 1},
        {"guidance_scale": "5"},
        {"image": ["a.png"]},
        {"prompt_schedule": [{"prompt": "a"}]},
        {"prompt_schedule": [{"prompt": "a", "chunks": "1"}]},
        {"colour": "red"},
    ],
)
def test_json_of_another_shape(change):
    with pytest.raises(TypeError):
        from_json(Request, {**dataclasses.asdict(Request(prompt=("fox",))), **change})


def test_types_of_fixed_tuples_and_unions():
    @dataclasses.dataclass
    class Example:
        size: tuple[int, int]
        scale: float | None = None

    from_json(Example, {"size": (1, 2), "scale": 1})
    for wrong in ({"size": (1,)}, {"size": (1, 2, 3)}, {"size": (1, 2.0)}, {"scale": "1"}, {"scale": False}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            from_json(Example, {"size": (1, 2)} | wrong)


# What a checkpoint makes of a request

DEFAULTS = {
    "random-base": {"guidance_scale": 5.0, "num_inference_steps": 50, "is_amplify_first_chunk": False},
    "random-mid": {
        "guidance_scale": 5.0,
        "pyramid_num_inference_steps_list": (20, 20, 20),
        "is_amplify_first_chunk": False,
    },
    "random-distilled": {
        "guidance_scale": 1.0,
        "pyramid_num_inference_steps_list": (2, 2, 2),
        "is_amplify_first_chunk": True,
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_is_what_the_checkpoint_is_meant_for(presets, name):
    checkpoint, request = Checkpoint.read(presets[name]), Request(prompt=("fox",))
    resolved = request.resolve(checkpoint)
    assert resolved == dataclasses.replace(request, **DEFAULTS[name])
    assert resolved.resolve(checkpoint) == resolved


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_given_stays(presets, name):
    checkpoint = Checkpoint.read(presets[name])
    steps = {"num_inference_steps": 3} if name == "random-base" else {"pyramid_num_inference_steps_list": (1, 2, 3)}
    request = Request(prompt=("fox",), guidance_scale=2.5, is_amplify_first_chunk=False, **steps)
    assert request.resolve(checkpoint) == request


def test_sigmas_set_the_number_of_steps_for_base(presets):
    base, mid = (Checkpoint.read(presets[name]) for name in ("random-base", "random-mid"))
    request = Request(prompt=("fox",), sigmas=(0.9, 0.5, 0.1))
    assert request.resolve(base).num_inference_steps == 3
    with pytest.raises(RequestError, match="sigmas: 3 given for --num-inference-steps 4"):
        dataclasses.replace(request, num_inference_steps=4).resolve(base)
    with pytest.raises(RequestError, match="sigmas: only Helios-Base"):
        request.resolve(mid)


@pytest.mark.parametrize(
    ("num_frames", "schedule", "chunks"),
    [
        (1, (), 1),
        (33, (), 1),
        (34, (), 2),
        (132, (), 4),
        (33, (2, 3), 5),
        (330, (2, 3), 10),
        (10**40, (), 10**40 // 33 + 1),
    ],
)
def test_chunks_of_a_request(num_frames, schedule, chunks):
    request = Request(num_frames=num_frames, prompt_schedule=tuple(ScheduledPrompt("a", each) for each in schedule))
    assert request.num_chunks == chunks


def test_a_single_seed_counts_upwards():
    batch = Request(prompt=("a", "b", "c"))
    assert batch.seeds == (42, 43, 44)
    assert dataclasses.replace(batch, seed=(5, 5, 9)).seeds == (5, 5, 9)
    assert Request(prompt_schedule=(ScheduledPrompt("a", 1), ScheduledPrompt("b", 1))).seeds == (42,)
