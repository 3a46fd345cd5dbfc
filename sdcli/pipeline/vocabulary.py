"""What turns a prompt into rows of the token table: tokenizer, learned tokens, swapped words. No torch, no weights."""

from __future__ import annotations

import copy
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sdcli import layout
from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.pipeline import prompt as syntax
from sdcli.pipeline.prompt import Chunks, Piece
from sdcli.pipeline.tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MARKS = 2  # begin and end, around the pieces of every chunk
MAX_POSITIONS = 10_000  # of a text encoder; CLIP has 77


@dataclass(frozen=True)
class Swap:
    """Other rows of the token table in place of a word's own; each is a weighted sum of rows that were there."""

    option: str  # as the user wrote it, such as `--mix puppy=0.5,cat=0.5`
    word: tuple[int, ...]  # the tokenizer's ids of the word
    rows: tuple[int, ...]  # what is fed in their place
    terms: tuple[tuple[float, tuple[int, ...]], ...]  # weight and rows of each word that is summed

    @property
    def is_new(self) -> bool:
        """Whether the rows are new ones at the end of the table, not those of another word."""
        return self.rows != self.terms[0][1]


@dataclass(frozen=True)
class Vocabulary:
    """All that a prompt's pieces depend on."""

    tokenizer: CLIPTokenizer
    length: int  # positions of the text encoder, 77 for CLIP
    rows: int  # of the token table
    learned: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # tokenizer's id -> rows of the token table
    swaps: tuple[Swap, ...] = ()
    beside: Vocabulary | None = None  # of a second text encoder, which reads the same prompts

    @property
    def room(self) -> int:
        """Pieces that one chunk holds."""
        return self.length - MARKS


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder, from its tokenizer and the text encoder's config, with a second one beside it.

    Raises InputError, also where two text encoders do not know the same pieces.
    """
    first, *others = (_vocabulary(folder, encoder) for encoder in layout.encoders(folder))
    for other in others:
        check_alike(folder, first, other)
        first = replace(first, beside=other)
    return first


def _vocabulary(folder: Path, encoder: str) -> Vocabulary:
    tokenizer, config = load_tokenizer(layout.tokenizer(folder, encoder), encoder), layout.config(folder, encoder)
    found = {}
    # The defaults are those of transformers, which does not write what equals them.
    for key, default, most in (("max_position_embeddings", 77, MAX_POSITIONS), ("vocab_size", 49408, 1 << 24)):
        found[key] = config.get(key, default)
        if type(found[key]) is not int or not MARKS < found[key] <= most:
            raise InputError(f"{folder}/{encoder}: {key} is {reprlib.repr(found[key])}", "mend its config.json")
    check_fit(folder, tokenizer, found["vocab_size"], encoder)
    return Vocabulary(tokenizer, found["max_position_embeddings"], found["vocab_size"])


def load_tokenizer(folder: Path, encoder: str = "text_encoder") -> CLIPTokenizer:
    """The CLIP tokenizer in a folder: vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes.

    folder: as `layout.tokenizer` gives it; of a single file it is CLIP's own, padded as that encoder was trained.
    """
    checkpoint = layout.single_file(folder)
    if checkpoint is None:
        return read_tokenizer(folder)
    found = read_tokenizer(layout.TOKENIZER_FOLDER)
    found.pad_token = checkpoint.pad_tokens[encoder]
    return found


def check_fit(folder: Path, tokenizer: CLIPTokenizer, rows: int, encoder: str = "text_encoder") -> None:
    """Raise InputError when the tokenizer of a model folder gives ids that its token table does not have."""
    if len(tokenizer) > rows:
        what = f"has {len(tokenizer):,} pieces, the text encoder knows {rows:,}"
        raise InputError(f"{folder / layout.TOKENIZERS[encoder]}: {what}", "they belong to different models")


def check_alike(folder: Path, first: Vocabulary, second: Vocabulary) -> None:
    """Raise InputError unless two text encoders of a model know the same pieces; what fills a chunk may differ."""
    one, other = (vocabulary.tokenizer.get_vocab() for vocabulary in (first, second))
    if one != other or (first.length, first.rows) != (second.length, second.rows):
        what = f"{folder}: its two text encoders do not know the same pieces"
        raise InputError(what, "they belong to different models")


def read(vocabulary: Vocabulary, prompt: str) -> Chunks:
    """The pieces of a prompt, with their weights, in the chunks that the text encoder reads one by one.

    Of two text encoders they are the first one's, filled to the chunks of the one that needs more.
    Raises UsageError for a weight out of range.
    """
    sections = syntax.parse(prompt)
    spans = [span for section in sections for span in section]
    ids = iter(pieces(vocabulary, [span.text for span in spans]))
    read_ids = [[_piece(vocabulary, one, span.weight) for span in section for one in next(ids)] for section in sections]
    found = syntax.chunked([_swapped(section, vocabulary.swaps) for section in read_ids], vocabulary.room)
    if vocabulary.beside is None:
        return found
    other = read(vocabulary.beside, prompt)
    rest = max(found.rest, other.rest, key=len)
    return replace(found.padded(max(len(found.chunks), len(other.chunks))), rest=rest)


def pieces(vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
    """The tokenizer's ids of some texts, all of them and no marks."""
    if not texts:
        return []
    return list(vocabulary.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def marked(vocabulary: Vocabulary, rows: Sequence[int]) -> tuple[int, ...]:
    """Rows with the begin mark before, the end mark behind and padding up to the encoder's length."""
    tokenizer = vocabulary.tokenizer
    padding = [int(tokenizer.pad_token_id)] * (vocabulary.room - len(rows))
    return (int(tokenizer.bos_token_id), *rows, int(tokenizer.eos_token_id), *padding)


def chunk_rows(vocabulary: Vocabulary, chunk: Sequence[Piece]) -> tuple[int, ...]:
    """The rows of a chunk, with marks and padding."""
    return marked(vocabulary, [row for piece in chunk for row in piece.rows])


def chunk_weights(vocabulary: Vocabulary, chunk: Sequence[Piece]) -> tuple[float, ...]:
    """The weight of each position of a chunk; marks and padding count 1."""
    weights = [piece.weight for piece in chunk for _ in piece.rows]
    return (1.0, *weights, *[1.0] * (vocabulary.length - 1 - len(weights)))


def with_tokens(vocabulary: Vocabulary, tokens: Iterable[tuple[str, int]]) -> Vocabulary:
    """A vocabulary that also knows learned tokens, each of so many vectors; the one given stays as it is.

    A token of n vectors is `tok tok_1 ... tok_{n-1}` to the tokenizer, as in diffusers, and a prompt that names `tok`
    gets all n in order; the rows follow those there are.
    Raises InputError for a token that the vocabulary has or that was given before.
    """
    tokens = list(tokens)
    tokenizer, learned, end = copy.deepcopy(vocabulary.tokenizer), dict(vocabulary.learned), vocabulary.rows
    for token, vectors in tokens:
        first, end = end, end + vectors
        for row in range(first, end):
            name = token if row == first else f"{token}_{row - first}"
            learned[_add_token(tokenizer, name, learned)] = tuple(range(row, end)) if row == first else (row,)
    beside = with_tokens(vocabulary.beside, tokens) if vocabulary.beside is not None else None
    return replace(vocabulary, tokenizer=tokenizer, learned=learned, rows=end, beside=beside)


def with_swap(vocabulary: Vocabulary, option: str, word: str, terms: Sequence[tuple[str, float]]) -> Vocabulary:
    """A vocabulary that feeds the weighted sum of some words' vectors wherever a word stands.

    Raises UsageError for words of unequal numbers of tokens, a word that is swapped already, or one that two text
    encoders cut apart.
    """
    names = [word, *(name for name, _ in terms)]
    ids, *others = found = pieces(vocabulary, names)
    counts = {name: len(_rows(vocabulary, one)) for name, one in zip(names, found, strict=True)}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        told = ", ".join(f"{name} is {count} token{'s' if count != 1 else ''}" for name, count in counts.items())
        raise UsageError(f"{option}: {told}", "words can be swapped that have equally many; see sdcli tokens")
    if any(swap.word == tuple(ids) for swap in vocabulary.swaps):
        raise UsageError(f"{option}: {word} is swapped already", "say in one option what stands for it")
    summed = tuple((weight, _rows(vocabulary, one)) for one, (_, weight) in zip(others, terms, strict=True))
    is_another = len(summed) == 1 and summed[0][0] == 1.0
    end = vocabulary.rows + (0 if is_another else counts[word])
    rows = summed[0][1] if is_another else tuple(range(vocabulary.rows, end))
    swap = Swap(option, tuple(ids), rows, summed)
    beside = with_swap(vocabulary.beside, option, word, terms) if vocabulary.beside is not None else None
    if beside is not None and beside.swaps[-1] != swap:
        what = f"{option}: to the second text encoder of this model an exclamation mark is a piece apart"
        raise UsageError(what, "name the words without it")
    return replace(vocabulary, rows=end, swaps=(*vocabulary.swaps, swap), beside=beside)


def row_name(vocabulary: Vocabulary, row: int) -> str:
    """A row of the token table as a person reads it: a piece, a vector of a learned token, or a sum of such."""
    for piece, rows in vocabulary.learned.items():
        if row in rows[:1]:
            return str(vocabulary.tokenizer.convert_ids_to_tokens(piece))
    for swap in vocabulary.swaps:
        if swap.is_new and row in swap.rows:
            at = swap.rows.index(row)
            return " + ".join(f"{weight:g} {row_name(vocabulary, rows[at])}" for weight, rows in swap.terms)
    return str(vocabulary.tokenizer.convert_ids_to_tokens(row))


def warn_of_cut(found: Chunks, what: str) -> None:
    """Warn when a prompt has more pieces than are read. what: `prompt` or `negative prompt`."""
    if found.cut:
        note = f"the {what} is too long: the last {found.cut} of {found.kept + found.cut} tokens are not used"
        warnings.warn(note, SdcliWarning, stacklevel=2)


def warn_of_unheard(negative: str) -> None:
    """Warn of a negative prompt where guidance is off."""
    if negative.strip():
        note = "the negative prompt is not used: at guidance 1 nothing leads away from it"
        warnings.warn(note, SdcliWarning, stacklevel=2)


def warn_of_unused(swaps: Iterable[Swap], *read: Chunks) -> None:
    """Warn of each word to swap that the prompt does not have: the option was given, and changes nothing.

    read: the prompt as it was drawn, and with every choice of its wildcards.
    """
    used = {piece.swap for found in read for chunk in found.chunks for piece in chunk}
    for swap in swaps:
        if swap.option not in used:
            note = f"{swap.option}: the prompt does not have the word, so it changes nothing"
            warnings.warn(note, SdcliWarning, stacklevel=2)


def _piece(vocabulary: Vocabulary, one: int, weight: float) -> Piece:
    return Piece(one, vocabulary.learned.get(one, (one,)), weight)


def _rows(vocabulary: Vocabulary, ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(row for one in ids for row in vocabulary.learned.get(one, (one,)))


def _swapped(section: list[Piece], swaps: Sequence[Swap]) -> list[Piece]:
    """The pieces with other rows wherever a word to swap stands; of two that begin alike, the longer one counts."""
    by_first: dict[int, list[Swap]] = {}
    for swap in sorted(swaps, key=lambda one: -len(one.word)):
        by_first.setdefault(swap.word[0], []).append(swap)
    found: list[Piece] = []
    at = 0
    while at < len(section):
        for swap in by_first.get(section[at].id, ()):
            there = section[at : at + len(swap.word)]
            if tuple(piece.id for piece in there) == swap.word:
                found += _fed(there, swap)
                at += len(there)
                break
        else:
            found.append(section[at])
            at += 1
    return found


def _fed(word: Sequence[Piece], swap: Swap) -> list[Piece]:
    """The pieces of a word with the rows of a swap, as many each as they had."""
    rest, found = swap.rows, []
    for piece in word:
        rows, rest = rest[: len(piece.rows)], rest[len(piece.rows) :]
        found.append(replace(piece, rows=rows, swap=swap.option))
    return found


def _add_token(tokenizer: CLIPTokenizer, name: str, learned: Mapping[int, tuple[int, ...]]) -> int:
    """Teach a tokenizer a new name and return its id. Raises InputError for one that it knows."""
    known_pieces, known = tokenizer(name, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(name)
    if len(known_pieces) == 1 or known != tokenizer.unk_token_id:
        what = "is given twice" if known_pieces[0] in learned else "is in the vocabulary already"
        raise InputError(f"the token {name} {what}", "name another, as in FILE:<my-cat>")
    is_word = re.fullmatch(r"\w(.*\w)?", name) is not None
    from tokenizers import AddedToken  # deferred: only what adds tokens pays for it

    tokenizer.add_tokens([AddedToken(name, single_word=is_word, normalized=True)])
    return cast("int", tokenizer.convert_tokens_to_ids(name))
