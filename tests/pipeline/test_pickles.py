"""Files of torch.save are read without running anything, and whatever is wrong with one is told in one line."""

from __future__ import annotations

import io
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdcli import jail
from sdcli.errors import InputError, ResourceError, SdcliError
from sdcli.pipeline import pickles
from sdcli.pipeline.pickles import parse, read_pickle

LAYOUTS = (True, False)  # a zip archive, as torch writes since 1.6, and what it wrote before


def saved(value: object, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def archive(program: bytes, *, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> bytes:
    """A zip archive as torch.save writes it, around a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, data in {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **(more or {})}.items():
            target.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def call(name: str, argument: bytes) -> bytes:
    """A pickle that calls a function with one argument."""
    module, _, function = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + argument + b"\x85R."


def parsed(data: bytes) -> Any:
    return parse(io.BytesIO(data), len(data))


def flat(value: Any) -> list[Any]:
    """The leaves of a value, tensors as lists of numbers."""
    if isinstance(value, dict):
        return [leaf for key, one in value.items() for leaf in (key, *flat(one))]
    if isinstance(value, list):
        return [leaf for one in value for leaf in flat(one)]
    return [(value.dtype, value.tolist())] if isinstance(value, torch.Tensor) else [value]


VALUE: dict[Any, Any] = {
    "string_to_token": {"*": 265},
    "tensors": [torch.arange(6.0).reshape(2, 3).t(), torch.zeros(0, 3), torch.tensor(3), torch.arange(9)[4:6]],
    "types": [torch.tensor([1, 0]).to(one) for one in pickles.DTYPES],
    "parameter": nn.Parameter(torch.ones(2)),
    "ordered": OrderedDict(a=None, b=True),
    3: (1, -(2**70), 2.5, "小\ud800\n"),
}


def test_all_that_is_data_comes_back_from_the_child(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(VALUE))
    value = read_pickle(tmp_path / "a.pt")
    assert isinstance(value, dict)
    assert flat(value) == flat({**VALUE, "ordered": {"a": None, "b": True}, 3: list(VALUE[3])})
    (tmp_path / "a.pt").unlink()
    assert flat(value["tensors"])[0] == (torch.float32, [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_zip", LAYOUTS)
def test_both_layouts_of_torch_are_read(is_zip: bool) -> None:
    value = {**VALUE, "types": []} if not is_zip else VALUE  # what was before knows no numbers of eight bits
    assert flat(parsed(saved(value, is_zip=is_zip))) == flat({**value, 3: list(VALUE[3])})


def test_a_parameter_dict_is_a_dict_of_what_it_held() -> None:
    held = parsed(saved(nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 3))})))
    assert torch.equal(held["_parameters"]["*"], torch.ones(2, 3))
    assert held["training"] is True


# Code.


def test_code_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "was-here"
    (tmp_path / "evil.pt").write_bytes(archive(call("os.system", text(f"touch {target}"))))
    with pytest.raises(InputError, match=r"evil\.pt: holds os\.system, which is code and was not run; get the same"):
        read_pickle(tmp_path / "evil.pt")
    assert not target.exists()


class Evil:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("is_zip", LAYOUTS)
def test_code_is_not_run_by_the_parser_either(tmp_path: Path, is_zip: bool) -> None:
    target = tmp_path / "was-here"
    data = saved({"a": [Evil(target)]}, is_zip=is_zip)
    with pytest.raises(InputError, match="which is code and was not run"):
        parsed(data)
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.exists()  # it would have


@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "subprocess.Popen",
        "importlib.import_module",
        "torch.hub.load",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "sdcli.errors.SdcliError",
        "x" * 500 + ".y",
    ],
)
def test_every_name_that_is_not_data_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(archive(call(name, text("x"))))
    assert f"holds {name[:100]}, which is code" in str(caught.value).replace("numpy._core", "numpy.core")
    assert len(str(caught.value)) < 300


def test_a_pickle_that_torch_did_not_write_is_refused_unread(tmp_path: Path) -> None:
    for data in (b"", b"\x80", pickle.dumps(Evil(tmp_path / "was-here")), b"PK\x05\x06" + bytes(18), b"{}"):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(InputError, match=r"a\.pt: was not written by torch\.save"):
            read_pickle(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# Other things that are no data.


LOOP: list[Any] = []
LOOP.append(LOOP)


def laughs() -> list[Any]:
    """2^40 lists, in the memory of forty."""
    inner: list[Any] = []
    for _ in range(40):
        inner = [inner, inner]
    return inner


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(1).expand(100_000, 100_000), "a tensor of 40,000,000,000 bytes, more than it can hold"),
        ([torch.zeros(1 << 20)[:]] * 100, "a tensor of 4,194,304 bytes, more than it can hold"),
        (torch.zeros(4).to_sparse(), "holds a tensor of kind torch.sparse_coo"),
        (torch.zeros(4, device="meta"), "on meta; only dense tensors"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
        (["x" * (1 << 20)] * 17, "holds more text than it has bytes for"),
        ({"x": 1 << 1025}, "holds an integer beyond all sense"),
        ({1 << 1025: 0}, "has a key that is a int"),
        (LOOP, "nested too deeply, or holds too many values"),
        (laughs(), "nested too deeply, or holds too many values"),
        (torch.float32, "holds a dtype, which is neither number, text nor tensor"),
        ({"a": b"bytes"}, "holds a bytes"),
        ({(1, 2): 3}, "has a key that is a tuple"),
    ],
)
def test_what_is_no_data_is_refused(value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        parsed(saved(value))


def test_tied_weights_are_read() -> None:
    tensor = torch.ones(1 << 20)
    value = parsed(saved({"a": tensor, "b": tensor, "c": tensor.reshape(1024, 1024)}))
    assert torch.equal(value["c"].reshape(-1), value["b"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (saved(VALUE)[:-100], "is no whole zip archive"),
        (archive(pickle.dumps(1, 2), compression=zipfile.ZIP_DEFLATED), "archive/data.pkl in it is compressed"),
        (archive(bytes((16 << 20) + 1)), "archive/data.pkl in it has 16,777,217 bytes"),
        (archive(b"\x80\x02."), "cannot be read"),
        (archive(b""), "cannot be read"),
        (archive(pickle.dumps(1, 2), more={"constants.pkl": b""}), "cannot be read"),
    ],
)
def test_an_archive_that_torch_did_not_write_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parsed(data)


def test_an_archive_with_two_files_of_one_name_is_refused() -> None:
    buffer = io.BytesIO(archive(pickle.dumps(1, 2)))
    with zipfile.ZipFile(buffer, "a") as target, pytest.warns(UserWarning, match="Duplicate"):
        target.writestr("archive/data.pkl", pickle.dumps(2, 2))
    with pytest.raises(InputError, match="two with one name"):
        parsed(buffer.getvalue())


def test_an_archive_that_says_it_is_larger_than_the_file_is_refused() -> None:
    data = archive(pickle.dumps(1, 2), more={"data/0": bytes(1000)})
    grown = data.replace(struct.pack("<II", 1000, 1000), struct.pack("<II", 1 << 30, 1 << 30))
    assert grown != data
    with pytest.raises(InputError, match="says that it holds more than it has"):
        parsed(grown)


@pytest.mark.parametrize("kind", ["zip", "legacy", "program"])
def test_a_file_spoiled_anywhere_is_read_or_refused(kind: str) -> None:
    """A program: the pickle inside an archive is spoiled, and no checksum of the archive tells."""
    value = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 3)}, "name": "cat", 1: (2, None)}
    whole = saved(value, is_zip=kind != "legacy")
    with zipfile.ZipFile(io.BytesIO(saved(value))) as source:
        parts = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    chance, refused = random.Random(7), list[str]()
    for _ in range(400):
        data = bytearray(parts["data.pkl"] if kind == "program" else whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 46, 82, 255, chance.randrange(256)))
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        spoiled = archive(bytes(data), more=parts | {"data.pkl": bytes(data)}) if kind == "program" else bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of another protocol
            try:
                parsed(spoiled)
            except InputError as error:
                refused.append(str(error))
    assert 0 < len(refused) < 400
    assert max(map(len, refused)) < 400


# The process that reads.


@pytest.mark.skipif(sys.platform != "linux", reason="where a process can be limited in memory")
def test_the_limits_leave_no_file_no_socket_no_program_and_no_more_memory(forks: Any, tmp_path: Path) -> None:
    two_gigabytes = b"\x8a\x05" + (2 << 30).to_bytes(5, "little")
    (tmp_path / "hungry.pt").write_bytes(archive(call("builtins.bytearray", two_gigabytes)))
    code = """
import os, resource, socket
from sdcli.pipeline import pickles
hungry = open(arguments[0], "rb")
pickles._warm_up()
pickles._limit(0)
for what in ("open('/etc/hostname')", "socket.socket()", "os.pipe()", "bytearray(1 << 30)"):
    try:
        eval(what)
        print(what, "works")
    except (OSError, MemoryError):
        pass
if os.system("exit 0") == 0:
    print("programs start")
assert len(bytearray(100 << 20)) == 100 << 20
try:
    pickles.parse(hungry, os.fstat(hungry.fileno()).st_size)
except pickles.InputError as error:
    print(error)
used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
assert resource.getrlimit(resource.RLIMIT_CPU)[0] - used <= pickles.SECONDS + 1
"""
    ended = forks.python(code, [str(tmp_path / "hungry.pt")])
    said = "needs more memory than a file of its size may; get the file again\n"
    assert (ended.code, ended.stdout) == (0, said)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (-signal.SIGXCPU, InputError, "reading it took too long"),
        (-signal.SIGSEGV, InputError, "reading it ended with signal 11"),
        (-signal.SIGKILL, ResourceError, "there is not the room to read it"),
        (jail.NO_ROOM, ResourceError, "there is not the room to read it"),
    ],
)
def test_the_end_of_the_child_is_told(code: int, kind: type[SdcliError], said: str) -> None:
    with pytest.raises(kind, match=f"a.pt: {said}"):
        jail.tell(Path("a.pt"), code, b"")


@pytest.mark.parametrize("words", [b"", b"{", b"[" * 100_000, b"5", b'{"what": 5}', b"\xff"])
def test_a_child_that_says_nothing_sensible_is_not_believed(words: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.pt: cannot be read; get the same as safetensors"):
        jail.tell(Path("a.pt"), jail.REFUSED, words)


@pytest.mark.skipif(sys.platform != "linux", reason="where a process can be told to end with its parent")
def test_the_child_dies_with_its_parent_and_the_next_run_clears_up(tmp_path: Path) -> None:
    """Killed in the middle of reading a file that takes it ten seconds and more."""
    slow, copies = tmp_path / "slow.ckpt", tmp_path / "copies"
    slow.write_bytes(archive(b"\x80\x02" + b"]0" * (7 << 20) + b"]."))
    code = "import sys; from pathlib import Path; from sdcli import jail; jail.as_safetensors(*map(Path, sys.argv[1:]))"
    parent = subprocess.Popen([sys.executable, "-c", code, slow, copies])
    child = wait_for(lambda: children(parent.pid))[0]
    wait_for(lambda: is_alive(child) and b"libtorch" in Path(f"/proc/{child}/maps").read_bytes())
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    wait_for(lambda: not is_alive(child), seconds=5)
    (part,) = copies.iterdir()
    os.utime(part, (1, 1))  # not of a process that is just about to write
    with pytest.raises(InputError):
        jail.as_safetensors(Path(__file__), copies)
    assert list(copies.iterdir()) == []


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no corpse that nobody has buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(ask: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return answer


@pytest.mark.parametrize("name", ["none.pt", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        read_pickle(tmp_path / name)


def test_a_file_over_the_size_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(saved(VALUE))
    with pytest.raises(InputError, match="at most 100 are accepted"):
        read_pickle(tmp_path / "a.pt", max_bytes=100)
