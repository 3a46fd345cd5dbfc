"""What the user asked of a model's files, validated. No torch, no Typer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdcli.checks import DTYPES, PREDICTIONS, one_of
from sdcli.errors import UsageError
from sdcli.files import is_utf8

FORMS = ("diffusers", "single-file")
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class ConvertSpec:
    """`sdcli models convert`."""

    model: str | None = None
    output: Path = Path()
    to: str | None = None  # None: a single file if the output is called so, else a folder
    dtype: str = "auto"  # auto: each tensor keeps its own
    ema: bool = False
    prediction: str | None = None
    vae: str | None = None  # in place of the model's own
    text_encoder: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        if self.prediction is not None:
            one_of("prediction", self.prediction, tuple(PREDICTIONS))
        if self.to is not None:
            one_of("to", self.to, FORMS)
        if not self.output.name:
            raise UsageError(f"--output {self.output}: is no new name", "name the file or folder to write")
        if not is_utf8(self.output):
            what = f"--output {self.output}: is no UTF-8, and the libraries that read models open no such path"
            raise UsageError(what, "name another")
        if (self.form == "single-file") != (self.output.suffix == SUFFIX):
            hint = f"a single file is called something{SUFFIX}, a folder is not"
            raise UsageError(f"--to {self.form} with --output {self.output}", hint)

    @property
    def form(self) -> str:
        """What to write."""
        return self.to if self.to is not None else FORMS[self.output.suffix == SUFFIX]
