"""What was asked of the commands that look inside: `tokens`, `diffuse`, `roundtrip`, `schedulers --plot`, `bench`.

As in `specs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sdcli.checks import (
    DTYPES,
    IF_EXISTS,
    MAX_SEED,
    MAX_STEPS,
    PREDICTIONS,
    at_least,
    between,
    check_offload,
    one_of,
    option,
    parse_size,
)
from sdcli.errors import UsageError

TENSOR_SUFFIXES = (".safetensors", ".png")


@dataclass(frozen=True, kw_only=True)
class TokensSpec:
    """`sdcli tokens`."""

    prompt: str = ""
    model: str | None = None
    embedding: tuple[str, ...] = ()  # FILE or FILE:TOKEN
    replace: tuple[str, ...] = ()  # as in GenerateSpec, like mix
    mix: tuple[str, ...] = ()
    seed: int = 0  # of the image whose wildcards are drawn
    clip_skip: int = 0  # as in GenerateSpec
    embeddings: tuple[Path, ...] = ()  # where the tensors go, as .safetensors or .png
    mask: tuple[Path, ...] = ()
    if_exists: str = "number"
    offline: bool = False

    def __post_init__(self) -> None:
        from sdcli.specs import word_swaps  # deferred: 0.01 s that --help of the others here does not need

        word_swaps(self.replace, self.mix)
        between("seed", self.seed, 0, MAX_SEED)
        at_least("clip_skip", self.clip_skip, 0)
        if self.clip_skip and not self.embeddings:
            what = f"--clip-skip {self.clip_skip} without --embeddings: no layer is looked into"
            raise UsageError(what, "give --embeddings FILE, too, or leave it out")
        for name, paths in (("--embeddings", self.embeddings), ("--mask", self.mask)):
            for path in paths:
                if path.suffix.lower() not in TENSOR_SUFFIXES:
                    raise UsageError(f"{name} {path}: of no known kind", "name a .safetensors or a .png file")
        one_of("if_exists", self.if_exists, IF_EXISTS)


@dataclass(frozen=True, kw_only=True)
class RoundtripSpec:
    """`sdcli roundtrip`."""

    inputs: tuple[Path, ...] = ()
    output: Path | None = None  # of each picture beside its reconstruction; None: figures alone
    model: str | None = None
    sample: bool = False
    seed: int = 0
    size: str | None = None
    if_exists: str = "number"
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, MAX_SEED)
        if self.seed != RoundtripSpec.seed and not self.sample:
            raise UsageError(f"--seed {self.seed} without --sample: nothing is drawn", "leave it out, or add --sample")
        if self.size is not None:
            parse_size(self.size)
        one_of("if_exists", self.if_exists, IF_EXISTS)
        one_of("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class DiffuseSpec:
    """`sdcli diffuse`."""

    input: Path = Path()
    t: str | None = None  # steps, separated by commas; None: five from the first to the last
    space: str = "both"
    seed: int = 0
    size: str | None = None
    model: str | None = None
    output: Path = Path()
    save_latents: Path | None = None
    if_exists: str = "number"
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False

    SPACES: ClassVar[tuple[str, ...]] = ("pixels", "latents")

    def __post_init__(self) -> None:
        if self.t is not None:
            parse_timesteps(self.t)
        one_of("space", self.space, (*self.SPACES, "both"))
        between("seed", self.seed, 0, MAX_SEED)
        if self.size is not None:
            parse_size(self.size)
        if self.save_latents is not None and self.space == "pixels":
            raise UsageError("--save-latents with --space pixels: there are no latents", "use --space latents or both")
        one_of("if_exists", self.if_exists, ("number", "overwrite", "error"))
        one_of("dtype", self.dtype, DTYPES)

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces asked for, in the order they are shown."""
        return self.SPACES if self.space == "both" else (self.space,)


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """`sdcli schedulers --plot`."""

    plot: str = "sigmas"
    name: str | None = None  # of a scheduler; None: all
    sigmas: str | None = None
    order: int | None = None
    timestep_spacing: str | None = None
    steps: int | None = None  # None: the model's own, else the tool's default
    model: str | None = None
    output: Path = Path()
    if_exists: str = "number"
    offline: bool = False

    def __post_init__(self) -> None:
        one_of("plot", self.plot, ("betas", "alpha-bar", "snr", "sigmas"))
        if self.plot != "sigmas":
            if self.name is not None:
                raise UsageError(f"--plot {self.plot} of {self.name}: it is the model's, not a scheduler's", "drop one")
            if self.steps is not None:
                raise UsageError(f"--steps with --plot {self.plot}: it has a value for every t", "leave it out")
        elif self.steps is not None:
            between("steps", self.steps, 1, MAX_STEPS)
        one_of("if_exists", self.if_exists, ("number", "overwrite", "error"))


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """`sdcli bench`. None means: the model's own setting, else the tool's default."""

    schedulers: str = "all"  # or names with commas between
    steps: str = "5,10,20,50"
    model: str | None = None
    prompt: tuple[str, ...] = ()  # none: some of the embedded model's vocabulary
    class_name: tuple[str, ...] = ()  # of a model of classes, in place of prompts; none: its first ones
    negative: str = ""
    prediction: str | None = None  # as in GenerateSpec
    lora: tuple[str, ...] = ()  # as in GenerateSpec
    embedding: tuple[str, ...] = ()  # as in GenerateSpec
    guidance: float | None = None
    seed: int = 0
    seeds: int = 1  # pictures of each prompt
    size: str | None = None
    batch_size: int | None = None
    reference_steps: int = 250
    data: Path | None = None
    features: str = "builtin"
    csv: Path | None = None
    plot: Path | None = None
    plot_quality: str = "rmse"
    plot_over: str = "seconds"
    run: Path | None = None
    if_exists: str = "number"
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "auto"
    compile: bool = False
    offline: bool = False

    ALL: ClassVar[str] = "all"
    QUALITIES: ClassVar[tuple[str, ...]] = ("rmse", "psnr", "frechet")

    def __post_init__(self) -> None:
        self.step_counts()
        if self.prediction is not None:
            one_of("prediction", self.prediction, tuple(PREDICTIONS))
        if self.guidance is not None:
            at_least("guidance", self.guidance, 1.0)
        between("seed", self.seed, 0, MAX_SEED)
        between("seeds", self.seeds, 1, 1_000_000)
        if self.size is not None:
            parse_size(self.size)
        if self.batch_size is not None:
            at_least("batch_size", self.batch_size, 1)
        between("reference_steps", self.reference_steps, 4, 100_000)
        if self.class_name and self.prompt:
            raise UsageError("--prompt and --class exclude each other", "give one of them")
        for name in ("csv", "plot"):
            path, ending = getattr(self, name), {"csv": ".csv", "plot": ".png"}[name]
            if path is not None and path.suffix.lower() != ending:
                raise UsageError(f"{option(name)} {path}: is no {ending} file", f"name one that ends in {ending}")
        one_of("plot_quality", self.plot_quality, self.QUALITIES)
        one_of("plot_over", self.plot_over, ("seconds", "evaluations", "steps"))
        if self.plot is not None and self.plot_quality == "frechet" and self.data is None:
            raise UsageError("--plot-quality frechet without --data", "name a folder of pictures to compare with")
        for name, needed in (("plot_quality", "plot"), ("plot_over", "plot"), ("features", "data")):
            if getattr(self, name) != getattr(type(self), name) and getattr(self, needed) is None:
                raise UsageError(f"{option(name)} without --{needed}", f"give --{needed}, too, or leave it out")
        one_of("if_exists", self.if_exists, IF_EXISTS)
        one_of("dtype", self.dtype, DTYPES)
        check_offload(self.offload, is_compiled=self.compile)

    def step_counts(self) -> tuple[int, ...]:
        """The numbers of steps, rising, each once. Raises UsageError."""
        words = [word.strip() for word in self.steps.split(",")]
        if not all(word.isascii() and word.isdigit() and len(word) <= 4 for word in words):
            raise UsageError(f"--steps {self.steps}: are no numbers of steps", "write them as 5,10,20,50")
        for word in words:
            between("steps", int(word), 1, MAX_STEPS)
        return tuple(sorted({int(word) for word in words}))

    def scheduler_names(self) -> tuple[str, ...]:
        """The schedulers named, as typed; none for all. Raises UsageError."""
        if self.schedulers.strip().lower() == self.ALL:
            return ()
        names = tuple(word.strip() for word in self.schedulers.split(","))
        if not all(names):
            raise UsageError(
                f"--schedulers {self.schedulers}: one is empty", "write them as ddim,pndm,dpm:sigmas=karras"
            )
        return names


def parse_timesteps(text: str) -> tuple[int, ...]:
    """`0,250,999` as numbers, in the order given. Raises UsageError, for a step that is named twice as well."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 6 for part in parts):
        raise UsageError(f"--t {text}: is no list of steps", "write it as 0,250,500,999")
    steps = tuple(int(part) for part in parts)
    twice = [t for t in steps if steps.count(t) > 1]
    if twice:
        raise UsageError(f"--t {text}: {twice[0]} is named twice", "name every step once")
    return steps
