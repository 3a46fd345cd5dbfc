"""Where memory runs out the drawing goes on with less, one measure after the other, and the record tells which."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdcli import batch, generate
from sdcli.drawing.ladder import OFFLOADED, SLICED, TILED, Ladder, measures, of_denoising
from sdcli.errors import ResourceError, SdcliWarning
from sdcli.generate import ImageRecord
from sdcli.jobs.finish import Failed, Finished
from sdcli.jobs.plan import plan_batch
from sdcli.pipeline import offload, vae
from sdcli.pipeline.bundle import ModelBundle, TextEncoder, load_bundle
from sdcli.pipeline.metadata import picture_bytes, read_record
from sdcli.plan import plan
from sdcli.specs import BatchSpec, GenerateSpec

pytestmark = pytest.mark.filterwarnings("ignore:out of memory")
CPU = torch.device("cpu")
Limits = Callable[[ModelBundle], None]


def runs_out(most: int) -> Callable[[nn.Module, Any], None]:
    """A hook for a module: memory runs out for inputs of more numbers, as torch tells it."""

    def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return check


def limited(*, unet: int | None = None, decoder: int | None = None) -> Limits:
    """Let the parts of a model run out of memory above so many numbers of latents."""

    def limit(bundle: ModelBundle) -> None:
        for part, most in ((bundle.unet, unet), (bundle.vae.decoder, decoder)):
            if most is not None:
                part.register_forward_pre_hook(runs_out(most))

    return limit


def drawn(folder: Path, output: Path, limit: Limits | None = None, **how: Any) -> list[ImageRecord]:
    def load(place: Path, **kind: Any) -> ModelBundle:
        bundle = load_bundle(place, **kind)
        if limit is not None:
            limit(bundle)
        return bundle

    given = {"prompt": "a cat", "model": str(folder), "output": output, "steps": 2, "seed": 3, "device": "cpu"}
    spec = GenerateSpec(**{**given, **how})
    return [event for event in generate.run(spec, plan(spec), load) if isinstance(event, ImageRecord)]


def apart(some: list[ImageRecord], others: list[ImageRecord]) -> int:
    """The largest difference of a pixel, of 255."""
    pairs = zip(some, others, strict=True)
    pixels = [[np.asarray(Image.open(str(one.path)), dtype=np.int16) for one in pair] for pair in pairs]
    return max(int(abs(one - other).max()) for one, other in pixels)


ONE = 4 * 16 * 16  # numbers of one image's latents; the UNet is given them twice with guidance


def test_fewer_images_are_drawn_at_once(sd1: Path, tmp_path: Path) -> None:
    plain = drawn(sd1, tmp_path / "plain", count=5, batch_size=5)
    with pytest.warns(SdcliWarning, match="out of memory: going on with a batch of 2"):
        found = drawn(sd1, tmp_path / "less", limited(unet=4 * ONE), count=5, batch_size=5)
    assert apart(found, plain) <= 2
    assert [one.facts["seed"] for one in found] == [3, 4, 5, 6, 7]
    assert all("saved_memory" not in one.facts for one in found)  # which tells of no neighbours


def test_then_the_unet_works_on_one_row_after_the_other(sd1: Path, tmp_path: Path) -> None:
    plain = drawn(sd1, tmp_path / "plain", count=2)
    found = drawn(sd1, tmp_path / "less", limited(unet=ONE), count=2)
    assert apart(found, plain) <= 2
    assert found[1].facts["saved_memory"] == ["sliced"]
    record = read_record(Path(str(found[0].path)))
    assert record is not None and record["saved_memory"] == ["sliced"]


def test_then_the_vae_works_in_tiles(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "TILE", 8)
    monkeypatch.setattr(vae, "OVERLAP", 4)
    tiled = drawn(sd1, tmp_path / "tiled", tiling=True)
    found = drawn(sd1, tmp_path / "less", limited(decoder=4 * 8 * 8))
    assert apart(found, tiled) == 0
    assert (found[0].facts["saved_memory"], found[0].facts["evaluations"]) == (["tiled"], 2)
    assert found[0].facts["tiling"] is tiled[0].facts["tiling"] is True  # by which `replay` draws it again


@pytest.mark.slow
def test_pictures_that_do_not_fit_together_are_decoded_apart(sd1: Path, tmp_path: Path) -> None:
    plain = drawn(sd1, tmp_path / "plain", count=3)
    found = drawn(sd1, tmp_path / "less", limited(decoder=ONE), count=3)
    assert apart(found, plain) <= 2
    assert "saved_memory" not in found[0].facts


def test_at_last_the_parts_of_the_model_come_one_after_the_other(sd1: Path) -> None:
    """Of a model that is in main memory as it is; on a device it would come from there."""
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    settled: list[bool] = []
    ladder = Ladder(bundle, [OFFLOADED], settle=lambda: settled.append(True))
    latents = torch.ones(1, 4, 16, 16)
    expected = ladder.decoded(latents)
    assert ladder.relieve(1, (32, 32), of=[OFFLOADED]) and settled == [True]
    assert offload.is_offloaded(ladder.bundle)
    assert torch.equal(ladder.decoded(latents), expected)
    assert not ladder.relieve(1, (32, 32), of=[OFFLOADED])
    ladder.again(bundle)  # another model of the same run
    assert offload.is_offloaded(ladder.bundle)


def test_each_measure_is_offered_where_it_helps_and_changes_no_more_than_it_may(sd1: Path) -> None:
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    assert measures(bundle) == [SLICED, TILED]
    on_a_device = ModelBundle(**{**vars(bundle), "device": torch.device("cuda")})
    assert measures(on_a_device) == [SLICED, TILED, OFFLOADED]
    assert measures(on_a_device, is_exact=True) == [OFFLOADED]
    assert measures(ModelBundle(**{**vars(on_a_device), "vae": vae.tiled(bundle.vae)})) == [SLICED, OFFLOADED]
    assert measures(offload.placed(on_a_device, CPU, "model"), is_exact=True) == []


def test_where_nothing_helps_the_error_says_so_and_no_file_is_written(sd1: Path, tmp_path: Path) -> None:
    for limit in (limited(unet=0), limited(decoder=0)):
        with pytest.raises(ResourceError, match="out of memory"):
            drawn(sd1, tmp_path / "none", limit, count=2)
    with pytest.raises(ResourceError):
        drawn(sd1, tmp_path / "none", limited(unet=ONE), deterministic=True)
    assert not list((tmp_path / "none").glob("*"))


@pytest.mark.slow
def test_the_words_of_the_system_for_too_little_memory_count_and_other_faults_do_not(sd1: Path, tmp_path: Path) -> None:
    def told(problem: Exception) -> Limits:
        def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if len(inputs[0]) > 2:
                raise problem

        return lambda bundle: bundle.unet.register_forward_pre_hook(check) and None

    for problem in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")):
        found = drawn(sd1, tmp_path / type(problem).__name__, told(problem), count=2)
        assert len(found) == 2
    with pytest.raises(RuntimeError, match="a bug"):
        drawn(sd1, tmp_path / "bug", told(RuntimeError("a bug")), count=2)


@pytest.mark.slow
def test_the_frames_of_a_denoising_that_is_begun_again_are_written_once(sd1: Path, tmp_path: Path) -> None:
    calls = 0

    def third(_: nn.Module, inputs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError

    found = drawn(
        sd1,
        tmp_path / "out",
        lambda bundle: bundle.unet.register_forward_pre_hook(third) and None,
        steps=4,
        save_steps=tmp_path / "frames",
    )
    assert len(list((tmp_path / "frames").iterdir())) == 4
    assert found[-1].facts["saved_memory"] == ["sliced"]


def test_what_cannot_help_is_neither_tried_nor_told(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = Ladder(load_bundle(sd1, device=CPU, dtype=torch.float32), [SLICED, TILED])
    assert of_denoising(has_guidance=False, has_vae=False) == [OFFLOADED]
    assert of_denoising(has_guidance=True, has_vae=True) == [SLICED, TILED, OFFLOADED]
    assert not ladder.relieve(1, (32, 32), of=[TILED])  # one tile
    assert ladder.facts((32, 32)) == {}
    monkeypatch.setattr(vae, "TILE", 8)
    assert ladder.relieve(1, (32, 32), of=[TILED])
    assert ladder.facts((32, 32)) == {"saved_memory": ["tiled"], "tiling": True}
    assert ladder.facts((16, 16)) == {}


def test_a_measure_holds_for_what_is_as_large_and_is_taken_again_for_what_is_smaller(sd1: Path) -> None:
    ladder = Ladder(load_bundle(sd1, device=CPU, dtype=torch.float32), [SLICED])
    assert ladder.relieve(3, (32, 32), of=[SLICED])
    assert [ladder.together(9, size) for size in ((64, 64), (32, 32), (32, 16), (16, 16))] == [1, 2, 4, 8]
    assert ladder.relieve(1, (32, 32), of=[SLICED])
    assert ladder.bundle_for((40, 32)).is_sliced and not ladder.bundle_for((16, 32)).is_sliced
    assert not ladder.relieve(1, (40, 32), of=[SLICED])
    assert ladder.relieve(1, (16, 32), of=[SLICED])
    assert ladder.bundle_for((16, 32)).is_sliced


def test_memory_may_run_out_in_both_threads_at_once(sd1: Path) -> None:
    """That which denoises waits for that which decodes, where memory runs out, too, meanwhile."""
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    decodes, waits, told = threading.Event(), threading.Event(), []

    def settle() -> None:
        waits.set()
        decoding.join(5)
        told.append(decoding.is_alive())

    def run_out(_: nn.Module, inputs: object) -> None:
        decodes.set()
        waits.wait(5)
        raise torch.OutOfMemoryError

    def decode() -> None:
        with pytest.raises(ResourceError):
            ladder.decoded(torch.ones(1, 4, 16, 16), of=[TILED])

    bundle.vae.decoder.register_forward_pre_hook(run_out)
    ladder = Ladder(bundle, [OFFLOADED], settle=settle)
    decoding = threading.Thread(target=decode, daemon=True)
    decoding.start()
    assert decodes.wait(5)
    assert ladder.relieve(1, (32, 32), of=[SLICED, OFFLOADED]) and told == [False]


def test_once_the_model_is_offloaded_words_are_read_with_it(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where decoding runs out, and the prompts that follow are others."""
    read_by: list[bool] = []

    def limit(bundle: ModelBundle) -> None:
        def run_out(part: nn.Module, inputs: object) -> None:
            if not hasattr(part, "_hf_hook"):
                raise torch.OutOfMemoryError

        bundle.vae.decoder.register_forward_pre_hook(run_out)
        assert isinstance(bundle.conditioner, TextEncoder)
        bundle.conditioner.model.register_forward_pre_hook(lambda part, _: read_by.append(hasattr(part, "_hf_hook")))

    monkeypatch.setattr(generate, "measures", lambda bundle, **how: [OFFLOADED])
    found = drawn(sd1, tmp_path / "out", limit, prompt="a {cat|dog|cow|pig}", count=2, batch_size=1, steps=1)
    assert found[0].facts["prompt"] != found[1].facts["prompt"] and found[1].facts["saved_memory"] == ["offloaded"]
    assert not read_by[0] and read_by[-1]


def test_memory_that_runs_out_in_writing_draws_no_picture_twice(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def second(*given: Any) -> bytes:
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError
        return picture_bytes(*given)

    monkeypatch.setattr(generate, "picture_bytes", second)
    with pytest.raises(MemoryError):
        drawn(sd1, tmp_path / "out", count=2, steps=1)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_progress_never_goes_back(sd1: Path, tmp_path: Path) -> None:
    calls: list[None] = []

    def fourth(_: nn.Module, inputs: object) -> None:
        calls.append(None)
        if len(calls) == 4:
            raise torch.OutOfMemoryError

    def load(place: Path, **kind: Any) -> ModelBundle:
        bundle = load_bundle(place, **kind)
        bundle.unet.register_forward_pre_hook(fourth)
        return bundle

    spec = GenerateSpec(prompt="a cat", model=str(sd1), output=tmp_path, steps=4, seed=3, count=2, device="cpu")
    told = [event.done for event in generate.run(spec, plan(spec), load) if isinstance(event, generate.Progress)]
    assert told == sorted(told) and told[-1] == 8


def test_in_a_batch_the_next_job_is_drawn_as_if_there_were_no_larger_one(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "TILE", 8)
    jobs, asked = tmp_path / "jobs.jsonl", []
    sizes = ["64x64", "64x64", "32x32", "32x32"]
    lines = [f'{{"prompt": "a cat", "seed": {i}, "size": "{size}", "id": "{i}"}}\n' for i, size in enumerate(sizes)]
    jobs.write_text("".join(lines), encoding="utf-8")

    def run(out: Path) -> list[Any]:
        defaults = GenerateSpec(model=str(sd1), output=out, if_exists="error", steps=2, device="cpu")
        spec, told = BatchSpec(jobs=jobs, defaults=defaults), []
        try:
            told.extend(batch.run(spec, plan_batch(spec), []))
        except batch.PartialError:
            told.append("partial")
        return told

    def load(place: Path, **kind: Any) -> ModelBundle:
        def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            asked.append(tuple(inputs[0].shape))
            if inputs[0][0].numel() > ONE:
                raise torch.OutOfMemoryError

        bundle = load_bundle(place, **kind)
        bundle.unet.register_forward_pre_hook(check)
        return bundle

    plain = [event for event in run(tmp_path / "plain") if isinstance(event, Finished)]
    monkeypatch.setattr("sdcli.jobs.studio.load_bundle", load)
    told = run(tmp_path / "less")
    found = [event for event in told if isinstance(event, Finished)]
    failed = [event for event in told if isinstance(event, Failed)]
    assert [(one.line, type(one.error)) for one in failed] == [(1, ResourceError), (2, ResourceError)]
    assert told[-1] == "partial"
    assert [event.job.id for event in found] == ["2", "3"] and len(plain) == 4
    assert asked[-1] == (4, 4, 16, 16)  # two images with guidance, at once
    assert not any("saved_memory" in event.facts for event in found)
    records = [ImageRecord(event.facts, event.job.target) for event in found]
    others = [ImageRecord(event.facts, event.job.target) for event in plain if event.job.id in "23"]
    assert apart(records, others) == 0


def test_in_a_batch_the_record_tells_of_tiles(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "TILE", 8)
    monkeypatch.setattr(vae, "OVERLAP", 4)

    def load(place: Path, **kind: Any) -> ModelBundle:
        bundle = load_bundle(place, **kind)
        limited(decoder=4 * 8 * 8)(bundle)
        return bundle

    monkeypatch.setattr("sdcli.jobs.studio.load_bundle", load)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a cat"}\n', encoding="utf-8")
    defaults = GenerateSpec(model=str(sd1), output=tmp_path / "out", if_exists="error", steps=1, device="cpu")
    spec = BatchSpec(jobs=jobs, defaults=defaults)
    (found,) = (event for event in batch.run(spec, plan_batch(spec), []) if isinstance(event, Finished))
    assert (found.facts["saved_memory"], found.facts["tiling"]) == (["tiled"], True)
    assert (read_record(tmp_path / "out" / str(found.facts["path"])) or {}).get("tiling") is True
