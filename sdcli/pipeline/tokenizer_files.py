"""The files of a CLIP tokenizer -> transformers' CLIPTokenizer, made of pieces, merges and marks alone. No torch.

transformers' own `from_pretrained` takes whatever a tokenizer_config.json says for an argument, paths among it, and
opens files that nobody named; so what it would read of a CLIP tokenizer is read here, and nothing else.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdcli.errors import InputError
from sdcli.files import read_bytes
from sdcli.layout import MAX_JSON_BYTES, read_json, root

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

Pieces = dict[str, int]
Merges = list[tuple[str, str]]

MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MAX_TOKENIZER_BYTES = 5 << 20  # of tokenizer.json, where CLIP's has 3.6 MB
MAX_ADDED = 10_000  # tokens besides the vocabulary
MAX_TOKEN = 200  # characters
ID = re.compile(r"[0-9]{1,9}")  # of a token, as a name in JSON
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half of a pair, which no encoding has


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a folder: of tokenizer.json, as transformers 5 writes it, else of vocab.json and merges.txt.

    Raises InputError for a file that is missing, malformed or leads out of the model, and for ids that have gaps.
    """
    from transformers import CLIPTokenizer  # deferred: 1 s, and only what reads text pays for it

    whole, added = folder / "tokenizer.json", dict[str, Any]()
    if os.path.lexists(whole):
        pieces, merges, added = _of_one_file(whole)
    else:
        pieces, merges = _json(folder / "vocab.json"), _merges(folder / "merges.txt")
    _check_pieces(folder, pieces)
    said = _said(folder)
    added = _added(folder, said, added)
    marks = {key: _mark(folder, key, said[key], added) for key in MARKS if said.get(key) is not None}
    extra = [_token(folder, "extra_special_tokens", one) for one in _extra(folder, said)]
    tokens = {number: _token(folder, key, {**one, "content": key}) for key, (number, one) in added.items()}
    make = cast("Callable[..., CLIPTokenizer]", CLIPTokenizer)  # whose types are narrower than what it takes
    try:
        found = make(pieces, merges, **marks, extra_special_tokens=extra, added_tokens_decoder=tokens)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise _refusal(folder, f"is no CLIP tokenizer ({reprlib.repr(str(error))})") from error
    for key, (number, _) in added.items():
        if found.convert_tokens_to_ids(key) != number:
            raise _refusal(folder, f"gives {reprlib.repr(key)} the id {number}, which does not follow the others")
    return found


def _json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a model's tokenizer."""
    return read_json(path, within=root(path.parent.parent, path), max_bytes=most)


def _of_one_file(path: Path) -> tuple[Pieces, Merges, dict[str, Any]]:
    """Pieces, merges and added tokens (content -> id and flags) of a tokenizer.json."""
    value = _json(path, MAX_TOKENIZER_BYTES)
    model, added = value.get("model"), value.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(added, list):
        raise _refusal(path, "has no vocab")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise _refusal(path, "has no merges")
    try:
        tokens = {one["content"]: (one["id"], one) for one in added}
    except (KeyError, TypeError) as error:
        raise _refusal(path, "has added tokens without content and id") from error
    return model["vocab"], _pairs(path, [one.split(" ") if isinstance(one, str) else one for one in merges]), tokens


def _merges(path: Path) -> Merges:
    """The pairs of a merges.txt, one a line, after its version."""
    try:
        text = read_bytes(path, max_bytes=MAX_JSON_BYTES, within=root(path.parent.parent, path)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(path, "is no text in UTF-8") from error
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return _pairs(path, [line.split(" ") for line in lines])


def _pairs(path: Path, merges: list[Any]) -> Merges:
    found = [(str(one[0]), str(one[1])) for one in merges if isinstance(one, list) and len(one) == 2]
    if len(found) < len(merges) or not found:
        raise _refusal(path, "has no merges, or some that are no pairs")
    return found


def _check_pieces(folder: Path, pieces: Pieces) -> None:
    """Raise InputError unless the pieces have the ids from 0 on, each its own: then their count is the rows needed."""
    if not pieces or not all(type(number) is int and 0 <= number < len(pieces) for number in pieces.values()):
        raise _refusal(folder, "has a vocabulary whose ids are not those from 0 on")
    if len(set(pieces.values())) < len(pieces):
        raise _refusal(folder, "has a vocabulary with an id twice")


def _said(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json and, in older folders, special_tokens_map.json say of marks."""
    found: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if os.path.lexists(path) and "added_tokens_decoder" not in found:
            said = _json(path)
            for key in MARKS:  # also where the other file says it again, and this one is not listened to
                if said.get(key) is not None and _content(said[key]) is None:
                    raise _refusal(path, f"has the token {reprlib.repr(said[key])} for {key}")
            found |= {key: said[key] for key in (*MARKS, *EXTRA, "added_tokens_decoder") if key in said}
    return found


def _added(folder: Path, said: Mapping[str, Any], of_file: Mapping[str, Any]) -> dict[str, tuple[int, dict[str, Any]]]:
    """Tokens besides the vocabulary, and those of it that are matched whole: content -> id and flags."""
    found: dict[Any, tuple[Any, Any]] = {}
    path, decoder = folder / "added_tokens.json", said.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict) or not all(isinstance(one, dict) for one in decoder.values()):
            raise _refusal(folder, "has an added_tokens_decoder without tokens")
        found = {_content(one): (int(key) if ID.fullmatch(key) else None, one) for key, one in decoder.items()}
    else:
        marks = {_content(said.get(key)) for key in MARKS}
        if os.path.lexists(path):
            for token, number in _json(path).items():
                found[token] = (number, {"normalized": token not in marks, "special": token in marks})
        found |= of_file
    if len(found) > MAX_ADDED:
        raise _refusal(folder, f"has {len(found):,} tokens besides its vocabulary")
    if not all(isinstance(token, str) and type(number) is int for token, (number, _) in found.items()):
        raise _refusal(folder, "has tokens without a text and an id besides its vocabulary")
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def _content(mark: object) -> str | None:
    """The text of a mark or token; None where it has none."""
    content = mark.get("content") if isinstance(mark, dict) else mark
    return content if isinstance(content, str) else None


def _mark(folder: Path, key: str, value: Any, added: Mapping[str, tuple[int, dict[str, Any]]]) -> AddedToken:
    """A mark as it is matched in texts: as it is described among the added tokens, else where it is named."""
    content = _content(value)
    if content is not None and content in added:
        return _token(folder, key, {**added[content][1], "content": content})
    return _token(folder, key, {"special": True, **value} if isinstance(value, dict) else value)


def _extra(folder: Path, said: Mapping[str, Any]) -> Iterator[Any]:
    for key in EXTRA:
        value = said.get(key) or []
        if not isinstance(value, list) or len(value) > MAX_ADDED:
            raise _refusal(folder, f"has {key} that are no list of tokens")
        yield from value


def _token(folder: Path, key: str, value: Any) -> AddedToken:
    """A token as transformers describes one, in a text or with how it is matched."""
    from tokenizers import AddedToken  # deferred, as above

    said = {"content": value, "special": True} if isinstance(value, str) else value
    content = _content(said)
    flags = {flag: said[flag] for flag in FLAGS if isinstance(said, dict) and flag in said}
    if content is None or not _is_text(content) or not all(map(_is_flag, flags.values())):
        raise _refusal(folder, f"has the token {reprlib.repr(value)} for {key}")
    return AddedToken(content, **flags)


def _is_text(content: str) -> bool:
    """Whether a token has a length in range and can be written: halves of surrogate pairs cannot."""
    return 1 <= len(content) <= MAX_TOKEN and not SURROGATE.search(content)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _refusal(place: Path, what: str) -> InputError:
    return InputError(f"{place}: {what}", "use the model's own tokenizer folder")
