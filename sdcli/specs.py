"""What the user asked for, validated. No torch, no Typer.

One frozen dataclass per command; its class attributes are the defaults of the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from sdcli.checks import (
    DTYPES,
    IF_EXISTS,
    MAX_COUNT,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    PREDICTIONS,
    at_least,
    between,
    check_offload,
    check_picture_options,
    one_of,
    option,
    parse_idle,
    parse_interval,
    parse_shard,
    parse_size,
)
from sdcli.errors import UsageError

MAX_MIX = 10.0  # of a weight in --mix, up or down


@dataclass(frozen=True, kw_only=True)
class GenerateSpec:
    """`sdcli generate`. None means: the model's own setting, else the tool's default."""

    prompt: str = ""
    negative: str = ""
    class_name: str | None = None  # in place of the prompt; or its index
    model: str | None = None
    prediction: str | None = None  # by the UNet; None: as the model says
    steps: int | None = None
    scheduler: str | None = None
    sigmas: str | None = None
    order: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None
    variance: str | None = None
    guidance: float | None = None
    guidance_interval: str = "0:1"
    guidance_rescale: float = 0.0
    seed: int | None = None
    count: int = 1
    size: str | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = None
    deterministic: bool = False
    lora: tuple[str, ...] = ()  # FILE or FILE:SCALE
    embedding: tuple[str, ...] = ()  # FILE or FILE:TOKEN
    replace: tuple[str, ...] = ()  # WORD=OTHER
    mix: tuple[str, ...] = ()  # WORD=WEIGHT,OTHER=WEIGHT,...
    clip_skip: int = 0  # of the text encoder's layers, at its end
    latents: Path | None = None  # the initial noise of the one image
    init_image: Path | None = None
    strength: float | None = None  # share of the steps; None: 0.75, of an inpainting UNet 1
    mask: Path | None = None
    save_latents: Path | None = None
    output: Path = Path()
    format: str | None = None  # None: by the suffix of the output, else png
    quality: int | None = None  # of webp and jpg; None: the tool's default
    grid: Path | None = None  # a contact sheet of all, besides
    save_steps: Path | None = None  # an animation of the one image, or a folder
    if_exists: str = "number"
    no_metadata: bool = False
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "auto"
    tiling: bool = False  # of the VAE
    compile: bool = False  # of the UNet
    offline: bool = False

    def __post_init__(self) -> None:
        if self.prediction is not None:
            one_of("prediction", self.prediction, tuple(PREDICTIONS))
        if self.steps is not None:
            between("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            at_least("guidance", self.guidance, 1.0)
        parse_interval(self.guidance_interval)
        between("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        if self.eta is not None:
            between("eta", self.eta, 0.0, 1.0)
        if self.seed is not None:
            between("seed", self.seed, 0, MAX_SEED)
        between("count", self.count, 1, MAX_COUNT)
        if self.batch_size is not None:
            at_least("batch_size", self.batch_size, 1)
        if self.size is not None and (self.width is not None or self.height is not None):
            raise UsageError("--size and --width/--height exclude each other", "give one of them")
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), MIN_SIDE, MAX_SIDE)
        if self.size is not None:
            parse_size(self.size)
        word_swaps(self.replace, self.mix)
        at_least("clip_skip", self.clip_skip, 0)
        if self.latents is not None and self.count > 1:
            raise UsageError(f"--count {self.count} with --latents: the file holds one image's noise", "use --count 1")
        self._check_initial()
        if self.class_name is not None and self.prompt.strip():
            raise UsageError("the prompt and --class exclude each other", "give one of them")
        if str(self.output) == "-" and self.count > 1:
            raise UsageError(f"--count {self.count} with --output -: stdout takes one picture", "name a folder")
        if str(self.output) == "-" and self.grid is not None:
            raise UsageError("--grid with --output -: stdout takes one picture", "name a folder")
        if str(self.output) == "-" and self.save_steps is not None:
            raise UsageError("--save-steps with --output -: stdout takes one picture", "name a folder")
        check_picture_options(self.format, self.quality)
        one_of("if_exists", self.if_exists, IF_EXISTS)
        one_of("dtype", self.dtype, DTYPES)
        check_offload(self.offload, is_compiled=self.compile)

    def _check_initial(self) -> None:
        if self.strength is not None:
            between("strength", self.strength, 0.0, 1.0)
        for name in ("strength", "mask"):
            if self.init_image is None and getattr(self, name) is not None:
                raise UsageError(f"--{name} without --init-image: there is no picture to change", "name one")
        if self.init_image is not None and self.latents is not None:
            what = "--latents and --init-image exclude each other: a picture is noised by its seed"
            raise UsageError(what, "give one of them")


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """`sdcli batch`."""

    jobs: Path = Path("-")  # `-` is stdin
    # What a job does not say, and what all have in common.
    defaults: GenerateSpec = field(default_factory=lambda: GenerateSpec(if_exists=BatchSpec.IF_EXISTS))
    # Of jobs that name a picture to start from, where the defaults name none.
    strength: float | None = None
    mask: Path | None = None
    keep_going: bool = False
    max_failures: int | None = None  # None: however many
    shard: str = "1/1"
    gallery: bool = False
    dry_run: bool = False

    IF_EXISTS: ClassVar[str] = "error"  # unless another is given
    # Of GenerateSpec's fields those that are of the whole run; every other is a job's to choose.
    OF_THE_RUN: ClassVar[frozenset[str]] = frozenset(
        {"output", "format", "quality", "grid", "save_steps", "save_latents", "if_exists", "no_metadata"}
        | {"batch_size", "deterministic", "device", "dtype", "offload", "tiling", "compile", "offline"}
    )

    def __post_init__(self) -> None:
        parse_shard(self.shard)
        if self.strength is not None:
            between("strength", self.strength, 0.0, 1.0)
        if self.max_failures is not None:
            at_least("max_failures", self.max_failures, 1)
        if self.defaults.if_exists == "number":
            what = "--if-exists number: the same batch again would make every picture again"
            raise UsageError(what, "use error, skip or overwrite")
        if str(self.defaults.output) == "-":
            raise UsageError("--output -: a batch writes files", "name a folder")
        if set("{}") & set(str(self.defaults.output)):
            what = f"--output {self.defaults.output}: a batch names its pictures itself"
            raise UsageError(what, 'name a folder without braces, and give jobs an "id"')
        if self.dry_run and str(self.jobs) == "-":
            raise UsageError("--dry-run of stdin: its jobs are drawn as they come", "put them into a file")


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """`sdcli serve`: when it ends, and the model that is loaded before anybody asks for one."""

    idle: str = "10m"
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False

    def __post_init__(self) -> None:
        parse_idle(self.idle)
        one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """`sdcli encode` and `sdcli decode`."""

    inputs: tuple[Path, ...] = ()
    output: Path = Path()
    model: str | None = None
    sample: bool = False
    invert: str | None = None  # what the picture shows, in a prompt or the name of a class
    negative: str = ""
    prediction: str | None = None  # by the UNet, as in GenerateSpec
    clip_skip: int = 0  # as in GenerateSpec
    lora: tuple[str, ...] = ()  # of the model that inverts, as in GenerateSpec
    steps: int | None = None  # of the inversion; None: the model's own, else the tool's default
    guidance: float = 1.0
    seed: int = 0
    size: str | None = None
    format: str | None = None  # of decoded pictures, like quality, as in GenerateSpec
    quality: int | None = None
    if_exists: str = "number"
    device: str = "auto"
    dtype: str = "auto"
    tiling: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, MAX_SEED)
        check_picture_options(self.format, self.quality)
        if self.size is not None:
            parse_size(self.size)
        if self.steps is not None:
            between("steps", self.steps, 1, MAX_STEPS)
        if self.prediction is not None:
            one_of("prediction", self.prediction, tuple(PREDICTIONS))
        at_least("guidance", self.guidance, 1.0)
        at_least("clip_skip", self.clip_skip, 0)
        if self.sample and self.invert is not None:
            raise UsageError("--sample and --invert exclude each other", "an inversion starts from the mean")
        for name in ("negative", "prediction", "clip_skip", "lora", "steps", "guidance"):
            if self.invert is None and getattr(self, name) != getattr(CodecSpec, name):
                raise UsageError(f"{option(name)} without --invert: nothing is denoised", "leave it out")
        if self.seed != CodecSpec.seed and not self.sample:
            raise UsageError(f"--seed {self.seed} without --sample: nothing is drawn", "leave it out, or add --sample")
        if self.negative and self.guidance == 1:
            raise UsageError("--negative at --guidance 1: guidance is off", "leave it out, or use a guidance above 1")
        one_of("if_exists", self.if_exists, IF_EXISTS)
        one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class MetaSpec:
    """`sdcli meta`."""

    inputs: tuple[Path, ...] = ()
    strip: bool = False


@dataclass(frozen=True)
class WordSwap:
    """Wherever a word stands in the prompt, the weighted sum of some words' vectors is fed to the text encoder."""

    option: str  # as the user wrote it
    word: str
    terms: tuple[tuple[str, float], ...]


def word_swaps(replace: tuple[str, ...], mix: tuple[str, ...]) -> tuple[WordSwap, ...]:
    """What `--replace A=B` and `--mix A=0.5,B=0.5` mean. Raises UsageError for what is not written so."""
    return (*(_replacement(text) for text in replace), *(_mixture(text) for text in mix))


def _replacement(text: str) -> WordSwap:
    word, _, other = (part.strip() for part in text.partition("="))
    if not word or not other:
        raise UsageError(f"--replace {text}: says not what for what", "write it as in --replace puppy=cat")
    return WordSwap(f"--replace {text}", word, ((other, 1.0),))


def _mixture(text: str) -> WordSwap:
    terms = []
    for part in text.split(","):
        word, _, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not word.strip() or not -MAX_MIX <= weight <= MAX_MIX:
            hint = f"write it as in --mix puppy=0.5,cat=0.5, weights in {-MAX_MIX:g}..{MAX_MIX:g}"
            raise UsageError(f"--mix {text}: {part.strip() or 'an empty part'} is no word with its weight", hint)
        terms.append((word.strip(), weight))
    return WordSwap(f"--mix {text}", terms[0][0], tuple(terms))
