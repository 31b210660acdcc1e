"""A model hub on 127.0.0.1, its files in memory: the part of the Hub's HTTP API that pushing and loading take.

python -m tests.loopback_hub 8000
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_LoopbackTokenOfNobody0123456789"
OWNER = "someone"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


class LoopbackHub(ThreadingHTTPServer):
    """Repositories of `OWNER`, writable with `TOKEN`, readable by all; every revision is the newest.

    Args:
        drops: for how many uploads into a repository the connection is reset before they are answered.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, drops: Mapping[str, int] | None = None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.drops = Counter(drops or {})
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def loopback_hub(drops: Mapping[str, int] | None = None) -> Iterator[LoopbackHub]:
    """A hub that is up within the context."""
    with LoopbackHub(drops) as hub:
        Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LoopbackHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for method, pattern, public, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command.replace("HEAD", "GET"):
                if not public and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._body()
                    self._reply(401, {"error": "Invalid username or password."})
                    return
                answer(self, **found.groupdict())
                return
        self._reply(404, {"error": f"no such route: {self.command} {path}"})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self) -> Any:
        return json.loads(self._body())

    def _reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, what: str) -> None:
        self._reply(404, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound"})

    # ---- writing

    def create(self) -> None:
        name = self._json()["name"]
        repo = f"{OWNER}/{name.rpartition('/')[2]}"
        with self.server.lock:
            known = repo in self.server.files
            self.server.files.setdefault(repo, {})
            self.server.commits.setdefault(repo, ["0" * 40])
        self._reply(409 if known else 200, {"url": f"{self.server.url}/{repo}"})

    def validate_card(self) -> None:
        """Metadata have to be a mapping; base models and data sets are named as the Hub names them."""
        content = self._json()["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        names = [metadata.get("base_model") or [], metadata.get("datasets") or []]
        listed = [name for each in names for name in ([each] if isinstance(each, str) else each)]
        bad = [name for name in listed if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
        self._reply(400 if bad else 200, {"errors": [{"message": f"bad name {name}"} for name in bad], "warnings": []})

    def preupload(self, repo: str) -> None:
        files = self.server.files[repo]
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], files[file["path"]]) if file["path"] in files else None,
            }
            for file in self._json()["files"]
        ]
        self._reply(200, {"files": answers})

    def batch(self, repo: str) -> None:
        def action(each: dict[str, Any]) -> dict[str, Any]:
            if each["oid"] in self.server.objects:
                return each
            return {**each, "actions": {"upload": {"href": f"{self.server.url}/upload/{repo}/{each['oid']}"}}}

        self._reply(200, {"transfer": "basic", "objects": [action(each) for each in self._json()["objects"]]})

    def upload(self, repo: str, oid: str) -> None:
        with self.server.lock:
            drop = self.server.drops[repo] > 0
            self.server.drops[repo] -= drop
            self.server.uploads[repo] += not drop
        if drop:
            self._body()
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            os.close(self.connection.detach())
            return
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self._reply(200, {})

    def commit(self, repo: str) -> None:
        header, *operations = (json.loads(line) for line in self._body().splitlines())
        contents = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del self.server.files[repo][value["path"]]
                continue
            large = operation["key"] == "lfsFile"
            contents[value["path"]] = (
                self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
            )
        with self.server.lock:
            self.server.files[repo] |= contents
            self.server.commits[repo].append(header["value"]["summary"])
        self._reply(
            200, {"commitUrl": f"{self.server.url}/{repo}/commit/{self._sha(repo)}", "commitOid": self._sha(repo)}
        )

    # ---- reading

    def _sha(self, repo: str) -> str:
        return hashlib.sha1("\n".join(self.server.commits[repo]).encode()).hexdigest()

    def whoami(self) -> None:
        self._reply(200, {"name": OWNER, "type": "user", "orgs": []})

    def info(self, repo: str) -> None:
        if repo not in self.server.files:
            self._missing("Repo")
            return
        siblings = [{"rfilename": path} for path in self.server.files[repo]]
        self._reply(200, {"id": repo, "sha": self._sha(repo), "tags": [], "private": False, "siblings": siblings})

    def tree(self, repo: str, folder: str | None) -> None:
        files = self.server.files.get(repo, {})
        start = f"{folder}/" if folder else ""
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
            for path, content in files.items()
            if path.startswith(start)
        ]
        if entries or (repo in self.server.files and not folder):
            self._reply(200, entries)
        else:
            self._missing("Entry" if repo in self.server.files else "Repo")

    def resolve(self, repo: str, path: str) -> None:
        files = self.server.files.get(repo)
        if files is None or path not in files:
            self._missing("Repo" if files is None else "Entry")
            return
        headers = {"X-Repo-Commit": self._sha(repo), "ETag": f'"{_oid(path, files[path])}"'}
        self._reply(200, files[path], headers)


def _oid(path: str, content: bytes) -> str:
    """As git names a file: sha256 of a large one, the blob's sha1 of any other."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES: list[tuple[str, str, bool, Callable[..., None]]] = [
    ("POST", "/api/repos/create", False, _Handler.create),
    ("POST", "/api/validate-yaml", True, _Handler.validate_card),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/[^/]+", False, _Handler.preupload),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", False, _Handler.batch),
    ("PUT", rf"/upload/{REPOSITORY}/(?P<oid>\w+)", True, _Handler.upload),
    ("POST", rf"/api/models/{REPOSITORY}/commit/[^/]+", False, _Handler.commit),
    ("GET", "/api/whoami-v2", False, _Handler.whoami),
    ("GET", rf"/api/models/{REPOSITORY}(?:/revision/[^/]+)?", True, _Handler.info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/[^/]+(?:/(?P<folder>.+))?", True, _Handler.tree),
    ("GET", rf"/{REPOSITORY}/resolve/[^/]+/(?P<path>.+)", True, _Handler.resolve),
]

if __name__ == "__main__":
    with LoopbackHub(port=int(sys.argv[1])) as hub:
        sys.stdout.write(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1\n")
        sys.stdout.flush()
        hub.serve_forever()
