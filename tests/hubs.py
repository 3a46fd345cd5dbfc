"""A small Hub on loopback: what huggingface_hub asks of one, with switches for all that can go wrong."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

PATIENCE = 120  # seconds, of a busy machine
LARGE = (".safetensors", ".bin", ".ckpt")  # kept as LFS has them: by SHA-256, on another server
Bytes = int | Iterator[int]  # of every answer, or of one after the other
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
ABOUT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")


@dataclass
class Repo:
    """Commits, each with its files, and the branches and tags that mean them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # who has none is told that there is nothing
    is_gated: bool = False  # its files alone need the token


@dataclass
class Faults:
    """What the server does wrong, from now on."""

    breaks_after: dict[str, Bytes] = field(default_factory=dict)  # file -> bytes of each answer before it breaks off
    sends: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent of it
    ignores_ranges: bool = False
    about: Callable[[dict[str, Any]], Any] = lambda row: row  # what is told of a repository
    status: int = 0  # of every answer
    refusal_bytes: int = 0  # of what is said where something is refused
    waits: threading.Event | None = None  # before the second half of a large file is sent


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


class Hub:
    """Repositories, and the requests that came."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.sent_in_refusals = 0  # bytes
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], *refs: str) -> str:
        """A commit of these files, which branches and tags mean from now on; its hash."""
        content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())})
        commit = hashlib.sha1(f"{repo}{content}".encode()).hexdigest()
        there = self.repos.setdefault(repo, Repo())
        there.commits[commit] = dict(files)
        there.refs |= dict.fromkeys(refs or ("main",), commit)
        return commit

    def fetched(self) -> list[str]:
        """The files of which bytes were sent, in order."""
        return [one.path.rpartition("/")[2] for one in self.requests if one.method == "GET" and "/cdn/" in one.path]


def digest(name: str, data: bytes) -> str:
    """The hash by which the Hub knows a file, which is what the cache calls it."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def model_files(kind: str = "StableDiffusionPipeline", *, seed: int = 0) -> dict[str, bytes]:
    """The files of a repository with a model, as they are called there; what is in them is no model's."""
    chance = random.Random(seed)
    files = {"model_index.json": json.dumps({"_class_name": kind}).encode(), ".gitattributes": b"", "README.md": b"#"}
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        files[f"{part}/config.json"] = json.dumps({"part": part}).encode()
        files[f"{part}/{stem}.safetensors"] = chance.randbytes(50_000)
        files[f"{part}/{stem}.fp16.safetensors"] = chance.randbytes(25_000)
        files[f"{part}/{stem}.bin"] = chance.randbytes(50_000)
    files |= {f"tokenizer/{name}": name.encode() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    files |= {"scheduler/scheduler_config.json": b"{}", "unet/diffusion_pytorch_model.non_ema.safetensors": b"x" * 900}
    return files | {"safety_checker/config.json": b"{}", "safety_checker/model.safetensors": b"x" * 999}


def small_file(name: str = "input_blocks.0.0.weight", *, shape: tuple[int, ...] = (320, 4, 3, 3)) -> bytes:
    """A safetensors file with one tensor of zeros."""
    size = 2 * math.prod(shape)
    header: dict[str, Any] = {name: {"dtype": "F16", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at `requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name: self.headers.get(name) for name in ("Host", "Authorization", "Range")}
        hub = self.hub
        hub.requests.append(
            Request(self.command, path, str(headers["Host"]), headers["Authorization"], headers["Range"])
        )
        try:
            if hub.faults.status:
                self._refuse(hub.faults.status, "")
            elif match := ABOUT.fullmatch(path):
                self._tell(match["repo"], match["what"], unquote(match["revision"] or "main"))
            elif match := RESOLVE.fullmatch(path):
                self._resolve(match["repo"], match["revision"], match["name"])
            elif path.startswith("/cdn/"):
                _, _, owner, name, commit, file = path.split("/", 5)
                self._send(file, hub.repos[f"{owner}/{name}"].commits[commit][file], {})
            else:
                self._refuse(404, "")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None after it was told that there is none."""
        there = self.hub.repos.get(repo)
        if there is None or (there.token and not there.is_gated and not self._is_known(there)):
            self._refuse(401 if there is None or not self.headers.get("Authorization") else 404, "RepoNotFound")
            return None
        commit = there.refs.get(revision, revision)
        if commit not in there.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, there.commits[commit]

    def _is_known(self, repo: Repo) -> bool:
        return self.headers.get("Authorization") == f"Bearer {repo.token}"

    def _tell(self, repo: str, what: str | None, revision: str) -> None:
        found = self._found(repo, revision)
        if found is None:
            return
        commit, files = found
        if what == "tree":
            rows = [{"type": "file", "path": name, **_facts(name, data, "oid")} for name, data in files.items()]
            self._json(rows)
            return
        siblings = [{"rfilename": name, **_facts(name, data, "blobId")} for name, data in files.items()]
        row = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
        self._json(self.hub.faults.about(row))

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._found(repo, revision)
        if found is None:
            return
        commit, files = found
        there = self.hub.repos[repo]
        if there.is_gated and not self._is_known(there):
            self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif name not in files:
            self._refuse(404, "EntryNotFound")
        elif name.endswith(LARGE):
            # By another name of this machine, so that it is another server for all who compare.
            target = f"http://localhost:{self.hub.port}/cdn/{repo}/{commit}/{name}"
            linked = {"X-Linked-Etag": f'"{digest(name, files[name])}"', "X-Linked-Size": str(len(files[name]))}
            self._begin(302, {"Location": target, "X-Repo-Commit": commit, **linked, "Content-Length": "0"})
        else:
            self._send(name, files[name], {"X-Repo-Commit": commit})

    def _send(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        etag = f'"{digest(name, data)}"'
        data = faults.sends.get(name, data)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match and not faults.ignores_ranges else 0
        part = data[start:]
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        sizes = {"Content-Length": str(len(part)), "ETag": etag, "Accept-Ranges": "bytes"}
        self._begin(206 if start else 200, headers | ranged | sizes)
        if self.command == "HEAD":
            return
        if faults.waits is not None and name.endswith(LARGE):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            faults.waits.wait(PATIENCE)
            part = part[len(part) // 2 :]
        told = faults.breaks_after.get(name)
        ends = next(told) if isinstance(told, Iterator) else told
        self.wfile.write(part if ends is None else part[:ends])
        self.wfile.flush()
        if ends is not None:
            self.close_connection = True

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self._begin(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        size = self.hub.faults.refusal_bytes
        self._begin(status, {"Content-Length": str(size), **({"X-Error-Code": code} if code else {})})
        for _ in range(size >> 20):
            self.wfile.write(bytes(1 << 20))
            self.hub.sent_in_refusals += 1 << 20

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _facts(name: str, data: bytes, key: str) -> dict[str, Any]:
    """Size and hashes of a file, as the Hub tells them."""
    if not name.endswith(LARGE):
        return {"size": len(data), key: digest(name, data)}
    pointer = hashlib.sha1(data).hexdigest()
    return {
        "size": len(data),
        key: pointer,
        "lfs": {"sha256": digest(name, data), "oid": digest(name, data), "size": len(data), "pointerSize": 130},
    }
