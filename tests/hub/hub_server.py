"""A small Hub on this machine: repositories are folders, served by the routes that `huggingface_hub` asks for.

Models lie in `root/<owner>/<name>`, data sets in `root/datasets/<owner>/<name>`, another revision of either in
`<name>@<revision>` beside it; a repository with a file named `.gated` answers 401. Uploads are written there,
weights through the routes of Git LFS.
The client is the real one, pointed here by `HF_ENDPOINT`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(
    r"^/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(?:/(.*))?)?$"
)
_LFS_BATCH = re.compile(r"^/[^/]+/[^/]+\.git/info/lfs/objects/batch$")
_LFS_OBJECT = re.compile(r"^/lfs/([0-9a-f]{64})$")
_FILE = re.compile(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class HubServer(ThreadingHTTPServer):
    """Use as a context manager; `requests` holds (method, path) of all that was asked.

    The first answer with a file named in `cut_once`, and each with one in `cut_always`, breaks off in its middle; `resumed` holds where each went on.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.cut_once: set[str] = set()
        self.cut_always: set[str] = set()
        self.resumed: list[tuple[str, int]] = []
        self.large: dict[str, bytes] = {}  # what was sent by Git LFS and waits for its commit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST  # noqa: N815

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if match := _API.match(path):
            kind, name, what, revision, below = match.groups()
            self._answer_api(kind == "datasets", name, what, revision, below or "", body)
        elif match := _FILE.match(path):
            is_data, name, revision, file = match.groups()
            self._send_file(bool(is_data), name, revision, file)
        elif _LFS_BATCH.match(path):
            objects = [{**one, "authenticated": True, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            self._send_json({"transfer": "basic", "objects": objects})
        elif (match := _LFS_OBJECT.match(path)) and _digest(body) == match[1]:
            self.server.large[match[1]] = body
            self._send(200, b"")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            if asked["name"] == "locked":
                self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
                return
            if asked.get("organization") == "others":
                self._send(403, b"{}", {"X-Error-Message": "You don't have the rights to create a model there"})
                return
            folder = self.server.root / str(asked.get("organization") or "me") / asked["name"]
            folder.mkdir(parents=True, exist_ok=True)
            self._send_json({"url": f"{self.server.url}/{folder.parent.name}/{folder.name}"})
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        else:
            self._send(404, b"{}")

    def _repository(self, is_data: bool, name: str, revision: str | None) -> Path | None:
        """The folder of a repository; None, and answered, where it cannot be had."""
        folder = self.server.root / ("datasets" if is_data else "") / name
        if not folder.is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif (folder / ".gated").exists():
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."})
        elif revision in (None, "main", _commit(folder)):
            return folder
        else:
            for other in folder.parent.glob(f"{folder.name}@*"):
                if revision in (other.name.partition("@")[2], _commit(other)):
                    return other
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return None

    def _answer_api(
        self, is_data: bool, name: str, what: str | None, revision: str | None, below: str, body: bytes
    ) -> None:
        folder = self._repository(is_data, name, revision)
        if folder is None:
            return
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            self._send_json({"files": [{"path": name, "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                                        "shouldIgnore": False} for name in asked]})  # fmt: skip
        elif what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "lfsFile":
                    (folder / line["value"]["path"]).write_bytes(self.server.large.pop(line["value"]["oid"]))
            self._send_json(
                {"success": True, "commitOid": _commit(folder), "commitUrl": f"{self.server.url}/{name}/commit/1"}
            )
        elif what == "tree":
            inside = [path for path in files if str(path.relative_to(folder)).startswith(below)]
            self._send_json([_describe(path, folder) for path in inside])
        elif what == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            self._send_json([_describe(path, folder) for path in files if str(path.relative_to(folder)) in wanted])
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self._send_json({"id": name, "sha": _commit(folder), "private": False, "gated": False, "downloads": 0,
                             "likes": 0, "tags": [], "siblings": siblings})  # fmt: skip

    def _send_file(self, is_data: bool, name: str, revision: str, file: str) -> None:
        folder = self._repository(is_data, name, revision)
        if folder is None:
            return
        path = folder / file
        if not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _commit(folder)})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": _commit(folder), "Accept-Ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and int(asked[1]) and file not in self.server.cut_always:
            start = int(asked[1])
            self.server.resumed.append((file, start))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers)
        elif file in self.server.cut_once | self.server.cut_always and self.command == "GET":
            self.server.cut_once.discard(file)
            self.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self._send(200, content, headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _commit(folder: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    content = path.read_bytes()
    oid = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "size": len(content), "oid": oid}
