"""A stand-in of the Hub for its real clients: repositories in folders, over local HTTP."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


@dataclass(frozen=True)
class Repository:
    """A folder, read at every request, as the branch `main`; other branches by name."""

    folder: Path
    private: bool = False
    branches: dict[str, "Repository"] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}

    @property
    def commit(self) -> str:
        """Changes with the files, as a commit's id does."""
        names = [name + git_hash(content) for name, content in self.files().items()]
        return hashlib.sha1("".join(names).encode()).hexdigest()

    def entries(self) -> dict[str, dict[str, Any]]:
        """Files and folders as the Hub lists them, by path."""
        found: dict[str, dict[str, Any]] = {}
        for name, content in self.files().items():
            for parent in list(Path(name).parents)[:-1]:
                path = parent.as_posix()
                found[path] = {"type": "directory", "path": path, "oid": git_hash(path.encode())}
            oid = git_hash(content)
            found[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
        return found


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Response:
    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class NotFound(Exception):
    """An answer of 404, with the code by which clients know what is missing."""

    def __init__(self, code: str, **headers: str) -> None:
        self.response = Response(status=404, headers={"X-Error-Code": code, **headers})


class Refused(Exception):
    """An answer of 401 to who is not known, of 403 to who may not, of 400 to nonsense."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        content = json.dumps({"error": message}).encode()
        self.response = Response(content, status, {"X-Error-Message": message, **headers})


class Hub:
    """A server of model and data set repositories, in a `with` block.

    Args:
        root: where models that clients create are to lie.
        users: their names by token; each may write to what is below the own name.

    Attributes:
        requests: what clients asked for, as `METHOD /path`.
        commits: repository, branch, message and files of each.
    """

    def __init__(
        self,
        models: Mapping[str, Path] | None = None,
        datasets: Mapping[str, Path] | None = None,
        root: Path | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        self.repositories = {
            "models": {name: Repository(folder) for name, folder in (models or {}).items()},
            "datasets": {name: Repository(folder) for name, folder in (datasets or {}).items()},
        }
        self.root, self.users = root, users or {}
        self.requests: list[str] = []
        self.commits: list[tuple[str, str, str, list[str]]] = []
        self.objects: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, name: str) -> set[str]:
        """The files of a repository that were fetched, not only asked after."""
        pattern = re.compile(rf"GET (?:/datasets)?/{name}/resolve/[^/]+/(.+)")
        return {match[1] for asked in self.requests if (match := pattern.fullmatch(asked))}

    def respond(self, method: str, target: str, token: str | None, body: bytes) -> Response:
        path = unquote(urlsplit(target).path)
        self.requests.append(f"{method} {path}")
        try:
            if token is not None and token not in self.users:
                raise Refused(401, "Invalid credentials in Authorization header")
            user = self.users.get(token or "")
            for methods, pattern, answer in ROUTES:
                if method in methods and (found := pattern.fullmatch(path)):
                    parts = found.groupdict()
                    return answer(self.repository(user, **parts), parts)
            for known, pattern, write in WRITES:
                if method == known and (found := pattern.fullmatch(path)):
                    return write(self, user, found.groupdict(), body)
        except (NotFound, Refused) as error:
            return error.response
        return Response(status=404)

    def repository(
        self, user: str | None, kind: str | None, id: str, revision: str | None, **_: str | None
    ) -> Repository:
        repository = self.repositories[kind or "models"].get(id)
        if repository is None or (repository.private and user != id.partition("/")[0]):
            raise NotFound("RepoNotFound")
        if revision in (None, "main", repository.commit):
            return repository
        if revision not in repository.branches:
            raise NotFound("RevisionNotFound")
        return repository.branches[revision]

    def to_write(self, user: str | None, id: str, revision: str = "main") -> Repository:
        """A model's branch, for one who may write to it."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != id.partition("/")[0]:
            raise Refused(403, f"You don't have the rights to write to {id}")
        return self.repository(user, "models", id, revision)


Parts = dict[str, Any]


def _file(repository: Repository, parts: Parts) -> Response:
    headers = {"X-Repo-Commit": repository.commit}
    content = repository.files().get(parts["path"])
    if content is None:
        raise NotFound("EntryNotFound", **headers)
    return Response(content, headers={**headers, "ETag": f'"{git_hash(content)}"'})


def _info(repository: Repository, parts: Parts) -> Response:
    siblings = [{"rfilename": name} for name in repository.files()]
    told = {"id": parts["id"], "sha": repository.commit, "private": repository.private}
    return _json({**told, "siblings": siblings})


def _tree(repository: Repository, parts: Parts) -> Response:
    """The files and folders in a folder, without those further below."""
    entries, under = repository.entries(), parts["path"]
    if under is not None and under not in entries:
        raise NotFound("EntryNotFound")
    wanted = "." if under is None else under
    return _json([entry for name, entry in entries.items() if str(Path(name).parent) == wanted])


def _json(value: Any, status: int = 200) -> Response:
    headers = {"Content-Type": "application/json"}
    return Response(json.dumps(value).encode(), status, headers)


def _create(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    asked = json.loads(body)
    id = f"{asked['organization'] or user}/{asked['name']}"
    models, url = hub.repositories["models"], {"url": f"{hub.url}/{id}"}
    if user is None:
        raise Refused(401, "Invalid username or password.")
    if user != id.partition("/")[0]:
        raise Refused(403, f"You don't have the rights to create a model under {id}")
    if id in models:
        return _json({**url, "error": "You already created this model repo"}, 409)
    assert hub.root is not None
    folder = hub.root / id
    folder.mkdir(parents=True)
    models[id] = Repository(folder, asked.get("visibility") == "private")
    return _json(url)


def _branch(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    repository, name = hub.to_write(user, parts["id"]), parts["revision"]
    if name in repository.branches or name == "main":
        return _json({"error": "Reference already exists"}, 409)
    folder = repository.folder.with_name(f"{repository.folder.name}@{name.replace('/', '-')}")
    shutil.copytree(repository.folder, folder)
    repository.branches[name] = Repository(folder)
    return _json({})


def _preupload(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    hub.to_write(user, parts["id"], parts["revision"])
    paths = [file["path"] for file in json.loads(body)["files"]]
    modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
    files = [
        {"path": path, "uploadMode": mode, "shouldIgnore": False}
        for path, mode in zip(paths, modes)
    ]
    return _json({"files": files})


def _batch(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    hub.to_write(user, parts["id"])
    asked = [(wanted["oid"], wanted["size"]) for wanted in json.loads(body)["objects"]]
    objects = [
        {"oid": oid, "size": size, "actions": {"upload": {"href": f"{hub.url}/lfs/{oid}"}}}
        for oid, size in asked
    ]
    return _json({"transfer": "basic", "objects": objects})


def _put(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    if hashlib.sha256(body).hexdigest() != parts["oid"]:
        raise Refused(400, "this is not the announced content")
    hub.objects[parts["oid"]] = body
    return Response()


def _commit(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    repository = hub.to_write(user, parts["id"], parts["revision"])
    header, *operations = map(json.loads, body.splitlines())
    contents = {}
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            contents[value["path"]] = base64.b64decode(value["content"])
        else:
            assert operation["key"] == "lfsFile"
            contents[value["path"]] = hub.objects[value["oid"]]
    for name, content in contents.items():
        (repository.folder / name).write_bytes(content)
    names, message = sorted(contents), header["value"]["summary"]
    hub.commits.append((parts["id"], parts["revision"], message, names))
    url = f"{hub.url}/{parts['id']}/commit/{repository.commit}"
    return _json({"commitUrl": url, "commitOid": repository.commit})


def _validate(hub: Hub, user: str | None, parts: Parts, body: bytes) -> Response:
    errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
    return _json({"errors": errors, "warnings": []}, 400 if errors else 200)


def metadata_errors(card: str) -> list[str]:
    """What the Hub has against the YAML of a model card (its specification of model cards)."""
    try:
        _, front, _ = card.split("---\n", 2)
        data = yaml.safe_load(front)
    except (ValueError, yaml.YAMLError) as error:
        return [f"no YAML metadata: {error}"]
    id = re.compile(r"[\w.-]+(/[\w.-]+)?")
    errors = [
        f"{name} must be {what}"
        for name, what, right in (
            ("library_name", "a string", lambda v: isinstance(v, str)),
            ("pipeline_tag", "a task", lambda v: v in ("text-generation", "text-classification")),
            ("tags", "strings", lambda v: all(isinstance(tag, str) for tag in v)),
            ("metrics", "strings", lambda v: all(isinstance(metric, str) for metric in v)),
            ("base_model", "an id", lambda v: "/" in v and id.fullmatch(v)),
            ("datasets", "ids", lambda v: all(id.fullmatch(name) for name in v)),
        )
        if name in data and not right(data[name])
    ]
    for model in data.get("model-index", []):
        if not isinstance(model["name"], str) or not model["name"]:
            errors.append("model-index[0].name must be a string")
        for result in model["results"]:
            named = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
            values = [metric["value"] for metric in result["metrics"]]
            named += [metric["type"] for metric in result["metrics"]]
            if not all(isinstance(name, str) and name for name in named):
                errors.append("model-index[0].results: types and names must be strings")
            if not values or not all(isinstance(value, float | int) for value in values):
                errors.append("model-index[0].results: values must be numbers")
    return errors


READ = ("GET", "HEAD")
ID = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"

#: Methods, paths and who answers what is read, and what is written.
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Callable[[Repository, Parts], Response]]] = [
    (
        READ,
        re.compile(rf"/(?:(?P<kind>datasets)/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
        _file,
    ),
    (READ, re.compile(rf"{API}(?:/revision/(?P<revision>.+))?"), _info),
    (READ, re.compile(rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"), _tree),
]


MODEL = rf"/api/models/{ID}"
WRITES: list[tuple[str, re.Pattern[str], Callable[[Hub, str | None, Parts, bytes], Response]]] = [
    ("POST", re.compile("/api/repos/create"), _create),
    ("POST", re.compile("/api/validate-yaml"), _validate),
    ("POST", re.compile(rf"{MODEL}/branch/(?P<revision>.+)"), _branch),
    ("POST", re.compile(rf"{MODEL}/preupload/(?P<revision>.+)"), _preupload),
    ("POST", re.compile(rf"{MODEL}/commit/(?P<revision>.+)"), _commit),
    ("POST", re.compile(rf"/{ID}\.git/info/lfs/objects/batch"), _batch),
    ("PUT", re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})"), _put),
]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
            response = hub.respond(self.command, self.path, token, self.body())
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.content)

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: object) -> None:
            """Not on stderr; `Hub.requests` has them."""

    return Handler
