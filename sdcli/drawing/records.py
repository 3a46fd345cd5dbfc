"""What the record of an image says of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli import __version__, latent_files, store
from sdcli.drawing.reading import Reading
from sdcli.files import sha256
from sdcli.pipeline import init
from sdcli.pipeline.adapters import MAX_BYTES, Embedding
from sdcli.pipeline.device import computing_dtype
from sdcli.pipeline.prompt import Chunks
from sdcli.pipeline.wildcards import Prompts
from sdcli.plan import Plan
from sdcli.plan.lora_files import lora_facts
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import ModelBundle


def shared_facts(spec: GenerateSpec, plan: Plan, embeddings: Sequence[Embedding]) -> dict[str, Any]:
    """What the records of all images have in common, and a place for what each has of its own."""
    facts = {
        "prompt": "",
        "negative": "",
        **({"class": asdict(plan.label)} if plan.label is not None else {}),
        "model": plan.model.ref,
        "model_hash": store.model_hash(plan.model),
        **plan.model.pinned(),
        "prediction": plan.prediction,
        "seed": 0,
        "width": plan.width,
        "height": plan.height,
        "scheduler": plan.scheduler.name,
        **plan.scheduler.choices,
        "steps": plan.steps,
        "evaluations": 0,
        "guidance": plan.guidance,
        **plan.guidance_facts(),
        "seconds": 0.0,
        "tokens": Chunks(()).counts(),
        "sdcli": __version__,
    }
    facts |= {key: list(given) for key, given in (("replace", spec.replace), ("mix", spec.mix)) if given}
    if plan.clip_skip:
        facts["clip_skip"] = plan.clip_skip
    if plan.loras:
        facts["loras"] = lora_facts(plan.loras)
    if embeddings:
        facts["embeddings"] = [
            {"file": _name(file.path), "token": embedding.token, "sha256": sha256(file.path, max_bytes=MAX_BYTES)}
            for file, embedding in zip(plan.embeddings, embeddings, strict=True)
        ]
    if plan.latents is not None:
        facts["latents"] = _file(plan.latents, sha256(plan.latents, max_bytes=latent_files.MAX_BYTES))
    return facts


def word_facts(prompts: Prompts, read: Reading) -> dict[str, Any]:
    """What one image is drawn of, and how much of it found room."""
    facts: dict[str, Any] = {**prompts.facts()}
    if read.chunks is not None:
        facts["tokens"] = read.chunks.counts()
    if read.away is not None and read.away.cut:
        facts["negative_tokens"] = read.away.counts()
    told = {"unknown_words": read.unknown, "negative_unknown_words": read.away_unknown}
    facts |= {name: list(words) for name, words in told.items() if words}
    return facts


def picture_facts(plan: Plan, picture: init.Picture | None) -> dict[str, Any]:
    if plan.initial is None or picture is None:
        return {}
    facts = {"strength": plan.initial.strength, "init_image": _file(plan.initial.path, picture.sha256)}
    if plan.initial.mask is not None:
        facts["mask"] = _file(plan.initial.mask, str(picture.mask_sha256))
    return facts


def precision_facts(bundle: ModelBundle) -> dict[str, str]:
    """The type of the weights, where it is not float32: a rounding that no other device or batch repeats."""
    name = str(computing_dtype(bundle.unet)).removeprefix("torch.")
    return {"dtype": name} if name != "float32" else {}


def _file(path: Path, digest: str) -> dict[str, str]:
    """What a record says of a file that a picture was made with: nothing of where it lies."""
    return {"file": _name(path), "sha256": digest}


def _name(path: Path) -> str:
    return path.name.encode(errors="replace").decode()
