"""A stand-in of the Hugging Face hub's API, in memory, for huggingface_hub's own unmodified client.

It speaks what that client asks for models: information, paths, files with ETag, X-Repo-Commit and a redirect
of large ones to another host, repositories made, files sent through git-lfs' API, and commits. Errors carry
the hub's codes. Not spoken: Xet, which the hub prefers for large files (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_standinsecretstandinsecret"
LARGE = (".onnx", ".data", ".safetensors")  # what .gitattributes gives to git-lfs
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Repo:
    """A repository: commits by hash, each a folder of files, and the names of some of them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit that holds exactly `files`; returns its hash."""
        said = json.dumps([len(self.commits), *sorted((n, _sha(b)) for n, b in files.items())])
        commit = hashlib.sha1(said.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a branch, tag or commit."""
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub:
    """What the server holds, and what it was asked: (method, path, token)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.sent: dict[str, bytes] = {}  # through git-lfs, by sha256
        self.instead: dict[str, bytes] = {}  # other bytes than those of a sha256
        self.asked: list[tuple[str, str, str | None]] = []
        self.down = False  # every answer is 503
        self.url = ""

    def repo(self, name: str, files: dict[str, bytes], **kinds: bool) -> Repo:
        """Make a repository with one commit."""
        made = self.repos[name] = Repo(**kinds)
        made.commit(files)
        return made

    def paths(self, method: str) -> list[str]:
        """What was asked for with one method."""
        return [path for asked, path, _ in self.asked if asked == method]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a port of this machine, in threads."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    one = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    large = {"lfs": {"oid": _sha(data), "size": len(data), "pointerSize": 130}}
    return {**one, **large} if path.endswith(LARGE) else one


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused", url: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.url = status, code, message, url


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that its class names."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    # -- answers -----------------------------------------------------------------------------------------

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.asked.append((self.command, path, token))
        self.token, self.body = token, self._read()
        try:
            if self.hub.down:
                raise _Refused(503)
            if token not in (None, TOKEN):
                raise _Refused(401, "", "Invalid credentials in Authorization header")
            self._route(path)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            body = {"error": refused.message, "url": refused.url}
            self._send(refused.status, json.dumps(body).encode(), headers)

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _route(self, path: str) -> None:
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", self._paths_info),
            (r"/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/api/repos/create", self._create),
            (r"/api/whoami-v2", self._whoami),
            (r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/cdn/([0-9a-f]{64})", self._cdn),
            (r"/lfs/([0-9a-f]{64})", self._upload),
        ):
            if found := re.fullmatch(pattern, path):
                return answer(*found.groups())
        raise _Refused(404, "", f"no such path: {path}")

    # -- reading -----------------------------------------------------------------------------------------

    def _find(self, name: str, revision: str = "main") -> tuple[Repo, str, dict[str, bytes]]:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            raise _Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        found = repo.at(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, *found

    def _info(self, name: str, revision: str = "main") -> None:
        repo, commit, files = self._find(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []})

    def _paths_info(self, name: str, revision: str) -> None:
        _, _, files = self._find(name, revision)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self._json([_entry(path, files[path]) for path in wanted if path in files])

    def _tree(self, name: str, revision: str) -> None:
        _, _, files = self._find(name, revision)
        self._json([_entry(path, data) for path, data in files.items()])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo, commit, files = self._find(name, revision)
        if repo.gated:
            raise _Refused(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted")
        if path not in files:
            raise _Refused(404, "EntryNotFound", f"Entry not found: {path}")
        data, headers = files[path], {"X-Repo-Commit": commit}
        if not path.endswith(LARGE):
            self._send(200, data, {**headers, "ETag": f'"{_git(data)}"'})
            return
        port = urlsplit(self.hub.url).port
        headers |= {"X-Linked-Etag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**headers, "Location": f"http://localhost:{port}/cdn/{_sha(data)}"})

    def _cdn(self, digest: str) -> None:
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for data in files.values():
                    if _sha(data) == digest:
                        return self._send(200, self.hub.instead.get(digest, data), {})
        raise _Refused(404)

    # -- writing -----------------------------------------------------------------------------------------

    def _allowed(self) -> None:
        if self.token is None:
            raise _Refused(401, "", "Invalid username or password.")

    def _whoami(self) -> None:
        self._allowed()
        self._json({"type": "user", "name": "org", "orgs": [], "auth": {"type": "access_token"}})

    def _create(self) -> None:
        self._allowed()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "org":
            raise _Refused(
                403, "", f"You don't have the rights to create a model under {asked['organization']}"
            )
        if name in self.hub.repos:
            raise _Refused(409, "", "You already created this model repo", f"{self.hub.url}/{name}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repo(name, {".gitattributes": b"*.onnx filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _preupload(self, name: str, revision: str) -> None:
        self._allowed()
        files = self._find(name, revision)[2]
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _git(files[one["path"]]) if one["path"] in files else None,
            }
            for one in json.loads(self.body)["files"]
        ]
        self._json({"files": modes})

    def _batch(self, name: str) -> None:
        self._allowed()
        objects = []
        for one in json.loads(self.body)["objects"]:
            known = one["oid"] in self.hub.sent
            actions = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            objects.append({**one, **({} if known else actions)})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, digest: str) -> None:
        if _sha(self.body) != digest:
            raise _Refused(400, "", "the sha256 differs")
        self.hub.sent[digest] = self.body
        self._send(200, b"", {})

    def _commit(self, name: str, revision: str) -> None:
        self._allowed()
        repo, _, files = self._find(name, revision)
        files = dict(files)
        for line in self.body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.sent[value["oid"]]
            elif one["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


# -- the client ----------------------------------------------------------------------------------------------


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """What a process is started with to ask this hub, with nothing cached and without a token."""
    left = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**left, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


def connect(hub: Hub, home: Path, patch: pytest.MonkeyPatch) -> None:
    """The same for this process, whose client has read its environment already."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
