"""A spec and the model's own settings -> everything decided, before anything heavy is imported. No torch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli import schedulers, store
from sdcli.errors import InputError, OutputError, UsageError
from sdcli.files import check_writable
from sdcli.specs import MAX_SEED, GenerateSpec, parse_size

DEFAULT_STEPS = 25
DEFAULT_SCHEDULER = "dpm"
DEFAULT_GUIDANCE = 7.5
SLUG_LENGTH = 60
DRAWN_SEED_BITS = 32  # short enough to be typed again


@dataclass(frozen=True)
class Plan:
    """What `generate` is going to do."""

    model: store.Model
    scheduler: schedulers.Scheduler
    scheduler_config: dict[str, Any]
    steps: int
    guidance: float
    width: int  # px
    height: int  # px
    seeds: tuple[int, ...]
    targets: tuple[Path, ...]  # where each image goes; `-` is stdout

    def describe(self) -> dict[str, Any]:
        """The decisions as plain values, for --dry-run."""
        return {
            "model": self.model.ref,
            "folder": str(self.model.folder),
            "scheduler": self.scheduler.name,
            "class": self.scheduler.class_name,
            "overrides": dict(self.scheduler.overrides),
            "steps": self.steps,
            "evaluations": self.scheduler.evaluations(self.steps),
            "guidance": self.guidance,
            "size": f"{self.width}x{self.height}",
            "seeds": list(self.seeds),
            "outputs": [str(path) for path in self.targets],
        }


def plan(spec: GenerateSpec) -> Plan:
    """Resolve every default and refuse whatever can be refused without a tensor.

    Raises UsageError for an option that is out of range or does not fit the model, InputError for a model that is
    missing or malformed, OutputError when the pictures could not be written.
    """
    if not spec.prompt.strip():
        raise UsageError("the prompt is empty", 'say what to draw: sdcli generate "a picture of a puppy"')
    if spec.scheduler is not None:
        schedulers.find(spec.scheduler)  # a wrong name is told before a wrong model
    model = store.resolve(spec.model, offline=spec.offline)
    own = store.settings(model)
    scheduler = schedulers.find(_first(spec.scheduler, own.get("scheduler"), DEFAULT_SCHEDULER))
    config = store.read_json(model.folder / "scheduler" / "scheduler_config.json")
    steps = _first(spec.steps, own.get("steps"), DEFAULT_STEPS)
    schedulers.check_steps(scheduler, steps, config)
    width, height = _size(spec, model, own)
    seed = spec.seed if spec.seed is not None else secrets.randbits(DRAWN_SEED_BITS)
    return Plan(
        model=model,
        scheduler=scheduler,
        scheduler_config=config,
        steps=steps,
        guidance=float(_first(spec.guidance, own.get("guidance"), DEFAULT_GUIDANCE)),
        width=width,
        height=height,
        seeds=tuple((seed + i) % (MAX_SEED + 1) for i in range(spec.count)),
        targets=targets(spec, seed),
    )


def targets(spec: GenerateSpec, seed: int) -> tuple[Path, ...]:
    """The path of each image: the file named (numbered from the second image on), or a name of its own in a folder.

    Raises OutputError when the folder cannot be written, or a file is there that must not be replaced.
    """
    if str(spec.output) == "-":
        return (spec.output,)
    is_folder = spec.output.is_dir() or spec.output.suffix == ""
    folder = spec.output if is_folder else spec.output.parent
    if not is_folder and spec.output.suffix.lower() != ".png":
        raise UsageError(f"--output {spec.output}: pictures are written as PNG", "name a .png file or a folder")
    check_writable(folder)
    if is_folder:
        names = [f"{slug(spec.prompt)}-{(seed + i) % (MAX_SEED + 1)}.png" for i in range(spec.count)]
    else:
        names = [spec.output.name] + [f"{spec.output.stem}-{i}.png" for i in range(2, spec.count + 1)]
    paths = tuple(folder / name for name in names)
    for path in paths:
        if spec.if_exists == "error" and path.exists():
            raise OutputError(f"{path}: exists", "choose another name, or --if-exists number, skip or overwrite")
    return paths


def slug(prompt: str) -> str:
    """A prompt as a file name: lower-case letters and digits, words joined by hyphens."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    name = "-".join(words).encode()[: SLUG_LENGTH * 2].decode(errors="ignore")[:SLUG_LENGTH].strip("-")
    return name or "image"


def _size(spec: GenerateSpec, model: store.Model, own: dict[str, Any]) -> tuple[int, int]:
    """Width and height in px. Raises UsageError unless both are multiples of the VAE factor and the UNet's own."""
    vae = store.read_json(model.folder / "vae" / "config.json")
    unet = store.read_json(model.folder / "unet" / "config.json")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        native = int(unet.get("sample_size") or 64) * factor
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{model.folder}: its configs state no size ({error})", "mend vae/ and unet/config.json"
        ) from error
    if spec.size is not None:
        width, height = parse_size(spec.size)
    else:
        native_width, native_height = parse_size(str(own.get("size", f"{native}x{native}")))
        width, height = _first(spec.width, native_width), _first(spec.height, native_height)
    for name, value in (("width", width), ("height", height)):
        if value % factor:
            below = max(factor, value // factor * factor)
            raise UsageError(
                f"{name} {value} px: is no multiple of {factor}, which this model needs",
                f"use {below} or {below + factor}",
            )
    return width, height


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
