"""Unit: the page's files as they are served. What they do in a browser is in tests/browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from launchers.serve.page import routes

FOLDER = Path(routes.__file__).parent
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in routes.TYPES)


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(routes.router())
    return TestClient(app)


def test_the_page_is_at_the_root(client):
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_files_are_sent_as_they_lie(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == routes.TYPES[Path(name).suffix]
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("sent", ["{}", "W/{}", '"another", {}'])
def test_an_unchanged_file_is_not_sent_again(client, sent):
    etag = client.get("/page/page.js").headers["etag"]
    answer = client.get("/page/page.js", headers={"if-none-match": sent.format(etag)})
    assert answer.status_code == 304 and not answer.content and answer.headers["etag"] == etag
    assert client.get("/page/page.js", headers={"if-none-match": '"another"'}).status_code == 200


@pytest.mark.parametrize("name", ["routes.py", "__init__.py", "missing.js", "..%2Froutes.py", "%2e%2e/server.py"])
def test_nothing_but_the_page_is_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_the_page_asks_for_files_that_are_there():
    """Relative addresses alone, so that a proxy may put the server under any prefix, and none of other servers."""
    for name in FILES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        for found in re.findall(r'(?:href|src)="([^"#][^"]*)"', text):
            assert found.startswith("page/") and found.removeprefix("page/") in FILES, f"{name}: {found}"
        for found in re.findall(r'^(?:import|export) .*from "([^"]+)"', text, re.MULTILINE):
            assert found.startswith("./") and found.removeprefix("./") in FILES, f"{name}: {found}"
        assert "//" not in re.sub(r"(?m)//.*$|http://www.w3.org/2000/svg", "", text), name


def test_no_script_or_style_is_inline():
    """The policy of the server forbids it."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


def schemes() -> dict[str, dict[str, str]]:
    """The colours of each scheme, by name."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", text)) for text in (light, dark)]
    return {"light": found[0], "dark": {**found[0], **found[1]}}


def contrast(one: str, other: str) -> float:
    """Of two colours, from 1 to 21; https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_have_contrast(scheme):
    """What WCAG asks of level AA: 4.5 for text, 3 for the edges of controls."""
    colours = schemes()[scheme]
    for text in ("ink", "quiet", "accent", "bad"):
        for ground in ("ground", "surface"):
            assert contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["bad"], colours["bad-soft"]) >= 4.5
    assert contrast(colours["edge"], colours["surface"]) >= 3


def test_contrast_is_that_of_the_standard():
    assert contrast("#fff", "#000000") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )
