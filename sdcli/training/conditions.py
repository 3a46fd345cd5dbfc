"""What a UNet is told of a picture while it learns: the text or the class, or nothing. A short table of three."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sdcli.errors import InputError, SdcliWarning
from sdcli.pipeline import text
from sdcli.pipeline.bundle import TextEncoder
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.training import caches
from sdcli.training.loop import Preparing
from sdcli.training.samples import Sample


class Condition(Protocol):
    """How a sample's condition gets into a batch, and from there to the UNet."""

    @property
    def module(self) -> nn.Module | None:
        """What makes context of a batch's rows and is trained along; None where `context` does."""

    def row(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """What a batch holds of one sample; all chance, such as leaving the condition out, from the generator."""

    def context(self, rows: Tensor) -> Tensor:
        """Context (B, n, D) of a batch's rows; as they are where the trained module makes it."""


class Texts:
    """A caption of the sample, or the empty one; encoded before the run or, by an encoder that learns, in it."""

    def __init__(self, encoder: TextEncoder, dropout: float, *, is_trained: bool) -> None:
        self.encoder, self.dropout = encoder, dropout
        self.module = LearnedText(encoder.model) if is_trained else None
        self.cached: dict[str, int] = {}  # caption -> row of `rows`
        self.rows = torch.empty(0)

    def cache(self, folder: Path, captions: Sequence[str], batch_size: int) -> Iterator[Preparing]:
        """Encode all captions there are to a file in `folder`, once."""
        yield from caches.fill_contexts(folder / "contexts.safetensors", self.encoder, captions, batch_size=batch_size)

    def use_cache(self, folder: Path, captions: Sequence[str]) -> None:
        """Take contexts from the file of `cache` from now on."""
        self.cached = {caption: row for row, caption in enumerate(captions)}
        self.rows = caches.contexts(folder / "contexts.safetensors")

    def row(self, sample: Sample, generator: torch.Generator) -> Tensor:
        chosen = int(torch.randint(max(1, len(sample.captions)), (), generator=generator))
        is_dropped = bool(torch.rand((), generator=generator) < self.dropout)
        caption = "" if is_dropped or not sample.captions else sample.captions[chosen]
        if self.cached:
            return self.rows[self.cached[caption]]
        return torch.tensor(text.tokenize(self.encoder, caption).ids)

    def context(self, rows: Tensor) -> Tensor:
        if self.cached or self.module is not None:
            return rows
        with torch.no_grad():
            context: Tensor = self.encoder.model(input_ids=rows).last_hidden_state
        return context


class LearnedText(nn.Module):
    """A text encoder as a module from ids to context."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """(B, 77) -> (B, 77, D)"""
        context: Tensor = self.model(input_ids=ids).last_hidden_state
        return context


class Classes:
    """The index of the sample's class, or of the null class; of an unconditional model always that one."""

    def __init__(self, embedder: ClassEmbedder, dropout: float) -> None:
        self.module, self.dropout = embedder, dropout

    def row(self, sample: Sample, generator: torch.Generator) -> Tensor:
        is_dropped = bool(torch.rand((), generator=generator) < self.dropout)
        names = self.module.names
        if is_dropped or not names:
            return torch.tensor(self.module.null)
        return torch.tensor(names.index(sample.label) if sample.label is not None else self.module.null)

    def context(self, rows: Tensor) -> Tensor:
        return rows


def check_classes(names: Sequence[str], samples: Sequence[Sample]) -> None:
    """Raise InputError unless every sample has a class that the model knows."""
    for sample in samples:
        if sample.label is None:
            raise InputError(f"{sample.place}: has no class", "sort the pictures into one folder a class")
        if sample.label not in names:
            raise InputError(
                f"{sample.place}: is of class {sample.label!r}, the model knows {len(names)} others",
                "train another with --init",
            )


def warn_of_cut(encoder: TextEncoder, captions: Sequence[str]) -> None:
    """Warn once of captions that are longer than the text encoder reads."""
    long = sum(text.tokenize(encoder, caption).cut > 0 for caption in captions)
    if long:
        what = f"{long} of {len(captions)} captions are too long for the text encoder: their ends are not used"
        warnings.warn(what, SdcliWarning, stacklevel=2)


def captions(samples: Sequence[Sample]) -> list[str]:
    """Every caption once, the empty one first."""
    return list(dict.fromkeys(["", *(caption for sample in samples for caption in sample.captions)]))
