"""A Hub on this machine's loopback interface, in memory: what `huggingface_hub` asks when it pushes and loads.

It answers for repositories, uploads through the commit itself ("regular") or by LFS, commits, listings, revisions and
files with ranges. Faults are injected before a request is answered (`Hub.faults`) or after it was carried out
(`Hub.lost`). Not covered: Xet, pull requests, gated repositories, LFS in several parts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "tester", "hf_loopback"
NOW = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".wav")
KINDS = {"models": "model", "datasets": "dataset"}
DROP = 0
"""Status of a fault that closes the connection without an answer."""
HANG = -1
"""Status of a fault that never answers, until the client gives up or the Hub is closed."""

Headers = dict[str, str]
Tree = dict[str, str]
"""Path to SHA-256 of the content."""


@dataclass
class Fault:
    """What happens to requests in the place of an answer.

    Args:
        method: of the requests.
        path: regular expression found in their path.
        status: HTTP status, `DROP` or `HANG`.
        times: how many requests; the following ones are answered.
        headers: of the answer.
        message: its error.
    """

    method: str
    path: str
    status: int
    times: int = 1
    headers: Headers = field(default_factory=dict)
    message: str = "injected"

    def meets(self, method: str, path: str) -> bool:
        if self.times < 1 or method != self.method or not re.search(self.path, path):
            return False
        self.times -= 1
        return True


class Repository:
    """Commits of one repository, and where its branches are."""

    def __init__(self, kind: str, name: str, private: bool) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.commits: dict[str, Tree] = {}
        self.branches: dict[str, str] = {}
        self.titles: list[str] = []
        self.commit({}, "initial commit", "main")

    def commit(self, tree: Tree, title: str, branch: str) -> str:
        content = json.dumps([self.name, len(self.titles), title, sorted(tree.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(tree), oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision).removeprefix("refs/heads/")
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server and what it stores.

    Args:
        lfs: whether weights and tables are sent by LFS, as `datasets` needs it; the client must then not use Xet
            (`HF_HUB_DISABLE_XET=1`).
    """

    def __init__(self, *, lfs: bool = False) -> None:
        self.lfs = lfs
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lost: list[Fault] = []
        """Faults that come after the request was carried out: only its answer is lost."""
        self.lock = threading.RLock()
        self.closing = threading.Event()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Content of every file of a revision."""
        repository = self.repositories[kind, name]
        oid = repository.resolve(revision)
        assert oid is not None
        return {path: self.blobs[digest] for path, digest in repository.commits[oid].items()}

    def titles(self, name: str, kind: str = "model") -> list[str]:
        """Titles of the commits, oldest first, without the one that makes a repository."""
        return self.repositories[kind, name].titles[1:]

    def add(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest


@contextmanager
def loopback(*, lfs: bool = False) -> Iterator[Hub]:
    """A Hub for the length of a block."""
    hub = Hub(lfs=lfs)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms per request
    hub: ClassVar[Hub]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _any(self) -> None:
        url = urlsplit(self.path)
        hub, body = self.hub, self._body()
        with hub.lock:
            hub.requests.append((self.command, url.path))
            fault = next((fault for fault in hub.faults if fault.meets(self.command, url.path)), None)
        if fault is not None:
            self._fail(fault)
            return
        try:
            if self._writes(url.path) and not self._authorized():
                raise _Refused(401, "Invalid credentials in Authorization header")
            answer = self._answer(url.path, parse_qs(url.query), body)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send({"error": refused.message}, refused.status, headers)
            return
        with hub.lock:
            lost = next((fault for fault in hub.lost if fault.meets(self.command, url.path)), None)
        if lost is not None:
            self._fail(lost)
            return
        self._send(*answer) if isinstance(answer, tuple) else self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _fail(self, fault: Fault) -> None:
        if fault.status == HANG:
            self.hub.closing.wait()
        if fault.status in (HANG, DROP):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._send({"error": fault.message}, fault.status, fault.headers)

    def _writes(self, path: str) -> bool:
        reads = path.startswith("/lfs/") or "/paths-info/" in path or path == "/api/validate-yaml"
        return self.command in ("POST", "PUT", "DELETE") and not reads

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: Any, status: int = 200, headers: Headers | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        method = "GET" if self.command == "HEAD" else self.command
        for pattern, wanted, handle in _ROUTES:
            if wanted == method and (match := pattern.fullmatch(path)):
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    return handle(self, parts, query, body)
        raise _Refused(404, f"no route {self.command} {path}", "EntryNotFound")

    # ---- What there is

    def _repository(self, parts: dict[str, str]) -> Repository:
        kind = KINDS[parts.get("kind", "models").rstrip("/")]
        found = self.hub.repositories.get((kind, parts["id"]))
        if found is None or (found.private and not self._authorized()):
            raise _Refused(404 if self._authorized() else 401, "Repository not found", "RepoNotFound")
        return found

    def _revision(self, parts: dict[str, str]) -> tuple[Repository, str, Tree]:
        repository = self._repository(parts)
        oid = repository.resolve(parts.get("rev", "main"))
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {parts.get('rev')}", "RevisionNotFound")
        return repository, oid, repository.commits[oid]

    def _by_lfs(self, path: str) -> bool:
        return self.hub.lfs and path.endswith(LFS_SUFFIXES)

    def _entry(self, path: str, digest: str) -> dict[str, Any]:
        content = self.hub.blobs[digest]
        entry: dict[str, Any] = {"type": "file", "oid": git_oid(content), "size": len(content), "path": path}
        if self._by_lfs(path):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def whoami(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        if not self._authorized():
            raise _Refused(401, "Invalid user token.")
        return {"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": []}

    def create(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        asked = json.loads(body)
        kind, name = asked.get("type", "model"), f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repositories:
            return {"error": "You already created this repo", "url": url, "name": name}, 409
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[kind, name] = Repository(kind, name, private)
        return {"url": url, "name": name, "id": name}

    def info(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        repository, oid, tree = self._revision(parts)
        siblings = [{"rfilename": path, "size": len(self.hub.blobs[digest])} for path, digest in sorted(tree.items())]
        fixed = {"_id": "0", "lastModified": NOW, "createdAt": NOW, "gated": False, "disabled": False, "tags": []}
        counts = {"downloads": 0, "likes": 0, "spaces": []}
        named = {"id": repository.name, "modelId": repository.name, "author": repository.name.split("/")[0]}
        return {**fixed, **counts, **named, "sha": oid, "private": repository.private, "siblings": siblings}

    def tree(self, parts: dict[str, str], query: dict[str, list[str]], body: bytes) -> Any:
        _, _, tree = self._revision(parts)
        prefix = f"{parts['path'].strip('/')}/" if "path" in parts else ""
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found, folders = [], set()
        for path, digest in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            *above, _ = path.removeprefix(prefix).split("/")
            folders |= {prefix + "/".join(above[:depth]) for depth in range(1, len(above) + 1) if deep or depth == 1}
            if deep or not above:
                found.append(self._entry(path, digest))
        if prefix and not found and not folders:
            raise _Refused(404, f"{prefix} does not exist", "EntryNotFound")
        return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)] + found

    def paths(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        _, _, tree = self._revision(parts)
        try:
            asked = json.loads(body)["paths"]
        except ValueError:
            asked = parse_qs(body.decode()).get("paths", [])
        asked = [path.strip("/") for path in ([asked] if isinstance(asked, str) else asked)]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in tree)]
        entries = [self._entry(path, tree[path]) for path in asked if path in tree]
        return entries + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]

    def references(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        branches = self._repository(parts).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return {"branches": listed, "converts": [], "tags": []}

    def branch(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        repository = self._repository(parts)
        if parts["name"] in repository.branches:
            raise _Refused(409, "Reference already exists")
        start = repository.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
        assert start is not None
        repository.branches[parts["name"]] = start
        return {}

    # ---- Uploads

    def preupload(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        _, _, tree = self._revision(parts)
        files = []
        for file in json.loads(body)["files"]:
            path, lfs = file["path"], self._by_lfs(file["path"])
            digest = tree.get(path)
            oid = digest if digest is None or lfs else git_oid(self.hub.blobs[digest])
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(answer)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return {"transfer": "basic", "objects": objects}, 200, headers

    def lfs_put(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        if self.hub.add(body) != parts["oid"]:
            raise _Refused(400, "bad checksum")
        return {}

    def commit(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        repository, oid, tree = self._revision(parts)
        tree, title = dict(tree), ""
        for line in filter(None, body.splitlines()):
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit", oid) != oid:
                        raise _Refused(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    tree[value["path"]] = self.hub.add(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        raise _Refused(400, f"LFS object {value['oid']} was not uploaded")
                    tree[value["path"]] = value["oid"]
                case "deletedFile":
                    tree.pop(value["path"])
        new = repository.commit(tree, title, parts.get("rev", "main"))
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        url = f"{self.hub.url}/{prefix}{repository.name}/commit/{new}"
        return {"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""}

    def validate(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    # ---- Downloads

    def file(self, parts: dict[str, str], query: Any, body: bytes) -> Any:
        _, oid, tree = self._revision(parts)
        path = parts["path"]
        if path not in tree:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = self.hub.blobs[tree[path]]
        etag = tree[path] if self._by_lfs(path) else git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.command != "GET":
            return content, 200, headers
        first = int(asked[1])
        last = min(int(asked[2] or len(content) - 1), len(content) - 1)
        return content[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}


_KIND, _ID, _REV = r"(?P<kind>models|datasets)", r"(?P<id>[^/]+/[^/]+?)", r"(?P<rev>[^/]+)"
_PLAIN = rf"/(?P<kind>datasets/)?{_ID}"
_Handle = Callable[[_Handler, dict[str, str], dict[str, list[str]], bytes], Any]
_ROUTES: list[tuple[re.Pattern[str], str, _Handle]] = [
    (re.compile(pattern), method, handle)
    for pattern, method, handle in [
        (r"/api/whoami-v2", "GET", _Handler.whoami),
        (r"/api/repos/create", "POST", _Handler.create),
        (r"/api/validate-yaml", "POST", _Handler.validate),
        (rf"/api/{_KIND}/{_ID}", "GET", _Handler.info),
        (rf"/api/{_KIND}/{_ID}/revision/{_REV}", "GET", _Handler.info),
        (rf"/api/{_KIND}/{_ID}/tree/{_REV}(?:/(?P<path>.+))?", "GET", _Handler.tree),
        (rf"/api/{_KIND}/{_ID}/paths-info/{_REV}", "POST", _Handler.paths),
        (rf"/api/{_KIND}/{_ID}/refs", "GET", _Handler.references),
        (rf"/api/{_KIND}/{_ID}/branch/(?P<name>.+)", "POST", _Handler.branch),
        (rf"/api/{_KIND}/{_ID}/preupload/{_REV}", "POST", _Handler.preupload),
        (rf"/api/{_KIND}/{_ID}/commit/{_REV}", "POST", _Handler.commit),
        (rf"{_PLAIN}\.git/info/lfs/objects/batch", "POST", _Handler.lfs_batch),
        (r"/lfs/(?P<oid>[0-9a-f]{64})", "PUT", _Handler.lfs_put),
        (rf"{_PLAIN}/resolve/{_REV}/(?P<path>.+)", "GET", _Handler.file),
        (rf"/api/resolve-cache/(?P<kind>models/|datasets/){_ID}/{_REV}/(?P<path>.+)", "GET", _Handler.file),
    ]
]
