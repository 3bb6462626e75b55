"""A Hugging Face Hub on the loopback: as much of it as pushing and pulling needs.

    push   create → validate-yaml → preupload → LFS batch → PUT each object → verify → commit (ndjson)
    pull   repo info → tree → resolve (HEAD, then GET)

The client reads HF_ENDPOINT once, when it is imported, so it runs in a process of its own:

    with StandInHub() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home"), check=True)
        assert hub.repos["stand-in/tiny"].files["config.json"] == b"{}"

A model's key is "owner/name", a data set's "datasets/owner/name". Unlike the real Hub, a new repo is empty (without
.gitattributes), "main" is its only branch, and a download comes whole and from here (no redirect, no ranges). There are
no pull requests, discussions, pages of a listing, or Xet; a request that has no route is answered 501 and named.

Sources: the Git LFS batch API, transfer "basic", for large files; what huggingface_hub sends and reads for the rest.
"""

import base64
import json
import os
import re
from collections.abc import Callable
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Lock, Thread
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "stand-in"
TOKEN = "hf_stand_in"
INLINE_LIMIT = 10 * 2**20  # bytes; a larger file goes through LFS, and so does one with a zero byte near its beginning


class Blob(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 in LFS, else Git's SHA-1: the client compares it with the file that it is about to send."""
        if self.lfs:
            return sha256(self.content).hexdigest()
        return sha1(b"blob %d\0%b" % (len(self.content), self.content)).hexdigest()


class Repo:
    """A line of commits on "main", the first of them empty."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.head = ""
        self.commits: dict[str, dict[str, Blob]] = {}  # oldest first: commit id → path → blob
        self.commit("initial commit", {})

    @property
    def files(self) -> dict[str, bytes]:
        """Path → content at the head of "main"."""
        return {path: blob.content for path, blob in self.commits[self.head].items()}

    def commit(self, summary: str, blobs: dict[str, Blob]) -> None:
        content = sorted((path, blob.oid) for path, blob in blobs.items())
        self.head = sha1(repr((self.head, summary, content)).encode()).hexdigest()
        self.commits[self.head] = blobs


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    authorised: bool
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @classmethod
    def json(cls, payload: Any, status: int = 200, **headers: str) -> Self:
        return cls(status, json.dumps(payload).encode(), {"Content-Type": "application/json", **headers})


class HubError(Exception):
    """A refusal. The client chooses its exception by X-Error-Code, then by status, and shows X-Error-Message."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        errors = {"X-Error-Message": message, "X-Error-Code": code}
        self.reply = Reply.json({"error": message}, status, **errors, **headers)


class StandInHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS: SHA-256 → content
        self.requests: list[tuple[str, str]] = []  # (method, path) of all that was asked, in order
        self._announced: set[str] = set()
        self._lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Connection, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process whose client shall talk to this Hub and keep its cache under `home`."""
        # A proxy, or the user's own settings (offline mode, cache folders, other tokens), would lead past this Hub.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return inherited | hub | switches | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                asked = "GET" if request.method == "HEAD" else request.method
                for method, path, needs_token, handler in ROUTES:
                    if method == asked and (match := re.fullmatch(path, request.path)):
                        if needs_token and not request.authorised:
                            raise HubError(401, "Invalid username or password.")
                        groups = match.groupdict(default="")
                        return handler(self, request, **{name: unquote(value) for name, value in groups.items()})
                raise HubError(501, f"the stand-in Hub has no route for {request.method} {request.path}")
            except HubError as error:
                return error.reply

    def _repo(self, request: Request, key: str) -> Repo:
        repo = self.repos.get(key)
        if repo is None or (repo.private and not request.authorised):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def _checkout(self, request: Request, key: str, revision: str) -> tuple[str, dict[str, Blob]]:
        """Commit id and blobs at a revision, which is "main" or a commit id."""
        repo = self._repo(request, key)
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            raise HubError(404, "Revision not found", "RevisionNotFound")
        return commit, repo.commits[commit]

    # Accounts and repos

    def whoami(self, request: Request) -> Reply:
        return Reply.json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, request: Request) -> Reply:
        asked = request.json()
        prefix = "datasets/" if asked.get("type") == "dataset" else ""
        key = f"{prefix}{asked['organization'] or USER}/{asked['name']}"
        exists = key in self.repos
        if not exists:
            self.repos[key] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return Reply.json({"url": f"{self.endpoint}/{key}"}, 409 if exists else 200)

    def info(self, request: Request, key: str, revision: str) -> Reply:
        commit, blobs = self._checkout(request, key, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(blobs)]
        about = {"id": key.removeprefix("datasets/"), "private": self.repos[key].private, "tags": []}
        return Reply.json({**about, "sha": commit, "siblings": siblings})

    # Push

    def validate_yaml(self, request: Request) -> Reply:
        header = re.match(r"---\n(.*?\n)---\n", request.json()["content"], re.DOTALL)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            return Reply.json({"errors": [{"message": str(error)}]}, 400)
        return Reply.json({"errors": [], "warnings": []})

    def preupload(self, request: Request, key: str, revision: str) -> Reply:
        _, blobs = self._checkout(request, key, revision)
        files = request.json()["files"]
        for file in files:
            binary = b"\0" in base64.b64decode(file.pop("sample"))
            file["uploadMode"] = "lfs" if binary or file["size"] > INLINE_LIMIT else "regular"
            file["oid"] = blobs[file["path"]].oid if file["path"] in blobs else None
            file["shouldIgnore"] = False
        return Reply.json({"files": files})

    def lfs_batch(self, request: Request, key: str) -> Reply:
        self._repo(request, key)
        objects = request.json()["objects"]
        for item in objects:
            if item["oid"] not in self.objects:  # without actions the client sends nothing
                # The PUT carries no token: being announced is its permission, as a signed address would be.
                self._announced.add(item["oid"])
                upload, verify = f"{self.endpoint}/lfs/{item['oid']}", f"{self.endpoint}/lfs/verify"
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return Reply.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request: Request, oid: str) -> Reply:
        if oid not in self._announced:
            raise HubError(403, f"object {oid} was not announced by an LFS batch")
        if (received := sha256(request.body).hexdigest()) != oid:
            raise HubError(400, f"object {oid} arrived with SHA-256 {received}")
        self.objects[oid] = request.body
        return Reply.json({})

    def lfs_verify(self, request: Request) -> Reply:
        asked = request.json()
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, f"object {asked['oid']} of {asked['size']} bytes is not here")
        return Reply.json({})

    def commit(self, request: Request, key: str, revision: str) -> Reply:
        repo = self._repo(request, key)
        if revision != "main":
            raise HubError(404, "Revision not found", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header["value"].get("parentCommit", repo.head) != repo.head:
            raise HubError(412, f"A commit has happened since: main is at {repo.head}")
        blobs = dict(repo.commits[repo.head])
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            match operation["key"]:
                case "file":
                    blobs[path] = Blob(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        raise HubError(400, f"object {value['oid']} was never uploaded")
                    blobs[path] = Blob(self.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    if blobs.pop(path, None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                case "deletedFolder":
                    folder = path.rstrip("/") + "/"
                    blobs = {kept: blob for kept, blob in blobs.items() if not kept.startswith(folder)}
                case unknown:
                    raise HubError(501, f"the stand-in Hub does not know the commit operation {unknown}")
        repo.commit(header["value"]["summary"], blobs)
        return Reply.json({"commitOid": repo.head, "commitUrl": f"{self.endpoint}/{key}/commit/{repo.head}"})

    # Pull

    def tree(self, request: Request, key: str, revision: str, folder: str) -> Reply:
        entries = self._entries(request, key, revision)
        if folder and not any(e["type"] == "directory" and e["path"] == folder for e in entries):
            raise HubError(404, "Entry not found", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        deep = request.query["recursive"] == ["true"]
        below = (entry for entry in entries if entry["path"].startswith(prefix))
        listed = [entry for entry in below if deep or "/" not in entry["path"].removeprefix(prefix)]
        return Reply.json(sorted(listed, key=lambda entry: entry["path"]))

    def paths_info(self, request: Request, key: str, revision: str) -> Reply:
        asked = parse_qs(request.body.decode()).get("paths", [])
        return Reply.json([entry for entry in self._entries(request, key, revision) if entry["path"] in asked])

    def _entries(self, request: Request, key: str, revision: str) -> list[dict[str, Any]]:
        _, blobs = self._checkout(request, key, revision)
        folders = {str(parent) for path in blobs for parent in PurePosixPath(path).parents} - {"."}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": sha1(path.encode()).hexdigest()} for path in folders
        ]
        for path, blob in blobs.items():
            size = len(blob.content)
            lfs = {"lfs": {"oid": blob.oid, "size": size, "pointerSize": 134}} if blob.lfs else {}
            entries.append({"type": "file", "path": path, "oid": blob.oid, "size": size, **lfs})
        return entries

    def resolve(self, request: Request, key: str, revision: str, path: str) -> Reply:
        commit, blobs = self._checkout(request, key, revision)
        about = {"X-Repo-Commit": commit}
        if path not in blobs:
            raise HubError(404, "Entry not found", "EntryNotFound", **about)
        content, etag = blobs[path].content, f'"{blobs[path].oid}"'
        if blobs[path].lfs:
            about |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
        return Reply(200, content, {"ETag": etag, "Content-Type": "application/octet-stream", **about})


REPO = "(?P<key>(?:datasets/)?[^/]+/[^/]+?)"
API = f"/api/(?:models/)?{REPO}"

ROUTES: list[tuple[str, str, bool, Callable[..., Reply]]] = [
    # method, path, whether a token is needed, handler
    ("GET", "/api/whoami-v2", True, StandInHub.whoami),
    ("POST", "/api/repos/create", True, StandInHub.create),
    ("GET", f"{API}(?:/revision/(?P<revision>[^/]+))?", False, StandInHub.info),
    ("POST", "/api/validate-yaml", False, StandInHub.validate_yaml),
    ("POST", f"{API}/preupload/(?P<revision>[^/]+)", True, StandInHub.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", True, StandInHub.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", False, StandInHub.lfs_upload),
    ("POST", "/lfs/verify", True, StandInHub.lfs_verify),
    ("POST", f"{API}/commit/(?P<revision>[^/]+)", True, StandInHub.commit),
    ("GET", f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", False, StandInHub.tree),
    ("POST", f"{API}/paths-info/(?P<revision>[^/]+)", False, StandInHub.paths_info),
    ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", False, StandInHub.resolve),
]


class Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive, as the client's pool expects
    wbufsize = -1  # head and body leave together: apart, each answer would wait for a delayed acknowledgement

    def __init__(self, hub: StandInHub, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)

    def answer(self) -> None:
        url = urlsplit(self.path)
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.hub.answer(Request(self.command, url.path, parse_qs(url.query), authorised, body))
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 (the names that http.server calls)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: `StandInHub.requests` remembers."""
