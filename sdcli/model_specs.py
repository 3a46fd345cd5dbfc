"""What the user asked of a model's files, validated. No torch, no Typer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdcli import hub
from sdcli.checks import DTYPES, PREDICTIONS, one_of
from sdcli.errors import UsageError
from sdcli.files import is_utf8
from sdcli.hub import HubId

COPIES = ("auto", "float32", "float16")  # of weights that are published in both
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


@dataclass(frozen=True, kw_only=True)
class PullSpec:
    """`sdcli models pull`."""

    model: str
    dtype: str = "auto"  # auto: the copy that is in the cache, else float32 or what else is published
    offline: bool = False

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, COPIES)
        if hub.parse(self.model) is None:
            raise UsageError(f"{self.model}: is no Hub id", "write it as owner/name[/FILE][@REVISION]")
        if self.offline or hub.is_offline():
            name = "--offline" if self.offline else "HF_HUB_OFFLINE"
            raise UsageError(f"{name} with models pull, which asks the Hub what it has", "leave one of them out")

    @property
    def hub_id(self) -> HubId:
        """What to fetch."""
        found = hub.parse(self.model)
        assert found is not None
        return found
