"""A small stand-in for the Hugging Face Hub on localhost: the few endpoints that downloads and uploads use.

``GET /api/models/ORG/MODEL[/revision/REV]`` lists the files, ``HEAD`` and ``GET /ORG/MODEL/resolve/REV/FILE`` give one;
weights are redirected to another path, as the Hub redirects to its storage. ``Range`` is understood.

An upload asks ``/api/whoami-v2``, creates with ``/api/repos/create``, compares by ``paths-info``, has the front matter
of a card checked, asks ``preupload`` how a file goes, sends large ones by git LFS (``info/lfs/objects/batch``, then
``PUT``), and all of it in one ``commit``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, ``org/model``, and how it behaves.

    ``status`` other than 200 answers every request so, with ``error_code``; the body of a file in ``cut`` is broken off
    in the middle, once; a file in ``removed`` is listed but cannot be had; ``sizes`` are listed in place of true ones.
    A repository that does not ``exist`` can be created, which sets ``is_private``; ``commits`` are the names of files
    by commit; with ``moves`` the repository changes before every commit; ``may_write``: whether tokens may write.
    """

    files: Mapping[str, bytes]
    exists: bool = True
    is_private: bool | None = None
    moves: bool = False
    may_write: bool = True
    commits: list[list[str]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    error_code: str = ""
    cut: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            repository = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What ``HF_ENDPOINT`` has to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fetched(self) -> list[str]:
        """Return the files whose content was asked for, in order and as often as they were."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/api/" not in path
                and not (path.endswith(_STORED) and "/resolve/" in path)]  # fmt: skip


_STORED = (".safetensors", ".bin", ".gguf")  # files that are redirected to the storage


def _path_info(name: str, content: bytes) -> dict[str, Any]:
    """Return what ``paths-info`` says of a file."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
    found = {"type": "file", "path": name, "size": len(content), "oid": blob}
    return found | large if name.endswith(_STORED) else found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repository: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.repository, self._noted()
        if not hub.may_write:
            self._send(403, {})
        elif path == "/api/repos/create":
            asked = json.loads(body)  # the key depends on the version of the library
            hub.exists, hub.is_private = True, asked.get("visibility") == "private" or asked.get("private", False)
            self._json({"url": f"{hub.url}/org/model", "name": "org/model", "id": "1"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/models/org/model/paths-info/main":
            names = urllib.parse.parse_qs(body.decode())["paths"]
            self._json([_path_info(name, hub.files[name]) for name in names if name in hub.files])
        elif path == "/api/models/org/model/preupload/main":
            listed = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(_STORED) else "regular" for file in listed}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif path == "/org/model.git/info/lfs/objects/batch":
            objects = [{**o, "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                       for o in json.loads(body)["objects"]]  # fmt: skip
            self._json({"transfer": "basic", "objects": objects})
        elif path == "/api/models/org/model/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        oid = self._noted().rsplit("/", 1)[1]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.repository.stored[oid] = content
        self._send(200 if hashlib.sha256(content).hexdigest() == oid else 422, {})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub, (header, *operations) = self.repository, lines
        if hub.moves or header["value"]["parentCommit"] != COMMIT:
            self._send(412, {})
            return
        added = {}
        for operation in operations:
            value = operation["value"]
            is_large = operation["key"] == "lfsFile"
            added[value["path"]] = hub.stored[value["oid"]] if is_large else base64.b64decode(value["content"])
        hub.files = {**hub.files, **added}
        hub.commits.append(list(added))
        self._json({"commitUrl": f"{hub.url}/org/model/commit/{COMMIT}", "commitOid": COMMIT})

    def _noted(self) -> str:
        path = self.path.split("?")[0]
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.repository.requests.append((self.command, path, headers))
        return path

    def _json(self, data: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def _answer(self) -> None:
        hub, path = self.repository, self._noted()
        if hub.status != 200:
            self._send(hub.status, {"X-Error-Code": hub.error_code})
        elif path == "/api/whoami-v2":
            self._json({"name": "user", "type": "user"})
        elif not hub.exists:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(r"/api/models/org/model(/revision/(main|v1))?", path):
            sizes = {**{name: len(content) for name, content in hub.files.items()}, **hub.sizes}
            files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            content = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": files}).encode()
            self._send(200, {"Content-Type": "application/json"}, content)
        elif path.startswith("/api/models/org/model/revision/"):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif match := re.fullmatch(r"/(org/model/resolve/(main|v1)|storage)/(.+)", path):
            self._send_file(match[3], is_stored=match[1] == "storage")
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, name: str, is_stored: bool) -> None:
        hub = self.repository
        if name not in hub.files or name in hub.removed:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
            return
        content = hub.files[name]
        etag = hashlib.sha256(content).hexdigest()
        if name.endswith(_STORED) and not is_stored:
            about = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            self._send(302, {**about, "Location": f"{hub.url}/storage/{name}"})
            return
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            self._send(200, about, content, cut=name in hub.cut)
        else:
            first = int(start[1])
            about["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, about, content[first:], cut=name in hub.cut)
        if self.command == "GET":
            hub.cut.discard(name)

    def _send(self, status: int, headers: Mapping[str, str], content: bytes = b"", cut: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut
