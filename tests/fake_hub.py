"""A Hugging Face Hub on 127.0.0.1 for the real clients: repositories in memory, over plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_tests_own_token"


class Hub(ThreadingHTTPServer):
    """`repos` maps "models/me/name" to {"private", "files": {path: bytes}, "sha"}; `requests` lists the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.forget()

    def forget(self) -> None:
        """Be as a new Hub, at the same address."""
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        # part of a path → status, headers and message of the reply; status 0 closes the connection
        self.fail: dict[str, tuple[int, dict[str, str]] | tuple[int, dict[str, str], str]] = {}
        self.times: dict[str, int] = {}  # number of failures of a part; the default is always
        self.user: dict[str, Any] = {"name": "me", "auth": {"accessToken": {"role": "write"}}, "orgs": []}  # whoami

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, kind: str, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repos[f"{kind}/{repo_id}"] = {"private": private, "files": dict(files), "sha": "0" * 40}

    def writes(self) -> list[str]:
        """Requests that would change something."""
        return [r for r in self.requests if not r.startswith(("GET", "HEAD"))]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, (status, headers, *message) in self.server.fail.items():
            remaining = self.server.times.get(part, 1)
            if part in path and remaining:
                if part in self.server.times:
                    self.server.times[part] = remaining - 1
                if status == 0:
                    return self.connection.shutdown(socket.SHUT_RDWR)
                text = message[0] if message else f"failing with {status}"
                return self.answer({"error": text}, status, **headers)
        if self.command in ("POST", "PUT") and "/storage/" not in path and not self.may_write():
            return self.answer({"error": "a token that may write is needed"}, 401)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}"):
                return method(self, *match.groups())
        self.answer({"error": "no such page"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, kind: str, repo_id: str) -> dict[str, Any] | None:
        repo = self.server.repos.get(f"{kind}/{repo_id}")
        if repo is None or (repo["private"] and not self.may_write()):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        return repo

    def files(self, repo: dict[str, Any], revision: str | None) -> dict[str, bytes] | None:
        if revision in (None, "main") or re.fullmatch("[0-9a-f]{40}", revision):
            return repo["files"]
        if revision in repo.get("branches", {}):
            return repo["branches"][revision]
        self.answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        return None

    def create(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        key = f"{request.get('type') or 'model'}s/{repo_id}"
        answer = {"url": f"{self.server.url}/{repo_id}"}
        if key in self.server.repos:
            return self.answer(answer | {"error": "You already created this model repo"}, 409)
        private = request.get("private") or request.get("visibility") == "private"
        self.server.repos[key] = {"private": bool(private), "files": {}, "sha": "0" * 40}
        self.answer(answer)

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        if (repo := self.repo(kind, repo_id)) and (files := self.files(repo, revision)) is not None:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo_id, "sha": repo["sha"], "private": repo["private"], "siblings": siblings, "tags": []}
            self.answer(answer | {"cardData": repo.get("card", {})})

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None = None) -> None:
        if (repo := self.repo(kind, repo_id)) is None:
            return
        under = f"{folder}/" if folder else ""
        if (there := self.files(repo, revision)) is None:
            return
        files = {n: c for n, c in there.items() if n.startswith(under)}
        if folder and not files:
            return self.answer({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound")
        entries = [{"type": "file", "path": n, "size": len(c), "oid": blob_id(c)} for n, c in files.items()]
        folders = {str(parent) for n in files for parent in PurePosixPath(n).parents} - {".", folder}
        entries += [{"type": "directory", "path": n, "size": 0, "oid": blob_id(n.encode())} for n in sorted(folders)]
        deep = "recursive=true" in self.path.lower()
        self.answer([entry for entry in entries if deep or "/" not in str(entry["path"]).removeprefix(under)])

    def resolve(self, kind: str | None, repo_id: str, revision: str, name: str) -> None:
        if (repo := self.repo(kind or "models", repo_id)) is None:
            return
        if (files := self.files(repo, revision)) is None:
            return
        content = files.get(name)
        if content is None:
            return self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{blob_id(content)}"', "X_Repo_Commit": repo["sha"], "Accept_Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), int(span[2] or len(content) - 1) + 1
            part = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
            return self.answer(content[start:end], 206, Content_Range=part, **headers)
        self.answer(content, **headers)

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        if (repo := self.repo(kind, repo_id)) is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors")
            stored = repo["files"].get(file["path"])
            oid = stored and (hashlib.sha256(stored).hexdigest() if large else blob_id(stored))
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.answer({"files": files})

    def batch(self, kind: str | None, repo_id: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/storage/{item['oid']}"}}
            stored = item["oid"] in self.server.objects
            objects.append({"oid": item["oid"], "size": item["size"]} | ({} if stored else {"actions": upload}))
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer({"error": "wrong content"}, 400)
        self.server.objects[oid] = self.body
        self.answer()

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        if (repo := self.repo(kind, repo_id)) is None:
            return
        files = repo["files"] if revision == "main" else repo["branches"][revision]
        entries = [json.loads(line) for line in self.body.splitlines()]
        gone = [e["value"]["path"] for e in entries if e["key"] == "deletedFile" and e["value"]["path"] not in files]
        if gone:
            return self.answer({"error": f"no such file to delete: {gone}"}, 400)
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        repo["sha"] = hashlib.sha1(self.body).hexdigest()
        self.answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{repo['sha']}", "commitOid": repo["sha"]})

    def branch(self, kind: str, repo_id: str, name: str) -> None:
        if repo := self.repo(kind, repo_id):
            repo.setdefault("branches", {}).setdefault(name, dict(repo["files"]))
            self.answer({})

    def tag(self, kind: str, repo_id: str, revision: str) -> None:
        if repo := self.repo(kind, repo_id):
            repo.setdefault("tags", {})[json.loads(self.body)["tag"]] = revision
            self.answer({})

    def whoami(self) -> None:
        if not self.may_write():
            return self.answer({"error": "Invalid token"}, 401)
        self.answer({"type": "user"} | self.server.user)

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})


def blob_id(content: bytes) -> str:
    """The id that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"(models|datasets)/([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (r"GET /api/whoami-v2", Handler.whoami),
    (rf"GET /api/{REPO}", Handler.info),
    (rf"GET /api/{REPO}/revision/([^/]+)", Handler.info),
    (rf"GET /api/{REPO}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/{REPO}/tree/([^/]+)/(.+)", Handler.tree),
    (rf"POST /api/{REPO}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /api/{REPO}/commit/([^/]+)", Handler.commit),
    (rf"POST /api/{REPO}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/{REPO}/tag/([^/]+)", Handler.tag),
    (r"POST /(?:(datasets)/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /storage/(\w+)", Handler.store),
    (r"GET /(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that answers while the block lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
