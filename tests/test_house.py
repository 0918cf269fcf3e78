"""Unit: imports go one way. Every import counts: at the top, in a function, for types only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.order import LONGEST_FIRST, ONE_SERVER, TESTS

ROOT = Path(__file__).parents[1]

TOPS = ["parallel", "helios_cp", "launchers", "benchmarks", "tests"]
"""A folder imports those before it, and itself."""

FLOORS = {
    "helios_cp": [
        {"config"},
        {"device", "files"},
        {"model"},
        {"weights", "runtime", "sampling"},
        {"pipeline", "plan", "tiny"},
        {"generate"},
    ],
    "launchers": [
        {"messages", "schedule"},
        {"workers", "cluster"},
        {"driver"},
        {"generate", "status"},
        {"demo", "serve"},
    ],
    "benchmarks": [
        {"measuring"},
        {"models", "ranks"},
        {
            "attention",
            "calibrate",
            "communication",
            "decode",
            "deviation",
            "forward",
            "fps",
            "guard",
            "live",
            "pipeline",
            "quality",
            "report",
            "scaling",
        },
        {"gpu_suite", "validate_plan"},
    ],
}
"""Packages from the lowest floor to the highest. A package imports from lower floors only."""

SHOWN = 5
"""Most names that a package shows on its front."""


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the product, the benchmarks and the tests."""
    found = {}
    for top in ("parallel", "helios_cp", "launchers", "benchmarks", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports anywhere in it; `from package import name` counts as `package.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in known)


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    """What each module imports."""
    known = modules()
    return {name: set(imported(path, known)) for name, path in known.items()}


def test_folders_import_one_way(edges):
    wrong = [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if TOPS.index(other.split(".")[0]) > TOPS.index(name.split(".")[0])
    ]
    assert not wrong


def test_packages_import_from_lower_floors_only(edges):
    wrong = set()
    for name, others in edges.items():
        for other in others:
            above, below = floor_of(name), floor_of(other)
            if name.split(".")[0] != other.split(".")[0] or not above or not below:
                continue
            if package_of(name) != package_of(other) and above <= below:
                wrong.add(f"{package_of(name)} -> {package_of(other)}")
    assert not wrong


def test_files_import_each_other_in_no_circle(edges):
    product = {name: others for name, others in edges.items() if not name.startswith("tests")}
    try:
        TopologicalSorter(product).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_is_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


@pytest.mark.parametrize("text", ["import b", "if TYPE_CHECKING:\n    from b import x", "def f():\n    import b"])
def test_every_import_is_seen(text, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(text)
    assert list(imported(file, {"b": file})) == ["b"]


@pytest.mark.parametrize("top", FLOORS)
def test_every_package_has_a_floor(top):
    placed = [package for floor in FLOORS[top] for package in floor]
    found = {path.stem for path in (ROOT / top).glob("[!_]*.py")} | {path.parent.name for path in packages(top)}
    assert sorted(placed) == sorted(found)


@pytest.mark.parametrize("top", ["helios_cp", "launchers", "benchmarks"])
def test_every_package_says_what_is_inside(top):
    for path in packages(top):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path}: a docstring says what is inside"
        shown = [name.id for node in tree.body if isinstance(node, ast.Assign) for name in node.targets]
        if "__all__" in shown:
            names = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
            assert len(names) <= SHOWN, f"{path}: at most {SHOWN} names are shown"


def packages(top: str) -> list[Path]:
    return sorted((ROOT / top).glob("*/__init__.py"))


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def floor_of(module: str) -> int | None:
    """From 1 up; `None` for a module that is in no package."""
    top, _, rest = module.partition(".")
    package = rest.split(".")[0]
    return next((i for i, floor in enumerate(FLOORS.get(top, []), 1) if package in floor), None)


@pytest.mark.parametrize("file", ["parallel/__init__.py", "parallel.py"])
def test_a_folder_named_parallel_where_a_user_calls_is_left_alone(tmp_path, file):
    """Python looks there first."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise ImportError('a file of the user')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import helios_cp, parallel.degrees; print(parallel.degrees.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(ROOT / "parallel" / "degrees.py"), done.stderr


def test_tests_in_an_order_of_their_own_are_there():
    assert [name for name in (*LONGEST_FIRST, *ONE_SERVER) if not (TESTS / name).is_file()] == []
