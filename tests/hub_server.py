"""A hub on this machine that speaks the protocol of the Hugging Face hub, and fails as that does.

`HubServer` serves folders as models: what a revision is and holds (`/api/models`), a file's size, hash and commit (HEAD
on `/resolve`), small files from there, and large ones by a redirect to a store of another name (`/store`), with ranges.
The tests run programs against it that are told of it by `HF_ENDPOINT` alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 20_000
"""Bytes from which a file lies in the store."""


@functools.cache
def sha256(content: bytes) -> str:
    """Kept, as every request needs those of many files."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Fault:
    """What happens to requests whose method and path match `where`, the first `times` of them.

    With `status` they are answered by it. Else `after` bytes of the body are sent, `stall` is waited for, and the
    connection is closed, or with `reset` torn down.
    """

    where: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    reset: bool = False
    stall: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass
class Model:
    """Commits by name, each with its files, and where the branches and tags point."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    is_gated: bool = False
    is_private: bool = False


class HubServer(ThreadingHTTPServer):
    """A context manager. `requests` are the lines "METHOD path [range]" in the order in which they came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}/store"
        self.models: dict[str, Model] = {}
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Commit what `folder` holds to a model and let `revision` point there. Returns the commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        commit = hashlib.sha1(repr([(path, sha256(files[path])) for path in sorted(files)]).encode()).hexdigest()
        model = self.models.setdefault(name, Model({}, {}))
        model.commits[commit] = files
        model.revisions[revision] = commit
        return commit

    def downloads(self, end: str = "") -> list[str]:
        """Names of the files whose content was asked for, of those that end in `end`."""
        found = [re.match(r"GET /(?:store/\w+/|[^/]+/[^/]+/resolve/\w+/)(\S+)", line) for line in self.requests]
        return [match[1] for match in found if match and match[1].endswith(end)]

    def fault_of(self, line: str) -> Fault | None:
        with self.lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def respond(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server.fault_of(" ".join(filter(None, (self.command, path, self.headers.get("Range")))))
        if fault is not None and fault.status is not None:
            status, headers, body = fault.status, fault.headers, b'{"error": "a fault"}'
        else:
            status, headers, body = self.answer(path)
            fault = fault if with_body else None
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body if fault is None or fault.status else body[: fault.after])
        if fault is not None and fault.status is None:
            self.wfile.flush()
            fault.reached.set()
            if fault.stall is not None:
                fault.stall.wait()
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if match := re.fullmatch(r"/store/(\w+)/.+", path):
            assert "Authorization" not in self.headers, "a token left the hub"
            return self.part_of(self.content(match[1]))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self.describe(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        return _error(404, "EntryNotFound", "no such page")

    def describe(self, name: str, what: str | None, revision: str | None):
        model, commit, refused = self.find(name, revision or "main", is_api=True)
        if refused:
            return refused
        files = model.commits[commit]
        if what == "tree":
            entries = [_entry(path, content) for path, content in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        gated = "auto" if model.is_gated else False
        siblings = [{"rfilename": path} for path in files]
        answer = {"id": name, "modelId": name, "sha": commit, "gated": gated, "private": model.is_private}
        answer |= {"_id": "1", "disabled": False, "tags": [], "downloads": 1, "likes": 1, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def file(self, name: str, revision: str, path: str):
        model, commit, refused = self.find(name, revision)
        if refused:
            return refused
        content = model.commits[commit].get(path)
        if content is None:
            status, headers, body = _error(404, "EntryNotFound", "Entry not found")
            return status, {**headers, "X-Repo-Commit": commit}, body
        headers = {"X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if len(content) < LARGE:
            return 200, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        digest = sha256(content)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"', "ETag": f'"{digest}"'}
        return 302, {**headers, "Location": f"{self.server.store}/{digest}/{path}?signature=secret"}, b""

    def find(self, name: str, revision: str, is_api: bool = False):
        """A model, the commit that is meant, and in its place an answer that refuses it."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        model = self.server.models.get(name)
        if token and token not in self.server.tokens:
            return None, "", _error(401, None, "Invalid credentials in Authorization header")
        if model is None or (model.is_private and not token):
            return None, "", _error(404 if token else 401, "RepoNotFound", "Repository not found")
        if model.is_gated and not is_api and not token:
            return None, "", _error(401, "GatedRepo", f"Access to model {name} is restricted. Please log in.")
        if model.is_gated and not is_api and token != "hf_accepted":
            return None, "", _error(403, "GatedRepo", f"Access to model {name} is restricted: you are not in the list.")
        commit = model.revisions.get(revision, revision)
        if commit not in model.commits:
            return None, "", _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return model, commit, None

    def content(self, digest: str) -> bytes:
        commits = [files for model in self.server.models.values() for files in model.commits.values()]
        contents = (content for files in commits for content in files.values())
        return next(content for content in contents if sha256(content) == digest)

    def part_of(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        assert parse_qs(urlsplit(self.path).query) == {"signature": ["secret"]}
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        name = urlsplit(self.path).path.rsplit("/", 1)[1]
        headers = {"Accept-Ranges": "bytes", "Content-Disposition": f'inline; filename="{name}";'}
        if match is None:
            return 200, headers, content
        start = int(match[1])
        return 206, {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _error(status: int, code: str | None, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers | ({"X-Error-Code": code} if code else {}), json.dumps({"error": message}).encode()
