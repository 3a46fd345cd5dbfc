"""Device and dtype: what is named is taken or refused, and `auto` fits the machine."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from pathlib import Path

import pytest
import torch

from sdcli.errors import ExitCode, ResourceError, UsageError
from sdcli.pipeline.device import M_TRIM_THRESHOLD, MALLOC_SETTINGS, Peak, pick_device, pick_dtype, synchronize, trim

HAS_CUDA = torch.cuda.is_available()


def test_cpu_is_always_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(HAS_CUDA or torch.backends.mps.is_available(), reason="there is something better here")
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.gpu
def test_auto_is_the_gpu_where_there_is_one_and_cpu_stays_the_cpu() -> None:
    assert pick_device("auto").type == "cuda"
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == "cuda"
    assert pick_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["", "warp", "CPU", "cuda:x", "cuda:-1", "cuda:0:1", " cpu"])
def test_a_name_that_is_none_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="use auto, cpu, cuda, cuda:N or mps") as caught:
        pick_device(name)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("name", ["cuda:99", "meta", "xpu"] + ([] if HAS_CUDA else ["cuda", "cuda:0"]))
def test_a_device_this_machine_lacks_is_a_resource_error(name: str) -> None:
    with pytest.raises(ResourceError, match=f"--device {name}: this machine has no such device") as caught:
        pick_device(name)
    assert caught.value.exit_code == ExitCode.RESOURCES


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("auto", "mps", torch.float32),
        ("float16", "cpu", torch.float16),
        ("bfloat16", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_dtype_is_the_one_named_else_the_devices_own(name: str, device: str, dtype: torch.dtype) -> None:
    assert pick_dtype(name, torch.device(device)) == dtype


def test_the_peak_of_memory_is_that_of_the_moments_looked_at() -> None:
    cpu = pick_device("cpu")
    with Peak(cpu) as idle:
        pass
    with Peak(cpu) as busy:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        synchronize(cpu)
        busy.look()
        del held
    assert (idle.kind, busy.kind) == ("rss growth", "rss growth")
    assert idle.bytes is not None and busy.bytes is not None
    assert busy.bytes >= idle.bytes + (60 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_the_growth_of_memory_is_the_same_whatever_the_process_did_before() -> None:
    def peak() -> int:
        with Peak(pick_device("cpu")) as found:
            held = [torch.ones(100_000, dtype=torch.uint8) for _ in range(400)]  # small enough for malloc to keep
            found.look()
            del held
        assert found.bytes is not None
        return found.bytes

    first = peak()
    before = [torch.ones(100_000, dtype=torch.uint8) for _ in range(800)]
    del before
    assert first > 30 << 20 and peak() == pytest.approx(first, abs=8 << 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library keeps what is free in its own way")
def test_memory_that_a_step_frees_stays_until_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    pick_device("cpu")
    assert trim()
    before = resident()
    held = [torch.ones(24 << 20, dtype=torch.uint8) for _ in range(5)]
    del held
    assert resident() > before + (90 << 20)
    assert trim()
    assert resident() < before + (30 << 20)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_how_memory_is_kept_is_left_to_the_environment_that_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(ctypes, "CDLL", asked.append)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    pick_device("cpu")
    assert asked == []


@pytest.mark.parametrize(("taken", "asked"), [((), 2), ((32 << 20,), 3), ((128 << 20, 32 << 20), 2)])
def test_an_old_glibc_is_asked_for_what_it_takes_or_for_nothing(
    monkeypatch: pytest.MonkeyPatch, taken: tuple[int, ...], asked: int
) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, option: int, value: int) -> int:
            calls.append((option, value))
            return int(value in taken)

    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    pick_device("cpu")
    assert len(calls) == asked
    assert [option for option, _ in calls].count(M_TRIM_THRESHOLD) == bool(taken)


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_what_torch_had_allocated() -> None:
    cuda = pick_device("cuda")
    with Peak(cuda) as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8, device=cuda)
        synchronize(cuda)
        del held
    assert peak.kind == "cuda"
    assert peak.bytes >= 64 << 20
