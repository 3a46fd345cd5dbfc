"""Device and dtype: what is named is taken or refused, and `auto` fits the machine."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from sdcli.errors import ExitCode, ResourceError, UsageError
from sdcli.pipeline.device import Peak, pick_device, pick_dtype, synchronize, trim

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
def test_memory_that_a_step_frees_is_there_for_the_next_until_it_is_given_back() -> None:
    import resource  # which not every system has

    def pages_asked_for() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(64 << 20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pick_device("cpu")
    asked = [pages_asked_for() for _ in range(20)]
    assert asked[-1] < 1000, asked  # blocks that do not fit where the one before was end up somewhere
    assert trim()
    assert pages_asked_for() > 10_000


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_what_torch_had_allocated() -> None:
    cuda = pick_device("cuda")
    with Peak(cuda) as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8, device=cuda)
        synchronize(cuda)
        del held
    assert peak.kind == "cuda"
    assert peak.bytes >= 64 << 20
