"""What is asked for in words -> what the UNet is told: each prompt read once, each context computed once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdcli.errors import SdcliWarning
from sdcli.pipeline import known_words, prompt, text, vocabulary
from sdcli.pipeline.adapters import Embedding
from sdcli.pipeline.bundle import Conditioner, Encoders
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.context import Context, joined
from sdcli.pipeline.contexts import Condition, labelled, led_away
from sdcli.pipeline.prompt import Chunks
from sdcli.pipeline.wildcards import Prompts
from sdcli.plan import Plan
from sdcli.plan.words import warn_of_networks

MOST_KEPT = 2048  # prompts
MOST_KEPT_BYTES = 512 << 20  # of contexts: 2,200 of Stable Diffusion 1.5's of one chunk, 800 of XL's


@dataclass(frozen=True)
class Reading:
    """What the words of an image are to a model."""

    condition: Condition
    negative: Condition | None  # None without guidance
    chunks: Chunks | None  # of the prompt; None for a model that reads no text
    away: Chunks | None  # of the negative prompt, None likewise
    count: int  # of chunks that prompt and negative prompt are filled to: those alike can be drawn together
    unknown: tuple[str, ...] = ()  # words of the prompt that the model never saw
    away_unknown: tuple[str, ...] = ()  # of the negative prompt, likewise


class Reader:
    """What a model makes of words, kept for those that come again."""

    def __init__(self, conditioner: Conditioner, embeddings: Sequence[Embedding]) -> None:
        self._conditioner, self._embeddings = conditioner, embeddings
        self._readings: dict[object, Reading] = {}
        self._contexts: dict[object, Context] = {}
        self._networks: set[str] = set()  # those in prompts that were warned of

    def ask(self, conditioner: Conditioner) -> None:
        """Read with the same model from now on, wherever it lies."""
        self._conditioner = conditioner

    def forget(self) -> None:
        """Let go of all prompts."""
        self._readings.clear()
        self._contexts.clear()

    def read(self, prompts: Prompts, plan: Plan) -> Reading:
        """What these words are; warns of what is cut or has no use, once for each that is kept."""
        said = (prompts.prompt, prompts.negative, plan.label, plan.guidance > 1)
        if said not in self._readings:
            if len(self._readings) >= MOST_KEPT:
                self._readings.clear()
            self._readings[said] = self._read(prompts, plan)
        return self._readings[said]

    def contexts(self, readings: Sequence[Reading]) -> tuple[Context, Context | None]:
        """The context of images that are drawn together, and that to keep away from, if any; each image's is encoded
        alone, so that its neighbours change no bit of it."""
        positive = joined([self._context(one.condition, one.count, is_negative=False) for one in readings])
        negatives = [(one.negative, one.count) for one in readings if one.negative is not None]
        away = [self._context(words, count, is_negative=True) for words, count in negatives]
        return positive, joined(away) if away else None

    def _read(self, prompts: Prompts, plan: Plan) -> Reading:
        conditioner, has_guidance = self._conditioner, plan.guidance > 1
        if isinstance(conditioner, ClassEmbedder):
            label = plan.label.index if plan.label is not None else conditioner.null
            return Reading(label, conditioner.null if has_guidance else None, None, None, 1)
        chunks, negative = text.read(conditioner, prompts.prompt), prompts.negative if has_guidance else None
        vocabulary.warn_of_cut(chunks, "prompt")
        is_all = prompts.prompt_template is None
        choices = chunks if is_all else text.read(conditioner, prompts.prompt_choices)
        vocabulary.warn_of_unused(conditioner.swaps, chunks, choices)
        away = text.read(text.without_swaps(conditioner), negative) if negative is not None else None
        if away is not None:
            vocabulary.warn_of_cut(away, "negative prompt")
        else:
            vocabulary.warn_of_unheard(prompts.negative)
        named = [one for one in prompt.networks(prompts.prompt, prompts.negative) if one not in self._networks]
        self._networks.update(named)
        warn_of_networks(named)
        self._warn_of_unnamed(conditioner, prompts, plan)
        count = max(len(one.chunks) for one in (chunks, away) if one is not None)
        unknown = self._unknown(plan, prompts.prompt, "prompt")
        away_unknown = self._unknown(plan, negative, "negative prompt") if negative is not None else ()
        return Reading(prompts.prompt, negative, chunks, away, count, unknown, away_unknown)

    def _unknown(self, plan: Plan, words: str, what: str) -> tuple[str, ...]:
        """The words that the model never saw, with a warning."""
        found = known_words.unknown(plan.known_words, words, [one.token for one in self._embeddings])
        known_words.warn_of_unknown(found, what)
        return found

    @torch.no_grad()
    def _context(self, words: Condition, count: int, *, is_negative: bool) -> Context:
        """The context (B = 1) of a prompt filled to k chunks, or of a label."""
        name = (words, count, is_negative)
        if name not in self._contexts:
            conditioner = self._conditioner
            if isinstance(conditioner, ClassEmbedder):
                found = labelled(conditioner, [words])
            elif is_negative:
                found = led_away(conditioner, str(words), count)
            else:
                found = text.encode_prompts(conditioner, [str(words)], count)
            if (1 + len(self._contexts)) * found.hidden.nbytes > MOST_KEPT_BYTES:
                self._contexts.clear()
            self._contexts[name] = found
        return self._contexts[name]

    def _warn_of_unnamed(self, encoder: Encoders, prompts: Prompts, plan: Plan) -> None:
        """Warn of each learned token that no choice of a prompt names: it was given, and changes nothing."""
        read = [(encoder, words) for words in dict.fromkeys((prompts.prompt, prompts.prompt_choices))]
        if plan.guidance > 1:
            plain, negatives = text.without_swaps(encoder), (prompts.negative, prompts.negative_choices)
            read += [(plain, words) for words in dict.fromkeys(negatives)]
        for file, embedding in zip(plan.embeddings, self._embeddings, strict=True):
            if not any(text.names(reader, words, embedding.token) for reader, words in read):
                note = f"--embedding {file.path}: no prompt names its token {embedding.token}, so it changes nothing"
                warnings.warn(note, SdcliWarning, stacklevel=2)
