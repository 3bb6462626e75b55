"""A stand-in for the Hugging Face Hub on the loopback interface; it supports pushing and pulling.

    push   create → validate-yaml → preupload → LFS batch → PUT each object → verify → commit (ndjson)
    pull   repo info → tree → resolve (HEAD, then GET)

The client reads HF_ENDPOINT only when it is imported, so it runs in its own process:

    with StandInHub() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home"), check=True)
        assert hub.repos["stand-in/tiny"].files["config.json"] == b"{}"

The key of a model is "owner/name", the key of a data set is "datasets/owner/name". Unlike on the real Hub, a new repo is empty
(without .gitattributes), "main" is its only branch, and downloads have no redirects and no ranges. Pull requests, discussions,
paginated lists and Xet are not supported; an unknown request gets status 501 with its method and path.

Sources: the Git LFS batch API with transfer "basic" for large files; the requests of huggingface_hub for the rest.
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
INLINE_LIMIT = 10 * 2**20  # bytes; larger files use LFS, and so do files with a zero byte near the beginning


class Blob(NamedTuple):
    """Content of a file."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 for LFS, else Git's SHA-1; the client compares it with the file to send."""
        if self.lfs:
            return sha256(self.content).hexdigest()
        return sha1(b"blob %d\0%b" % (len(self.content), self.content)).hexdigest()


class Repo:
    """Commits on "main"; the first one is empty."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.head = ""
        self.commits: dict[str, dict[str, Blob]] = {}  # oldest first: commit id → path → blob
        self.commit("initial commit", {})

    @property
    def files(self) -> dict[str, bytes]:
        """Content of each path at the head of "main"."""
        return {path: blob.content for path, blob in self.commits[self.head].items()}

    def commit(self, summary: str, blobs: dict[str, Blob]) -> None:
        """Add a commit with these files."""
        content = sorted((path, blob.oid) for path, blob in blobs.items())
        self.head = sha1(repr((self.head, summary, content)).encode()).hexdigest()
        self.commits[self.head] = blobs


class Request(NamedTuple):
    """An HTTP request."""

    method: str
    path: str
    query: dict[str, list[str]]
    authorised: bool
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes
    headers: dict[str, str]

    @classmethod
    def json(cls, payload: Any, status: int = 200, **headers: str) -> Self:
        return cls(status, json.dumps(payload).encode(), {"Content-Type": "application/json", **headers})


class HubError(Exception):
    """An error response. The client selects its exception by X-Error-Code, then by status, and shows X-Error-Message."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        errors = {"X-Error-Message": message, "X-Error-Code": code}
        self.reply = Reply.json({"error": message}, status, **errors, **headers)


class StandInHub:
    """The server; as a context manager it runs in a thread."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS: SHA-256 → content
        self.requests: list[tuple[str, str]] = []  # (method, path) of all requests, in order
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
        """Return the environment of a client process that uses this Hub and has its cache in `home`."""
        # A proxy or the user's settings (offline mode, cache folders, other tokens) would bypass this Hub.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return inherited | hub | switches | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def answer(self, request: Request) -> Reply:
        """Call the handler of a request's route."""
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                requested_method = "GET" if request.method == "HEAD" else request.method
                for method, path, needs_token, handler in ROUTES:
                    if method == requested_method and (match := re.fullmatch(path, request.path)):
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
        """Return the commit id and the blobs of a revision, which is "main" or a commit id."""
        repo = self._repo(request, key)
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            raise HubError(404, "Revision not found", "RevisionNotFound")
        return commit, repo.commits[commit]

    # Accounts and repos

    def whoami(self, request: Request) -> Reply:
        return Reply.json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, request: Request) -> Reply:
        body = request.json()
        prefix = "datasets/" if body.get("type") == "dataset" else ""
        key = f"{prefix}{body['organization'] or USER}/{body['name']}"
        exists = key in self.repos
        if not exists:
            self.repos[key] = Repo(private=body.get("visibility") == "private" or bool(body.get("private")))
        return Reply.json({"url": f"{self.endpoint}/{key}"}, 409 if exists else 200)

    def info(self, request: Request, key: str, revision: str) -> Reply:
        commit, blobs = self._checkout(request, key, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(blobs)]
        information = {"id": key.removeprefix("datasets/"), "private": self.repos[key].private, "tags": []}
        return Reply.json({**information, "sha": commit, "siblings": siblings})

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
            if item["oid"] not in self.objects:  # without actions the client does not upload
                # The PUT has no token: the batch announces the object, like a signed address on the real Hub.
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
        body = request.json()
        if len(self.objects.get(body["oid"], b"")) != body["size"]:
            raise HubError(404, f"object {body['oid']} of {body['size']} bytes does not exist")
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
                    blobs = {name: blob for name, blob in blobs.items() if not name.startswith(folder)}
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
        recursive = request.query["recursive"] == ["true"]
        inside = (entry for entry in entries if entry["path"].startswith(prefix))
        listed = [entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(prefix)]
        return Reply.json(sorted(listed, key=lambda entry: entry["path"]))

    def paths_info(self, request: Request, key: str, revision: str) -> Reply:
        paths = parse_qs(request.body.decode()).get("paths", [])
        return Reply.json([entry for entry in self._entries(request, key, revision) if entry["path"] in paths])

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
        headers = {"X-Repo-Commit": commit}
        if path not in blobs:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content, etag = blobs[path].content, f'"{blobs[path].oid}"'
        if blobs[path].lfs:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
        return Reply(200, content, {"ETag": etag, "Content-Type": "application/octet-stream", **headers})


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
    """Passes the requests of a connection to the Hub."""

    protocol_version = "HTTP/1.1"  # keep-alive, which the client expects
    wbufsize = -1  # send headers and body together; separately, each response would wait for a delayed acknowledgement

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
        """Print nothing: `StandInHub.requests` records all requests."""
