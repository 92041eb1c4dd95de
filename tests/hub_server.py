"""A stand-in of the Hub for its real clients: repositories from folders, over local HTTP."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Repository:
    """A folder, read at every request, as a repository with one branch, `main`."""

    folder: Path

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


class Hub:
    """A server of model and data set repositories, in a `with` block.

    Attributes:
        requests: what clients asked for, as `METHOD /path`.
    """

    def __init__(
        self, models: Mapping[str, Path] | None = None, datasets: Mapping[str, Path] | None = None
    ) -> None:
        self.repositories = {
            "models": {name: Repository(folder) for name, folder in (models or {}).items()},
            "datasets": {name: Repository(folder) for name, folder in (datasets or {}).items()},
        }
        self.requests: list[str] = []
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

    def respond(self, method: str, target: str) -> Response:
        path = unquote(urlsplit(target).path)
        self.requests.append(f"{method} {path}")
        for methods, pattern, answer in ROUTES:
            if method in methods and (found := pattern.fullmatch(path)):
                parts = found.groupdict()
                try:
                    return answer(self._repository(**parts), parts)
                except NotFound as error:
                    return error.response
        return Response(status=404)

    def _repository(
        self, kind: str | None, id: str, revision: str | None, **_: str | None
    ) -> Repository:
        repository = self.repositories[kind or "models"].get(id)
        if repository is None:
            raise NotFound("RepoNotFound")
        if revision not in (None, "main", repository.commit):
            raise NotFound("RevisionNotFound")
        return repository


Parts = dict[str, Any]


def _file(repository: Repository, parts: Parts) -> Response:
    headers = {"X-Repo-Commit": repository.commit}
    content = repository.files().get(parts["path"])
    if content is None:
        raise NotFound("EntryNotFound", **headers)
    return Response(content, headers={**headers, "ETag": f'"{git_hash(content)}"'})


def _info(repository: Repository, parts: Parts) -> Response:
    siblings = [{"rfilename": name} for name in repository.files()]
    return _json({"id": parts["id"], "sha": repository.commit, "siblings": siblings})


def _tree(repository: Repository, parts: Parts) -> Response:
    """The files and folders in a folder, without those further below."""
    entries, under = repository.entries(), parts["path"]
    if under is not None and under not in entries:
        raise NotFound("EntryNotFound")
    wanted = "." if under is None else under
    return _json([entry for name, entry in entries.items() if str(Path(name).parent) == wanted])


def _json(value: Any) -> Response:
    return Response(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


READ = ("GET", "HEAD")
ID = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"

#: Methods, paths and who answers; uploads would be routes of other methods.
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Callable[[Repository, Parts], Response]]] = [
    (
        READ,
        re.compile(rf"/(?:(?P<kind>datasets)/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
        _file,
    ),
    (READ, re.compile(rf"{API}(?:/revision/(?P<revision>.+))?"), _info),
    (READ, re.compile(rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"), _tree),
]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            response = hub.respond(self.command, self.path)
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.content)

        do_GET = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:
            """Not on stderr; `Hub.requests` has them."""

    return Handler
