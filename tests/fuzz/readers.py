"""Every door that a file can come in by: what a good one looks like, and what reads it."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

from sdcli import generate, latent_files, ledger, meta
from sdcli.errors import ExitCode, SdcliError
from sdcli.jobs import lines
from sdcli.pipeline import adapters, containers, images, lora, lora_names, metadata, vocabulary
from sdcli.plan import plan
from sdcli.specs import GenerateSpec, MetaSpec
from sdcli.training import data as training_data
from tests import models, originals
from tests.fuzz import judges, small
from tests.fuzz.judges import Judge, is_the_same_to_hear
from tests.fuzz.mutations import damaged, rearranged

QUICK = 60
SMALL_BYTES = 1 << 16
REARRANGED = 0.5  # of the files of a folder, the others being damaged within
RECORD = {
    "prompt": "a cat",
    "negative": "",
    "model": "builtin",
    "model_hash": "0123456789abcdef" * 4,
    "seed": 7,
    "width": 24,
    "height": 16,
    "scheduler": "ddim",
    "steps": 2,
    "evaluations": 2,
    "guidance": 3.0,
    "seconds": 0.1,
    "tokens": {"kept": 2, "cut": 0, "chunks": 1},
    "sdcli": "0.1.0",
}
EXPECTED = {ExitCode.USAGE, ExitCode.INPUT, ExitCode.RESOURCES, ExitCode.NUMERICAL}
VAE = {"latent_channels": 4, "block_out_channels": [8, 8], "scaling_factor": 0.18215}


@dataclass(frozen=True)
class Reader:
    """One door. Each file of `good` is damaged in its turn, beside the others as they are."""

    good: Callable[[Path], dict[str, bytes]]  # given a scratch folder
    read: Callable[[Path, Path], object]  # given the folder of all files, and the damaged one
    share: int = QUICK  # how many are read in a quick test; fewer where one takes a tenth of a second and more
    forgives: bool = False  # whether what cannot be read counts as nothing there
    only: tuple[str, ...] = field(default=())  # suffixes of the files that are damaged; all if empty
    judge: Judge | None = None  # who else says of a file that was read whether it may be; see judges.py
    is_rearranged: bool = False  # whether files are removed, exchanged and linked besides


def damaged_files(reader: Reader, scratch: Path, chance: random.Random) -> Iterator[Path]:
    """The one damaged file of a folder, `scratch/damaged`, made anew for each, without end; a seed gives the same."""
    good = reader.good(scratch / "good")
    names = [name for name in sorted(good) if not reader.only or name.endswith(reader.only)]
    folder, sound = scratch / "damaged", scratch / "sound"
    is_small = sum(map(len, good.values())) < SMALL_BYTES
    _write(sound, good)
    _write(folder, good)
    while True:
        name = chance.choice(names)
        path = folder / name
        if reader.is_rearranged and chance.random() < REARRANGED:
            rearranged(path, [folder / other for other in names], sound / name, chance)
        else:
            path.write_bytes(damaged(good[name], chance))
        yield path
        if is_small or reader.is_rearranged:  # readers of small folders may write into them
            shutil.rmtree(folder)
        _write(folder, good if is_small or reader.is_rearranged else {name: good[name]})


def _write(folder: Path, good: dict[str, bytes]) -> None:
    for name, content in good.items():
        _made((folder / name).parent)
        (folder / name).write_bytes(content)


def verdict(reader: Reader, scratch: Path, path: Path) -> tuple[SdcliError | None, str]:
    """What the reader says against a damaged file, None where it reads it, and what is wrong about that, or nothing.

    Any other exception of the reader goes through.
    """
    folder = scratch / "damaged"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(folder, path)
        except SdcliError as error:
            return error, "" if is_clean(error) else repr(error)
    if reader.judge is None:
        return None, ""
    objection = reader.judge(scratch / "sound" / path.relative_to(folder), path)
    return None, f"was read, and should not have been: {objection}" if objection is not None else ""


def is_clean(error: SdcliError) -> bool:
    """Whether an error is of a class that a file can be blamed with, in one sentence."""
    return error.exit_code in EXPECTED and "\n" not in str(error)


def _picture(form: str) -> Callable[[Path], dict[str, bytes]]:
    def good(scratch: Path) -> dict[str, bytes]:
        image = Image.effect_mandelbrot((24, 16), (-2, -1.5, 1, 1.5), 20).convert("RGB")
        if form in ("png", "jpg", "webp"):
            content = metadata.picture_bytes(image, RECORD, form, 90)
            return {f"a.{form}": content}
        stream = io.BytesIO()
        image.save(stream, {"tif": "TIFF"}.get(form, form.upper()))
        return {f"a.{form}": stream.getvalue()}

    return good


def _others(scratch: Path) -> dict[str, bytes]:
    """Pictures as other programs write them, for `meta`."""
    from PIL.PngImagePlugin import PngInfo

    graph = {
        "3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 20, "cfg": 7, "positive": ["6", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
    }
    a1111 = 'a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 24x16, TI: "a: b"'
    texts = {"comfy": ("prompt", json.dumps(graph)), "a1111": ("parameters", a1111)}
    texts["invoke"] = ("invokeai_metadata", json.dumps({"positive_prompt": "a cat", "seed": 5, "steps": 20}))
    found = {}
    for name, (keyword, text) in texts.items():
        chunks = PngInfo()
        chunks.add_text(keyword, text)
        stream = io.BytesIO()
        Image.new("RGB", (24, 16)).save(stream, "PNG", pnginfo=chunks)
        found[f"{name}.png"] = stream.getvalue()
    return found


def _latents(scratch: Path) -> dict[str, bytes]:
    facts = {"model": "builtin", "height": 16, "width": 24, "scaling_factor": 0.18215, "mode": "mean"}
    return {"a.latents.safetensors": latent_files.file_bytes(_noise(1, 4, 8, 12), facts)}


def _embeddings(scratch: Path) -> dict[str, bytes]:
    vectors = _noise(2, models.CONTEXT)
    paths = adapters.write_embedding(_made(scratch), adapters.Embedding("<cat>", vectors))
    found = {path.name: path.read_bytes() for path in paths}
    return found | {"pair.safetensors": save({"clip_l": vectors, "clip_g": vectors + 1})}


def _noise(*shape: int) -> torch.Tensor:
    """The same in every run, so that what a run finds is found again."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _model(scratch: Path) -> dict[str, bytes]:
    return _contents(small.write(scratch / "model"))


def _model_xl(scratch: Path) -> dict[str, bytes]:
    return _contents(small.write(scratch / "model", models.write_sdxl))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _lora(scratch: Path) -> dict[str, bytes]:
    found = {f"model/{name}": content for name, content in _model(scratch).items()}
    return found | {"lora.safetensors": models.write_lora(scratch / "lora.safetensors", scratch / "model").read_bytes()}


def _single_file(scratch: Path) -> dict[str, bytes]:
    path = originals.write(_made(scratch) / "sd.safetensors", small.SINGLE, dtype=torch.float16)
    return {path.name: path.read_bytes()}


def _tables(scratch: Path) -> dict[str, bytes]:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    rows = b'{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png", "text": ["a dog", "dog"]}\n'
    return {"metadata.jsonl": rows, "a.png": stream.getvalue(), "b.png": stream.getvalue()}


def _sheets(scratch: Path) -> dict[str, bytes]:
    pictures = {name: content for name, content in _tables(scratch).items() if name.endswith(".png")}
    return pictures | {"metadata.csv": b'file_name,text\na.png,"a ""red"" cat"\nb.png,a dog\n'}


def _kohya(scratch: Path) -> dict[str, bytes]:
    pictures = {name: content for name, content in _tables(scratch).items() if name.endswith(".png")}
    rows = {"a.png": {"caption": "a cat"}, "b.png": {"tags": "dog, red", "train_resolution": [16, 16]}}
    return pictures | {"meta.json": json.dumps(rows).encode()}


def _tar(scratch: Path) -> dict[str, bytes]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in {
            "1.png": _tables(scratch)["a.png"],
            "1.txt": b"a cat",
            "1.json": b'{"text": "x"}',
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return {"shard-0.tar": stream.getvalue()}


def _jobs(scratch: Path) -> dict[str, bytes]:
    rows = (
        b'{"prompt": "a cat", "seed": 7, "id": "a"}\n{"prompt": "a dog", "steps": 3, "size": "32x32", "mix": ["a=1"]}\n'
    )
    return {
        "a.jsonl": rows,
        "a.csv": b'prompt,seed,steps\n"a ""red"" cat",7,\na dog,,3\n',
        "a.txt": b"\xef\xbb\xbfa cat\r\n\r\na (dog:1.2)\n",
    }


def _ledger(scratch: Path) -> dict[str, bytes]:
    folder = scratch / "run"
    with ledger.opened(folder, {"kind": "bench", "seed": 1}) as rows:
        for number in range(3):
            rows.add(f"{number:02d}", {"steps": number, "note": "x"})
    return {f"run/{path.name}": path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".jsonl")}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_model(folder: Path, path: Path) -> None:
    """Draw with it; where nothing has changed that is listened to, the picture is that of the sound model."""
    picture = _drawn(folder)
    sound = folder.parent / "sound"
    if is_the_same_to_hear(sound / path.relative_to(folder), path):
        assert picture == _drawn_by_the_sound(sound), f"{path} draws another picture"


def _drawn(place: Path) -> bytes:
    output = place.parent / "x.png"
    spec = GenerateSpec(
        model=str(place),
        prompt="a cat",
        seed=1,
        steps=1,
        size="16x16",
        output=output,
        no_metadata=True,
        if_exists="overwrite",
    )
    for _ in generate.run(spec, plan(spec)):
        pass
    return output.read_bytes()


@functools.cache
def _drawn_by_the_sound(place: Path) -> bytes:
    return _drawn(place)


def _read_meta(folder: Path, path: Path) -> None:
    for event in meta.run(MetaSpec(inputs=(path,))):
        if isinstance(event, meta.Failed):
            raise event.error


def _read_lora(folder: Path, path: Path) -> None:
    lora.read_adapter(path, _layers(folder.parent / "sound" / "model"))


@functools.cache
def _layers(place: Path) -> lora_names.Layers:
    return lora_names.model_layers(place)


def _read_single_file(folder: Path, path: Path) -> None:
    _drawn(path)


def _read_dataset(folder: Path, path: Path) -> None:
    dataset = training_data.find(folder)
    for _ in training_data.check(dataset, workers=1):
        pass


def _read_ledger(folder: Path, path: Path) -> None:
    with ledger.opened(folder / "run", {"kind": "bench", "seed": 1}):
        pass


READERS: dict[str, Reader] = {
    **{
        f"picture-{form}": Reader(_picture(form), lambda folder, path: images.load_image(path))
        for form in ("png", "jpg", "webp", "bmp", "tif", "gif")
    },
    **{
        f"record-{form}": Reader(_picture(form), lambda folder, path: metadata.read_record(path), forgives=True)
        for form in ("png", "jpg", "webp")
    },
    **{
        f"strip-{form}": Reader(
            _picture(form), lambda folder, path: containers.without_metadata(path.read_bytes(), path)
        )
        for form in ("png", "jpg", "webp")
    },
    "meta": Reader(_others, _read_meta),
    "latents": Reader(
        _latents, lambda folder, path: (latent_files.look(path), latent_files.read(path, VAE)), judge=judges.latents
    ),
    "embedding": Reader(
        _embeddings,
        lambda folder, path: adapters.read_embedding(path, width=models.CONTEXT),
        only=(".safetensors",),
        judge=judges.word(models.CONTEXT),
    ),
    "pickle": Reader(
        _embeddings, lambda folder, path: adapters.read_embedding(path, width=models.CONTEXT), 2, only=(".pt", ".bin")
    ),
    "model-configs": Reader(_model, _read_model, 6, only=(".json", ".txt"), judge=judges.of_a_model),
    "model-weights": Reader(_model, _read_model, 6, only=(".safetensors",), judge=judges.of_a_model),
    "model-structure": Reader(_model, _read_model, 6, judge=judges.of_a_model, is_rearranged=True),
    "xl-configs": Reader(_model_xl, _read_model, 4, only=(".json", ".txt"), judge=judges.of_a_model),
    "xl-weights": Reader(_model_xl, _read_model, 4, only=(".safetensors",), judge=judges.of_a_model),
    "lora": Reader(_lora, _read_lora, 20, only=("lora.safetensors",), judge=judges.adapter),
    "single-file": Reader(
        _single_file, _read_single_file, 6, judge=lambda sound, path: judges.safetensors_objection(path)
    ),
    "tokenizer": Reader(
        _model,
        lambda folder, path: vocabulary.read(vocabulary.load_vocabulary(folder), "a cat"),
        6,
        only=("tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"),
    ),
    "jobs": Reader(_jobs, lambda folder, path: list(lines.read(path))),
    "ledger": Reader(_ledger, _read_ledger),
    "table-jsonl": Reader(_tables, _read_dataset, only=(".jsonl",)),
    "table-csv": Reader(_sheets, _read_dataset, only=(".csv",)),
    "table-kohya": Reader(_kohya, _read_dataset, only=(".json",)),
    "tar": Reader(_tar, _read_dataset),
}
