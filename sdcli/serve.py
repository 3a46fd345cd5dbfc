"""STORY: a process that keeps a model loaded, and draws what `generate` would, in its place."""

from __future__ import annotations

import gc
import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdcli import generate, layout, store
from sdcli.checks import parse_idle
from sdcli.errors import SdcliWarning, explained
from sdcli.events import ImageRecord, Progress
from sdcli.files import output_error
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.device import give_back, pick_device, pick_dtype
from sdcli.pipeline.offload import is_at_hand
from sdcli.plan import plan
from sdcli.specs import GenerateSpec, ServeSpec
from sdcli.warm.messages import Line, LineEnded, valued

REQUEST_SECONDS = 5.0  # in which one whose turn it is says what he wants
NO_DESCRIPTOR_SECONDS = 1.0  # until another try where the system has none for a connection
WAITING_MOST = 128  # connections that the system keeps until they are greeted


@dataclass(frozen=True)
class Ready:
    """The model is loaded, and who asks is heard."""

    socket: Path
    model: str


@dataclass(frozen=True)
class Served:
    """One request: the pictures drawn of it, how long it took, and how it ended.

    exit_code: of the client; None where it has gone, or draws by itself.
    """

    images: int
    seconds: float
    exit_code: int | None


def run(spec: ServeSpec, path: Path, who: Mapping[str, str]) -> Iterator[Ready | Served]:
    """Draw for whoever asks, one after the other, until nobody has for the idle time.

    path: of the socket, in a folder that this process owns. who: what this process is, for clients to compare.
    Raises what loading the model does, OutputError when there can be no socket at that path.
    """
    model = store.resolve(spec.model, offline=spec.offline)
    device, kept = pick_device(spec.device), Kept()
    kept.load(model.folder, device=device, dtype=pick_dtype(spec.dtype, device), is_lean=True)
    seed = torch.initial_seed()  # of the global generators in a process that has drawn nothing
    # Listening last: an exception that a signal raises while the collector calls back is lost.
    with _outside_all_folders(), _loaded_once(), _listening(path) as listener:
        desk = Desk(listener, who)
        yield Ready(path, model.ref)
        while (turn := desk.next(parse_idle(spec.idle))) is not None:
            line, request = turn
            with line:
                served = _served(line, request, kept, desk, seed)
            desk.rests()
            yield served
            give_back()


class Unseen(Exception):
    """The folder of the client is no folder to this process, or another."""


class Kept:
    """The one model that is kept: the last that was drawn with, as its files were then."""

    def __init__(self) -> None:
        self._bundle: ModelBundle | None = None
        self._state: object = None

    def load(self, folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool) -> ModelBundle:
        """The model in a folder, read again when a file of it has changed; errors as `load_bundle`."""
        state = (folder.resolve(), device, dtype, is_lean, _files(folder))
        if self._bundle is None or self._state != state or not is_at_hand(self._bundle):
            self._bundle = None  # before the next is there: memory is for one
            self._bundle = load_bundle(folder, device=device, dtype=dtype, is_lean=is_lean)
            self._state = state
        return self._bundle


class Desk:
    """Greets whoever connects, at once and in a thread of its own, and has them wait for their turn."""

    def __init__(self, listener: socket.socket, who: Mapping[str, str]) -> None:
        self._listener, self._who = listener, who
        self._waiting: queue.Queue[Line] = queue.Queue()
        self._moved: float | None = None  # when the drawing went on last; None while nobody is served
        threading.Thread(target=self._greet, daemon=True).start()

    def next(self, idle_seconds: float | None) -> tuple[Line, dict[str, Any]] | None:
        """Whose turn it is, and what he wants; None when nobody has wanted anything for some time."""
        end = time.monotonic() + idle_seconds if idle_seconds is not None else None
        while True:
            self.rests()
            try:
                line = self._waiting.get(timeout=max(0.0, end - time.monotonic()) if end is not None else None)
            except queue.Empty:
                return None
            self.goes_on()
            try:
                line.send({"turn": True})
                return line, line.receive(REQUEST_SECONDS)[0]
            except LineEnded:  # who has gone came to look, or has not waited
                line.close()

    def rests(self) -> None:
        """Nobody is served."""
        self._moved = None

    def goes_on(self) -> None:
        """Somebody is served, and it has just made a step."""
        self._moved = time.monotonic()

    def _greet(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                line = Line(self._listener.accept()[0])
            except OSError:  # closed, or no descriptor free
                time.sleep(NO_DESCRIPTOR_SECONDS)
                continue
            try:
                if line.is_of_this_user():
                    moved = self._moved
                    still = time.monotonic() - moved if moved is not None else 0.0
                    line.send({"identity": dict(self._who), "still_seconds": still})
                    self._waiting.put(line)
                    continue
            except (OSError, LineEnded):
                pass
            line.close()


def _served(line: Line, request: Mapping[str, Any], kept: Kept, desk: Desk, seed: int) -> Served:
    """Draw what one client asks for, telling it every event, every warning and how it ended."""
    began, images = time.monotonic(), 0
    exit_code: int | None = 0
    caught: list[warnings.WarningMessage] = []
    try:
        try:
            with _in_place_of(request), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", SdcliWarning)
                torch.manual_seed(seed)  # whatever asks the global generators hears what it would in a fresh process
                for count in _drawn(line, request, kept, caught):
                    images += count
                    desk.goes_on()
            _tell_warnings(line, caught)
            line.send({"done": True})
        except LineEnded:
            raise
        except Unseen:
            line.send({"refusal": "the warm process does not see this folder"})
            exit_code = None
        except Exception as problem:  # noqa: BLE001 - the client is told as its own last resort would tell
            error = explained(problem)
            exit_code = int(error.exit_code)
            _tell_warnings(line, caught)
            line.send({"error": type(error).__name__, "text": error.message, "hint": error.hint})
    except LineEnded:
        exit_code = None
    return Served(images, time.monotonic() - began, exit_code)


def _drawn(line: Line, request: Mapping[str, Any], kept: Kept, caught: list[warnings.WarningMessage]) -> Iterator[int]:
    """Draw, telling of each event; how many pictures each is. Raises LineEnded as soon as the client has gone."""
    spec = GenerateSpec(**{name: valued(value) for name, value in request["spec"].items()})
    decided = plan(spec)
    caught.clear()  # of what is decided the client has warned: it has decided the same
    todo, first = len(decided.targets), 0
    for event in generate.run(spec, decided, kept.load):
        _tell_warnings(line, caught)
        if isinstance(event, Progress):
            # One step of each image that is drawn, and then written, with the first.
            first = min(first or event.done, event.done)
            is_unwritten = spec.save_steps is None and event.done * todo < first * event.total
            line.send({"progress": [event.done, event.total], "is_unwritten": is_unwritten})
            yield 0
        else:
            _tell_record(line, event)
            todo -= event.facts.get("skipped", False)
            yield int("prompt" in event.facts)  # and no sheet or frame, nor one that was there before
        if not line.is_silent():
            raise LineEnded("nothing is to be heard now but the end")


def _tell_record(line: Line, event: ImageRecord) -> None:
    """Tell of a picture, and wait until it is taken: what comes after may depend on it, as on a full disk."""
    path = str(event.path) if event.path is not None else None
    line.send({"record": dict(event.facts), "path": path}, event.data or b"")
    line.receive()


def _tell_warnings(line: Line, caught: list[warnings.WarningMessage]) -> None:
    told: Sequence[warnings.WarningMessage] = tuple(caught)
    caught.clear()
    for one in told:
        line.send({"warning": str(one.message), "file": one.filename, "line": one.lineno})


@contextmanager
def _in_place_of(request: Mapping[str, Any]) -> Iterator[None]:
    """Be in the client's folder with the client's umask. Raises Unseen where there is another folder, or none."""
    umask = os.umask(request["umask"])
    try:
        try:
            os.chdir(request["folder"])
            status = Path().stat()
        except OSError as error:
            raise Unseen from error
        if [status.st_dev, status.st_ino] != request["folder_file"]:
            raise Unseen
        yield
    finally:
        os.umask(umask)
        os.chdir("/")


@contextmanager
def _outside_all_folders() -> Iterator[None]:
    """Be in no folder that somebody may want to remove or unmount."""
    before = Path.cwd()
    os.chdir("/")
    try:
        yield
    finally:
        with suppress(OSError):
            os.chdir(before)


@contextmanager
def _loaded_once() -> Iterator[None]:
    """Spare the garbage collector what stays as long as this process: a look through all of torch takes 0.2 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket at a path, which is there from the moment that it listens and that only its user may open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        new = path.with_suffix(".new")
        umask = os.umask(0o177)
        try:
            new.unlink(missing_ok=True)
            listener.bind(os.fspath(new))
            listener.listen(WAITING_MOST)
            new.replace(path)
        except OSError as error:  # a path of over 107 bytes, for one
            raise output_error(path, error) from error
        finally:
            os.umask(umask)
        try:
            yield listener
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # which ends the waiting for the next one


def _files(folder: Path) -> tuple[object, ...]:
    """Every file that a model is read from, with its size and times."""
    beside = folder.with_suffix(".yaml")  # of a single file: it may say what the UNet predicts
    places = [folder, *(folder / name for name in (*layout.PARTS, "tokenizer", "scheduler"))]
    found = []
    inside = [path for place in places if place.is_dir() for path in place.iterdir()]
    for path in sorted(inside) if folder.is_dir() else (folder, beside):
        if path.is_file():
            status = path.stat()
            found.append((path, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)
