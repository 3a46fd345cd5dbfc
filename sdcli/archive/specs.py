"""What was asked of `replay`. As in `sdcli.specs`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sdcli.checks import (
    DTYPES,
    IF_EXISTS,
    MAX_SEED,
    MAX_STEPS,
    PREDICTIONS,
    at_least,
    between,
    check_offload,
    check_picture_options,
    one_of,
    parse_interval,
    parse_size,
)
from sdcli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReplaySpec:
    """`sdcli replay`. None of a setting means: as the picture says."""

    inputs: tuple[Path, ...] = ()
    check: bool = False
    output: Path | None = None  # None: here, or with `check` nowhere
    format: str | None = None  # None: by the suffix of the output, else that of the picture
    quality: int | None = None
    if_exists: str = "number"
    model: str | None = None
    prediction: str | None = None
    prompt: str | None = None
    negative: str | None = None
    replace: tuple[str, ...] = ()  # WORD=OTHER; in place of all that the picture names, as mix, embedding and lora
    mix: tuple[str, ...] = ()  # WORD=WEIGHT,OTHER=WEIGHT,...
    clip_skip: int | None = None
    class_name: str | None = None
    seed: int | None = None
    size: str | None = None
    steps: int | None = None
    scheduler: str | None = None
    sigmas: str | None = None
    order: int | None = None
    eta: float | None = None
    timestep_spacing: str | None = None
    variance: str | None = None
    guidance: float | None = None
    guidance_interval: str | None = None
    guidance_rescale: float | None = None
    init_image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    latents: Path | None = None
    embedding: tuple[str, ...] = ()  # FILE or FILE:TOKEN
    lora: tuple[str, ...] = ()  # FILE or FILE:SCALE
    device: str = "auto"
    dtype: str | None = None
    offload: str = "auto"
    tiling: bool = False
    offline: bool = False

    # Of the fields those that are no settings of GenerateSpec's, or are looked up elsewhere.
    NO_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        {"inputs", "check", "output", "format", "quality", "if_exists", "model", "device", "dtype", "offline"}
        | {"offload", "tiling", "init_image", "mask", "latents", "embedding", "lora"}
    )

    def __post_init__(self) -> None:
        check_picture_options(self.format, self.quality)
        if self.check and self.output is None and (self.format is not None or self.quality is not None):
            raise UsageError("--format and --quality with --check: nothing is written", "add --output, or leave it out")
        if str(self.output) == "-" and self.check:
            raise UsageError("--output - with --check: stdout has the result of the check", "name a file or a folder")
        one_of("if_exists", self.if_exists, IF_EXISTS)
        if self.seed is not None:
            between("seed", self.seed, 0, MAX_SEED)
        if self.size is not None:
            parse_size(self.size)
        if self.prediction is not None:
            one_of("prediction", self.prediction, tuple(PREDICTIONS))
        if self.steps is not None:
            between("steps", self.steps, 1, MAX_STEPS)
        if self.replace or self.mix:
            from sdcli.specs import word_swaps  # deferred: a tenth of what --help costs, which does not need it

            word_swaps(self.replace, self.mix)
        if self.clip_skip is not None:
            at_least("clip_skip", self.clip_skip, 0)
        if self.guidance is not None:
            at_least("guidance", self.guidance, 1.0)
        if self.guidance_interval is not None:
            parse_interval(self.guidance_interval)
        for name in ("guidance_rescale", "eta", "strength"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), 0.0, 1.0)
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)
        check_offload(self.offload, is_compiled=False)

    @property
    def says_something(self) -> bool:
        """Whether anything takes the place of what the pictures say, and may be to blame for what does not fit."""
        return dataclasses.replace(self, inputs=(), check=False, output=None) != ReplaySpec()

    def settings(self) -> dict[str, Any]:
        """What takes the place of what the pictures say, by GenerateSpec's fields."""
        names = [one.name for one in dataclasses.fields(self) if one.name not in self.NO_SETTINGS]
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, ())}
