"""The words of a drawing: prompts and their wildcards, and the files that embeddings are learned into. No torch."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.files import exists, open_regular
from sdcli.pipeline import prompt, wildcards
from sdcli.pipeline.adapter_facts import check_pair, check_widths, vector_widths
from sdcli.pipeline.lora_keys import is_safetensors, read_header
from sdcli.pipeline.wildcards import Prompts, Template
from sdcli.plan.parts import text_widths
from sdcli.specs import GenerateSpec, WordSwap

MAX_NETWORK = 60  # characters of what names one that are told


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual-inversion file, and what prompts write for it in place of its own token."""

    path: Path
    token: str | None


def embedding_file(text: str) -> EmbeddingFile:
    """What `--embedding FILE[:TOKEN]` means: the whole is the file if there is one of that name, however many colons it
    has; else what follows the last colon is the token.

    Raises UsageError for an empty token, InputError when there is no such file.
    """
    before, after = text.rpartition(":")[::2]
    if not before or exists(Path(text)):
        open_regular(Path(text)).close()
        return EmbeddingFile(Path(text), None)
    if not exists(Path(before)):
        raise InputError(f"--embedding {text}: no such file", "write it as FILE or FILE:TOKEN")
    if not after.strip():
        raise UsageError(f"--embedding {text}: the token after the colon is empty", "write it as FILE or FILE:TOKEN")
    open_regular(Path(before)).close()
    return EmbeddingFile(Path(before), after)


def check_no_words(embeddings: tuple[EmbeddingFile, ...], swaps: tuple[WordSwap, ...]) -> None:
    """Raise UsageError for options that are about words, given to a model that has no text encoder."""
    for option, given in (("--embedding", embeddings), ("--replace and --mix", swaps)):
        if given:
            raise UsageError(f"{option}: this model reads no prompts", "leave it out, or name another model")


def check_embeddings(files: Sequence[EmbeddingFile], folder: Path) -> None:
    """Raise InputError for an embedding of another family of models, as its header tells; others are read later."""
    if not files:
        return
    wanted = [width for width in text_widths(folder) if width is not None]
    for one in files:
        if is_safetensors(one.path):
            shapes, _ = read_header(one.path)
            check_pair(str(one.path), shapes)
            given = vector_widths(shapes)
            if given:
                check_widths(str(one.path), given, wanted)


def check_text(text: str) -> None:
    """Raise UsageError for a prompt that is no valid text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8 arrive as lone surrogates
        raise UsageError(f"the prompt {text!r} is no valid text", "write it in UTF-8") from error


def read_prompts(spec: GenerateSpec) -> tuple[Template, Template]:
    """Prompt and negative prompt, their wildcards found.

    Raises UsageError for what is no valid text, for a weight in any choice that is out of range, and for a prompt that
    may be drawn empty: whether it is must not depend on the seed.
    """
    for text in (spec.prompt, spec.negative):
        check_text(text)
    found = wildcards.template(spec.prompt), wildcards.template(spec.negative)
    for one in found:
        prompt.check(one.choices)
    if found[0].has_wildcards and found[0].may_be_blank:
        what = f"the prompt {reprlib.repr(spec.prompt)}: its wildcards may draw nothing at all"
        raise UsageError(what, "say outside of them what to draw, or leave out the empty choice")
    return found


def check_no_wildcards(text: str, option: str) -> None:
    """Raise UsageError for wildcards where there is no image with a seed that would draw them."""
    if wildcards.template(text).has_wildcards:
        what = f"{option} {reprlib.repr(text)}: has a wildcard, and no image's seed to draw it"
        raise UsageError(what, r"write one of its choices; \{ is a plain brace")


def warn_of_networks(named: Iterable[str]) -> None:
    """Warn of each `<lora:...>` in prompts: it says no file, and to the text encoder it is words like any others.

    named: as `prompt.networks` finds them.
    """
    for one in named:
        note = f"{one[:MAX_NETWORK]} in the prompt is read as words: name the file with --lora FILE:SCALE"
        warnings.warn(note, SdcliWarning, stacklevel=2)


def drawn_prompts(positive: Template, negative: Template, seed: int) -> Prompts:
    """What the image of a seed is drawn of. Raises UsageError where that makes a weight that is out of range."""
    found = wildcards.prompts(positive, negative, seed)
    for template, text in ((positive, found.prompt), (negative, found.negative)):
        if template.has_wildcards:  # else it was looked at as a whole
            prompt.check(text)
    return found
