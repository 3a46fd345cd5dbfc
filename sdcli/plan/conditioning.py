"""What a model draws from, and whether that is what was asked for: a prompt, a class, or nothing. No torch."""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass

from sdcli.errors import UsageError
from sdcli.specs import CodecSpec, GenerateSpec

NAMES_SHOWN = 5
MAX_INDEX_DIGITS = 9


@dataclass(frozen=True)
class Label:
    """A class of a model."""

    index: int  # from 0
    name: str


def asked_label(spec: GenerateSpec, names: tuple[str, ...] | None) -> Label | None:
    """The class to draw; None where a prompt says what to draw, or where there is nothing to say.

    names: the classes of the model, as `layout.classes` tells them.
    Raises UsageError when such a model cannot draw what the spec says, or needs to be told more.
    """
    if names is None:
        if spec.class_name is not None:
            raise UsageError(_class(spec.class_name) + "this model draws from a prompt", "say in words what to draw")
        if not spec.prompt.strip():
            raise UsageError("the prompt is empty", 'say what to draw: sdcli generate "a picture of a puppy"')
        return None
    for what, text in (("the prompt", spec.prompt), ("--negative", spec.negative)):
        if text.strip():
            hint = f"leave it out, and name a class with --class: {_some(names)}" if names else "leave it out"
            raise UsageError(f"{what} {reprlib.repr(text)}: this model reads no text", hint)
    if not names:
        _check_unconditional(spec)
        return None
    if spec.class_name is None:
        raise UsageError("this model draws classes, and none is named", f"name one with --class: {_some(names)}")
    return find_class(spec.class_name, names)


def inverted_label(spec: CodecSpec, names: tuple[str, ...] | None) -> Label | None:
    """The class that a picture to be inverted shows; None where the model reads what it shows in words, or nothing.

    names: the classes of the model, as `layout.classes` tells them.
    Raises UsageError as `asked_label`; of words there may be none.
    """
    if names is None:
        return None
    if spec.negative.strip():
        raise UsageError(f"--negative {reprlib.repr(spec.negative)}: this model reads no text", "leave it out")
    given = spec.invert or ""
    if names:
        if not given.strip():
            raise UsageError("--invert: this model draws classes, and none is named", f"name one of {_some(names)}")
        return find_class(given, names, option="--invert")
    if given.strip():
        raise UsageError(f"--invert {reprlib.repr(given)}: this model is unconditional", "give it empty: --invert ''")
    if spec.guidance > 1:
        raise UsageError(f"--guidance {spec.guidance:g}: this model is unconditional", "leave it out")
    return None


def find_class(given: str, names: tuple[str, ...], *, option: str = "--class") -> Label:
    """The class of exactly this name; where there is none and it is all digits, of this index.

    option: where it was given, for errors.
    Raises UsageError, with the closest names, when there is neither.
    """
    if given in names:
        return Label(names.index(given), given)
    if given.isascii() and given.isdigit():
        index = int(given[: MAX_INDEX_DIGITS + 1])
        if index < len(names) and len(given) <= MAX_INDEX_DIGITS:
            return Label(index, names[index])
        raise UsageError(
            _class(given, option) + "out of range", f"the indices go from 0 to {len(names) - 1}: {_some(names)}"
        )
    folded = {name.casefold(): name for name in names}
    close = [folded[key] for key in difflib.get_close_matches(given.casefold(), folded, n=3)]
    advice = f"did you mean {' or '.join(close)}?" if close else f"there are {_some(names)}"
    raise UsageError(_class(given, option) + "this model has no such class", advice)


def _check_unconditional(spec: GenerateSpec) -> None:
    if spec.class_name is not None:
        raise UsageError(_class(spec.class_name) + "this model has no classes", "leave it out")
    if spec.guidance is not None and spec.guidance > 1:
        what = f"--guidance {spec.guidance:g}: this model is unconditional, there is nothing to guide it to"
        raise UsageError(what, "leave it out")


def _class(given: str, option: str = "--class") -> str:
    return f"{option} {reprlib.repr(given)}: "


def _some(names: tuple[str, ...]) -> str:
    """The first names of all, and how many there are."""
    listed = ", ".join(names[:NAMES_SHOWN])
    return listed if len(names) <= NAMES_SHOWN else f"{listed}, ... ({len(names)} in all)"
