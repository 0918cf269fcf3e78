"""Unit: sizes, rates, faults and log lines, by an application of its own around real routes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import time
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse
from starlette.testclient import WebSocketDenialResponse, WebSocketDisconnect

from helios_cp.config.errors import RequestError
from helios_cp.config.request import Request as VideoRequest
from launchers.serve import answers, gate
from launchers.serve.access import Access
from launchers.serve.gate import LEAST_RATE, Gate, _Exchange
from launchers.serve.limits import MOST_CALLERS, Limits, Rates
from launchers.serve.logs import Log, json_lines
from launchers.serve.problems import PROBLEMS, Refusal
from launchers.serve.server import Server
from launchers.serve.web import WebServer, listen
from tests.launchers.conftest import PATIENCE
from tests.launchers.serve.conftest import WS, call_of, client_of

SECRET = "a-secret-that-is-in-no-log"


def routes(app):
    @app.post("/count")
    async def count(request: Request):
        return PlainTextResponse(str(len(await request.body())))

    @app.get("/refuse/{code}")
    @app.get("/v1/videos/refuse/{code}")
    async def refuse(code: str):
        raise Refusal(code, "two\nlines", param="seconds")

    @app.get("/request-error")
    async def request_error():
        raise RequestError("--num-frames 0: at least 1 is allowed")

    @app.get("/fault")
    @app.get("/v1/videos/fault/now")
    async def fault():
        raise KeyError(SECRET)

    @app.get("/half")
    async def half(n: int):
        return n

    @app.websocket("/fault")
    async def fault_in_a_socket(socket: WebSocket):
        await socket.accept()
        raise KeyError(SECRET)

    @app.websocket("/refuse/{code}")
    async def refuse_in_a_socket(socket: WebSocket, code: str):
        await socket.accept()
        raise Refusal(code, "x" * 500)


@pytest.fixture
def lines():
    """What is logged, as text."""
    stream = io.StringIO()
    with json_lines(stream):
        yield stream


@pytest.fixture
def client(tmp_path, lines):
    return client_of(Server(call_of(tmp_path, message_bytes=5000, requests=200), None), routes)


@pytest.mark.parametrize("code", PROBLEMS)
def test_each_code_has_its_status_in_both_shapes(client, code):
    plain = client.get(f"/refuse/{code}")
    assert plain.status_code == PROBLEMS[code].status
    assert plain.json() == {"code": code, "message": "two lines"}
    openai = client.get(f"/v1/videos/refuse/{code}")
    assert openai.status_code == PROBLEMS[code].status
    expected = {"message": "two lines", "type": PROBLEMS[code].type, "param": "seconds", "code": code}
    assert openai.json() == {"error": expected}
    assert ("retry-after" in plain.headers) == (plain.status_code in (429, 503))
    assert ("www-authenticate" in plain.headers) == (plain.status_code == 401)


@pytest.mark.parametrize("code", ["unauthorized", "too_large", "failed", "busy"])
def test_a_socket_is_closed_with_the_code_of_the_problem(client, code):
    with client.websocket_connect(WS + f"/refuse/{code}") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert closed.value.code == PROBLEMS[code].close
    assert len(closed.value.reason.encode()) <= 123


def test_flags_become_fields(client):
    found = client.get("/request-error")
    assert found.status_code == 400
    assert found.json() == {"code": "invalid_request", "message": "num_frames 0: at least 1 is allowed"}


def test_a_path_or_method_that_is_unknown(client):
    assert client.get("/nothing").json() == {"code": "not_found", "message": "Not Found"}
    wrong = client.delete("/count")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["code"]) == (405, "POST", "method_not_allowed")
    assert client.get("/half?n=x").status_code == 400


@pytest.mark.parametrize("path", ["/fault", "/v1/videos/fault/now"])
def test_a_fault_is_told_by_its_number_alone(client, lines, path):
    found = client.get(path)
    assert found.status_code == 500
    assert SECRET not in found.text
    assert "Traceback" not in found.text
    assert "KeyError" not in found.text
    fault = next(line for line in map(json.loads, lines.getvalue().splitlines()) if line["event"] == "server.fault")
    assert fault["id"] in found.text
    assert fault["error"] == "KeyError"
    assert any(" fault" in each for each in fault["at"])
    assert SECRET not in lines.getvalue()


def test_a_fault_closes_a_socket(client, lines):
    with client.websocket_connect(WS + "/fault") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert closed.value.code == 1011
    assert SECRET not in closed.value.reason
    assert "server.fault" in lines.getvalue()


def test_a_body_that_is_too_large(client):
    assert client.post("/count", content=b"x" * 5000).text == "5000"
    for content in (b"x" * 5001, (b"x" * 1000 for _ in range(6))):  # with its length, and in chunks without
        found = client.post("/count", content=content)
        assert found.status_code == 413
        assert found.json()["code"] == "too_large"


@pytest.mark.parametrize("length", ["Content-Length: 9", "Transfer-Encoding: chunked"])
def test_a_body_that_never_ends(tmp_path, lines, length):
    """By a real socket: the client sends a byte and no more, is told so, and holds its connection no longer."""
    app = FastAPI()
    routes(app), answers.install(app)
    outer = Gate(app, Access(), Rates(10), Log(), 5000, body_seconds=0.1)
    with listen("127.0.0.1", 0) as listener, WebServer(outer, listener, 5000):
        for sent in (b"", b"1\r\nx\r\n" if "chunked" in length else b"x"):
            with socket.create_connection(listener.getsockname(), PATIENCE) as client:
                client.sendall(f"POST /count HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode() + sent)
                answer = b"".join(iter(lambda: client.recv(65536), b""))
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head.lower()
            assert json.loads(body)["code"] == "too_slow"
    assert "server.fault" not in lines.getvalue()


def test_a_body_may_take_longer_the_larger_it_is():
    parts = [bytes(60 * LEAST_RATE), b"x"]

    async def receive():
        body = parts.pop(0)
        if not parts:
            await asyncio.sleep(0.01)  # of the minute that the first part has won
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def read() -> int:
        exchange = _Exchange({"type": "http", "headers": []}, receive, None, 2**30, body_seconds=0.0)
        return sum([len((await exchange.receive())["body"]) for _ in range(2)])

    assert asyncio.run(read()) == 60 * LEAST_RATE + 1


def test_requests_a_minute(tmp_path, key_file, monkeypatch):
    monkeypatch.setattr(
        gate, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: 0.0})
    )  # a busy machine takes its time
    client = client_of(Server(call_of(tmp_path, requests=3), None, Access.of(key_file)), routes)
    codes = [client.post("/count", headers={"Authorization": f"Bearer made-up-{n}"}).status_code for n in range(4)]
    assert codes == [200, 200, 200, 429]  # by address, whatever key is made up
    refused = client.get("/half?n=1")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
    assert client.get("/half?n=1", headers={"Authorization": "Bearer first-key-0123456789"}).status_code == 200
    assert client.get("/health").status_code == 200  # who watches the server is not counted
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(WS + "/fault"):
        pass
    assert denied.value.status_code == 429


def test_a_bucket_fills_again():
    rates = Rates(60)
    for _ in range(60):
        rates.take("a", 0.0)
    with pytest.raises(Refusal) as refused:
        rates.take("a", 0.0)
    assert refused.value.retry_after == 1.0
    rates.take("b", 0.0)
    rates.take("a", 1.0)
    with pytest.raises(Refusal):
        rates.take("a", 1.5)
    rates.take("a", 2.0)


def test_callers_without_number_take_no_memory_without_end():
    rates = Rates(60)
    for number in range(MOST_CALLERS + 100):
        rates.take(str(number), 0.0)
    assert len(rates._spent) == MOST_CALLERS


@pytest.mark.parametrize(
    ("changes", "word"), [({"width": 2048, "height": 2048}, "size"), ({"num_frames": 24 * 601}, "seconds")]
)
def test_videos_that_are_too_large(changes, word):
    with pytest.raises(Refusal, match=f"^{word} .*at most") as refused:
        Limits().check_request(VideoRequest(prompt=("a fox",), **changes))
    assert refused.value.problem.status == 400
    Limits().check_request(VideoRequest(prompt=("a fox",)))


def test_log_lines_are_json_without_what_users_wrote(lines):
    Log().event("video.created", prompt="a fox", video="video_1", nothing=None)
    Log(prompts=True).event("video.created", prompt="a hare")
    logging.getLogger("someone").warning("50%% of %s", "it")
    first, second, third = map(json.loads, lines.getvalue().splitlines())
    assert first["event"] == "video.created"
    assert (first["prompt_characters"], first["video"], first["level"]) == (5, "video_1", "info")
    assert "prompt" not in first and "nothing" not in first
    assert second["prompt"] == "a hare"
    assert (third["event"], third["level"], third["logger"]) == ("50% of it", "warning", "someone")


def test_what_follows_the_path_is_not_logged(client, lines):
    client.post(f"/count?token={SECRET}", headers={"Authorization": f"Bearer {SECRET}"})
    client.get(f"/nothing?token={SECRET}")
    written = [json.loads(line) for line in lines.getvalue().splitlines() if '"request"' in line]
    assert [(line["method"], line["path"], line["status"]) for line in written] == [
        ("POST", "/count", 200),
        ("GET", "/nothing", 404),
    ]
    assert SECRET not in lines.getvalue()
