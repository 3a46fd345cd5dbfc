"""Work in processes of their own, forked from one that has paid for the imports of torch and diffusers once.

As a script it is that server: a line of JSON in, a process forked, worked, buried, a line of JSON out.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM_UP = (
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "pydantic.type_adapter",
    "sdcli.cli.app",
    "sdcli.cli.train_embedding",
    "sdcli.cli.train_unet",
    "sdcli.cli.train_vae",
    "peft",
    "sdcli.training.embedding",
    "sdcli.training.unet",
    "sdcli.training.vae",
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
RUN_COMMAND = "import sys; from sdcli.cli import app; sys.exit(app.run(arguments))"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (below 0: the signal that killed it), words, and writes to the file system."""

    code: int
    stdout: str
    stderr: str
    writes: int


class Forks:
    """The client side: one server process for a whole test session.

    warm_up: what it imports before the first fork; environment: what it and its forks have besides our own.
    """

    def __init__(self, warm_up: Sequence[str] = WARM_UP, environment: Mapping[str, str] | None = None) -> None:
        search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment |= environment if environment is not None else {}
        command = [sys.executable, __file__, *warm_up]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )

    def sdcli(self, *arguments: object, **how: Any) -> Ended:
        """One sdcli command, as the shell would run it."""
        return self.python(RUN_COMMAND, [str(a) for a in arguments], **how)

    def python(
        self,
        code: str,
        arguments: Sequence[str] = (),
        *,
        at: int = 0,
        send: int = 0,
        file_limit: int = 0,
        in_all_threads: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Python code that finds `arguments`; before its `at`-th write to the file system (from 1) it gets a signal.

        file_limit: bytes that no file may exceed, as on a full disk; 0 sets none.
        in_all_threads: whether the writes of other threads than the first are counted, too.
        environment: variables of this process alone.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"code": code, "arguments": list(arguments), "at": at, "send": send, "file_limit": file_limit}
        request |= {"in_all_threads": in_all_threads, "environment": dict(environment or {})}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)


def serve() -> None:
    """Answer requests until stdin closes."""
    for name in sys.argv[1:]:
        __import__(name)
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


def _fork(request: dict[str, Any]) -> dict[str, Any]:
    pipes = [os.pipe() for _ in range(3)]  # no files, which a file limit would cut
    pid = os.fork()
    if pid == 0:
        try:
            code = _work(request, [writer for _, writer in pipes])
        finally:
            os._exit(code)
    heard = []
    for reader, writer in pipes:
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            heard.append(stream.read())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"code": code, "stdout": heard[0].decode(), "stderr": heard[1].decode(), "writes": len(heard[2])}


def _work(request: dict[str, Any], writers: Sequence[int]) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(writers[0], 1)
    os.dup2(writers[1], 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ignored in what nohup or a script's `&` began
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(request["environment"])
    _watch_writes(writers[2], request["at"], request["send"], in_all_threads=request["in_all_threads"])
    if request["file_limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    try:
        exec(request["code"], {"arguments": request["arguments"]})
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - whatever it is, the test that sent the work is told
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _watch_writes(tally: int, at: int, send: int, *, in_all_threads: bool) -> None:
    """Tell a byte for every call that changes the file system, of the first thread or all; send a signal before one."""
    main, writes = threading.get_ident(), 0

    def count() -> None:
        nonlocal writes
        if in_all_threads or threading.get_ident() == main:
            writes += 1
            os.write(tally, b".")
            if writes == at:
                os.kill(os.getpid(), send)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opens_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens_to_write or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link"):
            count()

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(audit)


if __name__ == "__main__":
    serve()
