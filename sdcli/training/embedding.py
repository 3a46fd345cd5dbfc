"""WHAT train-embedding trains: the vectors of a new word (textual inversion), and nothing else of the model.

Source: Gal et al. 2022, arXiv:2208.01618, section 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding as look_up

from sdcli.errors import SdcliWarning, UsageError
from sdcli.pipeline import text
from sdcli.pipeline.adapters import Embedding, check_token, write_embedding
from sdcli.pipeline.bundle import TextEncoder
from sdcli.train_specs import TrainEmbeddingSpec
from sdcli.training import data, denoising, parts, start
from sdcli.training.conditions import Condition, Texts
from sdcli.training.denoising import Write
from sdcli.training.loop import Preparing, Report
from sdcli.training.parts import ModelParts

TEMPLATES = {  # what is said of a picture that has no caption with the new word in it
    "object": ("a picture of {}", "an image of {}", "{}", "a photo of {}", "a close-up of {}", "a drawing of {}"),
    "style": ("a picture in the style of {}", "an image in the style of {}", "{}", "a drawing in the style of {}"),
}


def run(spec: TrainEmbeddingSpec) -> Iterator[Report]:
    """Learn a word for what the pictures show, and yield what happens; RUN/export has it in three dialects."""
    check_token(spec.token, "--token")
    accelerator = start.accelerator_for(spec)
    dataset = _named(data.find(spec.data, spec.caption), spec)
    model, rows, condition = prepare(spec, parts.model_as_it_is(spec, accelerator.device))

    def ready(cache: Path) -> Generator[Preparing, None, tuple[Condition, Write]]:
        yield from ()
        return condition, lambda folder, step: _write(folder, spec, rows, step)

    yield from denoising.run(spec, "embedding", dataset, model, accelerator, learned=rows, prepare=ready)


def prepare(spec: TrainEmbeddingSpec, model: ModelParts) -> tuple[ModelParts, LearnedRows, Texts]:
    """The model with a text encoder that knows the new word, the rows of it that learn, and how captions get there.

    Raises UsageError for a model without a text encoder, InputError for a word that it knows already.
    """
    conditioner = model.bundle.conditioner
    if not isinstance(conditioner, TextEncoder):
        raise UsageError("--model: this one has no text encoder to learn a word", "use a model that reads prompts")
    encoder = text.with_embeddings(conditioner, [Embedding(spec.token, first_vectors(conditioner, spec))])
    rows = LearnedRows(encoder, spec.vectors)
    encoder.model.requires_grad_(False).set_input_embeddings(rows)
    condition = Texts(encoder, spec.caption_dropout, is_trained=True)
    return replace(model, bundle=replace(model.bundle, conditioner=encoder)), rows, condition


class LearnedRows(nn.Module):
    """A token table of which the last rows alone are parameters; no optimizer can move the others."""

    table: Tensor

    def __init__(self, encoder: TextEncoder, count: int) -> None:
        super().__init__()
        whole = _table(encoder)
        self.register_buffer("table", whole[:-count], persistent=False)
        self.vectors = nn.Parameter(whole[-count:].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """(B, 77) ids -> (B, 77, D)."""
        known = len(self.table)
        is_new = ids >= known
        new = look_up((ids - known).clamp(min=0), self.vectors)
        return torch.where(is_new[..., None], new, look_up(ids.clamp(max=known - 1), self.table))


def first_vectors(encoder: TextEncoder, spec: TrainEmbeddingSpec) -> Tensor:
    """Where the vectors begin: at the rows of `--init-token`'s pieces, in turn. Returns (n, D) float32.

    Raises UsageError when it has none.
    """
    pieces = encoder.tokenizer(spec.init_token, add_special_tokens=False, verbose=False)["input_ids"]
    if not pieces:
        raise UsageError(f"--init-token {spec.init_token!r}: says nothing", "name a word, such as cat")
    rows = [pieces[i % len(pieces)] for i in range(spec.vectors)]
    return _table(encoder)[rows].float().cpu()


def _write(folder: Path, spec: TrainEmbeddingSpec, rows: LearnedRows, step: int) -> None:
    write_embedding(folder, Embedding(spec.token, rows.vectors), step=step)


def _table(encoder: TextEncoder) -> Tensor:
    return cast("nn.Embedding", encoder.model.get_input_embeddings()).weight.detach()


def _named(dataset: data.Dataset, spec: TrainEmbeddingSpec) -> data.Dataset:
    """The dataset with captions that name the new word: the pictures' own where they do, else the templates."""
    if spec.caption is not None and spec.token not in spec.caption:
        raise UsageError(f"--caption {spec.caption!r}: does not name {spec.token}", "name it, or leave the option out")
    without = sum(bool(s.captions) and not any(spec.token in c for c in s.captions) for s in dataset.samples)
    if without:
        text = f"the captions of {without} of {len(dataset.samples)} pictures do not name {spec.token}: templates stand"
        warnings.warn(f"{text} for them", SdcliWarning, stacklevel=2)
    templates = tuple(template.format(spec.token) for template in TEMPLATES[spec.kind])
    samples = [
        replace(sample, captions=tuple(c for c in sample.captions if spec.token in c) or templates)
        for sample in dataset.samples
    ]
    return replace(dataset, samples=tuple(samples))
