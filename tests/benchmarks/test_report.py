"""Unit: the report and its pictures, from results made up here; nothing is timed and no figures are compared.

What must hold: measured, counted and modelled figures are named so wherever they stand, and a file that cannot be read
is told and costs the report nothing else.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks.measuring.machine import CHECKOUT, RESULTS, describe
from benchmarks.report import __main__ as report
from benchmarks.report import plots
from benchmarks.report.data import STAGES, read_chunks, read_projected, read_results
from benchmarks.report.modelled import calibrated_lines, predict_lines
from benchmarks.report.sections import SECTIONS, any_section, table
from helios_cp.plan.__main__ import main as plan
from helios_cp.plan.hardware import H100, MEASUREMENTS

STAGE_SECONDS = dict(zip(STAGES, (1.5, 0.4, 0.05, 0.05), strict=True))


@pytest.fixture(scope="module")
def lines():
    return predict_lines(("h100",), ((1, 1, 1), (2, 2, 2)), (1, 2))


@pytest.fixture(autouse=True)
def few_lines(lines, monkeypatch):
    monkeypatch.setattr(report, "predict_lines", lambda: lines)


def write(folder, name, results, gpus=()):
    about = describe()
    about["machine"]["gpus"] = list(gpus)
    (folder / f"{name}.json").write_text(json.dumps({**about, "results": results}))


def fps_results(model="14b", ranks=1, fps=20.0, size=(384, 640)):
    program = {
        "fps": fps,
        "fps_quartiles": [fps - 1, fps + 1],
        "chunk_seconds": {"median": 33 / fps, "quartiles": [1.6, 1.7], "seconds": [1.6, 1.65, 1.7]},
        "stage_seconds": {**STAGE_SECONDS, "stage 1": 0.2},
    }
    programs = {"ours": program, "diffusers": {"first_chunk": None, "error": "out of memory"}}
    setting = {"steps": [1, 1, 1], "size": list(size), "limit": {"fps": 38.0}, "programs": programs}
    return {"model": model, "ranks": ranks, "settings": {"distilled-111": setting}}


def make(folder):
    """The report's exit code and page."""
    return report.main(["--results", str(folder)]), (folder / report.PAGE).read_text()


def drawn(draw, *arguments, monkeypatch, path):
    """The figure that a function draws."""
    figures = []
    save = Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
        draw(*arguments, path)
    assert imread(path).std() > 0.05, "a blank picture"
    return figures[0]


def test_without_results_all_is_modelled_and_says_so(tmp_path, capsys):
    code, page = make(tmp_path)
    assert code == 0 and {path.name for path in tmp_path.iterdir()} == {
        *("REPORT.md", "fps.png", "stages.png", "bytes.png")
    }
    rows = [row for row in page.splitlines() if row.startswith("| H100")]
    assert len(rows) == 4 and all("| modelled |" in row for row in rows)
    assert "No FPS of a GPU has been measured yet" in page and "measured**" not in page
    assert "`python -m benchmarks.attention`" in page.split("Not made yet")[1]


def test_modelled_figures_are_those_of_the_planner(lines, capsys):
    plan(["--gpus", "2", "--pyramid-steps", "2", "2", "2", "--json"])
    best = json.loads(capsys.readouterr().out)["plans"][0]["modelled_fps"]
    (line,) = (line for line in lines if line.steps == (2, 2, 2))
    assert line.points[2].fps == pytest.approx(best) and H100.name == line.hardware


def test_a_measured_gpu_is_beside_the_models(tmp_path, lines, monkeypatch):
    write(tmp_path, "fps", fps_results(), gpus=["NVIDIA H100 80GB HBM3"])
    write(tmp_path, "fps_2", fps_results(ranks=2, fps=37.5), gpus=["NVIDIA H100 80GB HBM3"])
    code, page = make(tmp_path)
    assert code == 0 and "| NVIDIA H100 80GB HBM3, [1, 1, 1], ours | **measured** | 2 | 37.50 |  |" in page
    assert "No FPS of a GPU" not in page and "out of memory" not in page
    chunks = read_chunks(read_results(tmp_path)[0])
    figure = drawn(plots.draw_fps, lines, chunks, monkeypatch=monkeypatch, path=tmp_path / "fps.png")
    (axes,) = figure.axes
    labels = {line.get_label(): list(line.get_xdata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert labels.pop("measured, NVIDIA H100 80GB HBM3, distilled-111, ours") == [1, 2]
    assert labels and all(label.startswith("modelled, ") for label in labels)
    assert any(list(line.get_ydata()) == [19.5, 19.5] for line in axes.lines)
    assert any("19.5 FPS: published" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize(
    ("results", "gpus"), [(fps_results("small", size=(128, 192)), ()), (fps_results("small"), ["NVIDIA H100"])]
)
def test_other_models_are_not_among_the_gpus(tmp_path, results, gpus):
    write(tmp_path, "fps", results, gpus)
    code, page = make(tmp_path)
    assert code == 0 and "**measured**" not in page and "No FPS of a GPU has been measured yet" in page
    row = next(row for row in page.splitlines() if row.startswith("| ours, distilled-111, small"))
    assert "| 20 (19–21) | 38 | 1.500 | 0.400 |" in row


def test_stages_are_drawn_in_two_panels(tmp_path, lines, monkeypatch):
    write(tmp_path, "fps", fps_results())
    chunks = read_chunks(read_results(tmp_path)[0])
    figure = drawn(plots.draw_stages, lines, chunks, monkeypatch=monkeypatch, path=tmp_path / "s.png")
    above, below = figure.axes
    assert "measured" in above.get_xlabel() and "modelled" in below.get_xlabel()
    assert [bar.get_width() for bar in above.patches] == pytest.approx([0.75, 0.2, 0.025, 0.025])
    total = sum(bar.get_width() for bar in below.patches)
    assert total == pytest.approx(sum(sum(p.seconds.values()) for line in lines for p in line.points.values()))


def test_one_rank_s_share_is_a_projection(tmp_path, lines, monkeypatch):
    fps = {ranks: {"[1, 1, 1]": 20.0 * ranks} for ranks in (1, 2)}
    shares = {str(ranks): {"fps_without_messages": each} for ranks, each in fps.items()}
    write(tmp_path, "gpu_share", {"status": "finished", "shares": shares}, gpus=["NVIDIA H200"])
    projected = read_projected(read_results(tmp_path)[0])
    assert projected == {"[1, 1, 1]": {1: 20.0, 2: 40.0}}
    code, page = make(tmp_path)
    assert code == 0 and "| [1, 1, 1], messages left out | from one rank's measured share | 2 | 40.0 |  |" in page
    write(tmp_path, "gpu_share", {"shares": shares})  # a dry run on a CPU
    assert read_projected(read_results(tmp_path)[0]) == {}


def test_bytes_that_were_counted_lie_on_the_formula(tmp_path, monkeypatch):
    result = read_results(RESULTS)[0]["communication"]
    figure = drawn(plots.draw_bytes, result, monkeypatch=monkeypatch, path=tmp_path / "b.png")
    curves = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines}
    assert len(curves) == 8
    for name in ("diffusers", "ring", "unified, ring 2", "Ulysses"):
        formula, counted = curves[f"{name}, by formula"], curves[f"{name}, counted in runs of gloo ranks"]
        assert counted == pytest.approx({ranks: formula[ranks] for ranks in counted}) and len(counted) >= 2
    empty = drawn(plots.draw_bytes, None, monkeypatch=monkeypatch, path=tmp_path / "b.png")
    assert len(empty.axes[0].lines) == 4


def test_files_that_cannot_be_read_are_told(tmp_path, capsys):
    (tmp_path / "half.json").write_text('{"machine": ')
    (tmp_path / "other.json").write_text("[1, 2]")
    write(tmp_path, "forward", {"counts": {"ours": {}}})
    write(tmp_path, "something", {"speed": 1.23456, "deep": {"er": {"x": True}}, "list": [1, 2], "text": "a | b"})
    code, page = make(tmp_path)
    assert code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "half.json is no result of a benchmark" in errors[0]
    assert "forward.json is of another shape (KeyError: 'diffusers')" in errors[2]
    assert all(error.removeprefix("benchmarks.report: ") in page for error in errors)
    assert "| speed | 1.235 |" in page and "| deep, er, x | True |" in page and "| text | a / b |" in page


def test_committed_results_are_read(tmp_path):
    """Every file in benchmarks/results has its section, and every table as many cells in each row."""
    results, problems = read_results(RESULTS)
    assert not problems and {"forward", "communication", "scaling"} <= set(results)
    for name, result in results.items():
        section = SECTIONS[name][1](result) if name in SECTIONS else any_section(result)
        for block in section.split("\n\n"):
            rows = [row for row in block.splitlines() if row.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1, name
        assert "|" in section


def test_a_calibrated_profile_has_its_sources(tmp_path):
    profile = {**H100.to_json(), "name": "this machine", MEASUREMENTS: {**describe(), "rates": [1, 2]}}
    (tmp_path / "calibration.json").write_text(json.dumps(profile))
    code, page = make(tmp_path)
    assert code == 0 and "| vae_flops | modelled of diffusers' decoder: 69.3 TFLOP of a chunk in 0.73 s" in page
    assert "| this machine | how it is known |" in page and "| calibration.json |" in page


def test_a_calibrated_card_has_lines_of_its_own(tmp_path, lines, monkeypatch):
    """Twice as fast as an H100, with its name; one of a CPU, as a dry run writes it, has none."""
    fast = replace(H100, name="calibrated NVIDIA H999", vae_flops=2 * H100.vae_flops, gpus_per_node=1)
    for gpus in ([], ["NVIDIA H999"]):
        about = describe()
        about["machine"]["gpus"] = gpus
        (tmp_path / "gpu_profile.json").write_text(json.dumps({**fast.to_json(), MEASUREMENTS: about}))
        found = calibrated_lines(tmp_path, gpus=(1, 2))
        assert len(found) == (2 if gpus else 0)
    assert found[0].points[1].fps > lines[0].points[1].fps
    monkeypatch.setattr(report, "calibrated_lines", lambda _: found)
    code, page = make(tmp_path)
    assert code == 0 and "| calibrated NVIDIA H999, [1, 1, 1] | modelled | 2 |" in page
    monkeypatch.undo()
    (tmp_path / "gpu_profile.json").write_text(json.dumps({"name": 1, MEASUREMENTS: about, "sources": {}}))
    monkeypatch.setattr(report, "predict_lines", lambda: lines)
    code, page = make(tmp_path)
    assert code == 1 and "gpu_profile.json: " in page


def test_predictions_stand_beside_measurements(tmp_path):
    layout = {"degrees": {"cfg": 1, "ring": 1, "ulysses": 2, "ffn_tp": 2}, "attention": "native", "shard_weights": True}
    each = {"case": "Base", "layout": layout, "modelled_seconds": 1.1, "measured_seconds": 1.0, "error": 0.1}
    write(tmp_path, "validate_plan", {"comparisons": [each], "median_error": 0.1, "goal": 0.15, "met": True})
    code, page = make(tmp_path)
    assert code == 0 and "| model and layout | modelled s | measured s | error |" in page
    assert "| Base, ulysses 2, ffn-tp 2, shard-weights | 1.100 | 1.000 | +10.0% |" in page
    assert "Median error 10.0% (goal: at most 15%, met) over 1 layouts" in page


def test_a_table():
    assert table(("a", "b", "c"), [("x", "y", "1")], texts=2) == "| a | b | c |\n| --- | --- | ---: |\n| x | y | 1 |"


def bench_commands():
    """Module and arguments of each line of `make bench` that runs a benchmark."""
    recipe = (CHECKOUT / "Makefile").read_text().split("\nbench:")[1].split("\n\n")[0]
    lines = [line.split("-m ")[1].replace("$(BENCH)", "outputs/bench").split() for line in recipe.splitlines()[2:]]
    return [(module, arguments) for module, *arguments in lines]


@pytest.mark.parametrize(("module", "arguments"), bench_commands(), ids=lambda each: each if "." in each else "")
def test_make_bench_gives_flags_that_exist(module, arguments):
    imported = importlib.import_module(f"{module}.__main__")
    assert callable(imported.main) and "outputs/bench" in " ".join(arguments)
    if hasattr(imported, "build_parser"):
        imported.build_parser().parse_args(arguments)


def test_make_bench_runs_them_all():
    modules = [module.removeprefix("benchmarks.") for module, _ in bench_commands()]
    assert modules[-1] == "report" and set(modules) == {*report.COMMANDS, "calibrate", "report"} - {
        "calibration",
        "gpu",
    }


def test_bad_arguments_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--results", str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert "there is no such folder" in error and error.count("\n") == 1
