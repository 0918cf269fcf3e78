"""Unit: keys, tokens, origins, headers, and the address that is listened on."""

from __future__ import annotations

import os
import secrets

import pytest
from fastapi import WebSocket
from starlette.testclient import WebSocketDenialResponse

from helios_cp.config.errors import RequestError
from launchers.serve import access
from launchers.serve.__main__ import main
from launchers.serve.access import Access, digest, matches, new_token
from launchers.serve.server import Server
from tests.launchers.serve.conftest import HERE, WS, call_of, client_of

SITE = "https://example.org"


def test_keys_of_a_file(key_file):
    found = Access.of(key_file)
    assert len(found.keys) == 2
    assert found.admits("first-key-0123456789")
    assert found.admits("second-key-0123456789")
    for wrong in (None, "", "first-key", "first-key-0123456789 ", "two", "#", "\ud800"):
        assert not found.admits(wrong)
    assert "first-key" not in repr(found)


def test_without_a_file_everybody_is_admitted():
    assert Access.of(None).admits(None)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_can_read_or_write_is_refused(key_file, mode):
    key_file.chmod(mode)
    with pytest.raises(RequestError, match=f"mode {mode:o}.*chmod 600"):
        Access.of(key_file)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640])
def test_a_file_of_its_owner_and_group_is_read(key_file, mode):
    key_file.chmod(mode)
    assert Access.of(key_file).needs_key


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no key"),
        (b"# only a comment\n\n", "no key"),
        ("schlüssel\n".encode(), "key 1 .*ASCII"),
        (b"good\nbad\x07\n", "key 2 .*ASCII"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_without_a_usable_key_is_refused(tmp_path, content, reason):
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(RequestError, match=reason) as error:
        Access.of(file)
    assert "\n" not in str(error.value)
    assert "good" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        Access.of(tmp_path / "none")


def test_tokens_are_long_different_and_kept_as_digests():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) >= 32 for token in tokens)
    token = tokens.pop()
    assert token not in digest(token)
    assert matches(token, digest(token))
    assert not matches(token[:-1], digest(token))
    assert not matches(None, digest(token))


def test_comparison_takes_the_same_time_whatever_is_wrong(monkeypatch):
    """All keys are compared, each by `secrets.compare_digest`."""
    compared = []
    real = secrets.compare_digest
    monkeypatch.setattr(access.secrets, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    found = Access(keys=(digest("a"), digest("b"), digest("c")))
    assert found.admits("a")
    assert compared == list(found.keys)


@pytest.mark.parametrize(
    "origin", ["example.org", "https://example.org/page", "ftp://example.org", "*", "https://", "null"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(RequestError, match="--allow-origin"):
        Access.of(None, (origin,))


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("example.org", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_without_keys_only_names_of_this_machine_are_answered(tmp_path, host, code):
    """A stranger's name that is made to point to 127.0.0.1 would make its pages those of the same host."""
    client = client_of(Server(call_of(tmp_path), None, Access(origins=(SITE,))))
    assert client.get("/health", headers={"host": host}).status_code == code


def test_with_keys_a_proxy_may_be_of_any_name(tmp_path, key_file):
    client = client_of(Server(call_of(tmp_path), None, Access.of(key_file)))
    assert client.get("/health", headers={"host": "live.example"}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        (None, True),
        (HERE, True),
        (SITE, True),
        ("https://evil.example", False),
        ("null", False),
        ("http://127.0.0.1:9000", False),
        ("http://127.0.0.1", False),
        ("file://", False),
        ("http://[", False),
        (f"{HERE}.evil.example", False),
    ],
)
def test_pages_of_other_sites_steer_nothing(tmp_path, origin, is_allowed):
    def routes(app):
        @app.websocket("/talk")
        async def talk(socket: WebSocket):
            await socket.accept()
            await socket.send_text("hello")
            await socket.close()

        @app.post("/do")
        async def do():
            return {}

    client = client_of(Server(call_of(tmp_path), None, Access(origins=(SITE,))), routes)
    headers = {} if origin is None else {"origin": origin}
    assert client.post("/do", headers=headers).status_code == (200 if is_allowed else 403)
    if is_allowed:
        with client.websocket_connect(WS + "/talk", headers=headers) as socket:
            assert socket.receive_text() == "hello"
        return
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(WS + "/talk", headers=headers):
        pass
    assert denied.value.status_code == 403
    assert denied.value.json()["code"] == "forbidden"


@pytest.mark.parametrize("path", ["/health", "/ready", "/nothing", "/v1/videos/none"])
def test_every_answer_has_the_headers(tmp_path, path):
    answer = client_of(Server(call_of(tmp_path), None)).get(path, headers={"origin": "https://evil.example"})
    for name, value in access.HEADERS.items():
        assert answer.headers[name] == value
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_other_machines_are_served_with_a_key_only(tmp_path, capsys, host):
    with pytest.raises(SystemExit) as end:
        main(["--host", host, "--data", str(tmp_path / "data")])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--api-key-file" in error
    assert os.listdir(tmp_path) == []
