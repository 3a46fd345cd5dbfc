"""A Stable Diffusion of 200 kB, tokenizer included: what is written and read 20,000 times must be small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests import models, originals

PIECES = 512  # of CLIP's vocabulary, before those that are made by merging: all bytes, within words and at their end
MERGED = ("ca", "cat</w>")
MARKS = ("<|startoftext|>", "<|endoftext|>")
SINGLE = originals.Kind(multiples=(1,), context=4, text_layers=1)


def write(folder: Path, whole: Callable[[Path], Path] = models.write_sd1) -> Path:
    """A model of `tests/models.py` with a vocabulary that knows letters and one word."""
    whole(folder)
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if (folder / encoder).is_dir():
            _shrink(folder / tokenizer, folder / encoder)
    return folder


def _shrink(tokenizer: Path, encoder: Path) -> None:
    vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    pieces = [*sorted(vocabulary, key=vocabulary.__getitem__)[:PIECES], *MERGED, *MARKS]
    numbered = {piece: number for number, piece in enumerate(pieces)}
    (tokenizer / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n", encoding="utf-8")
    models.edit_weights(encoder, lambda weights: {key: _rows(key, one, len(pieces)) for key, one in weights.items()})
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    models.edit_json(encoder / "config.json", vocab_size=len(pieces), **ends)


def _rows(key: str, value: models.Tensor, count: int) -> models.Tensor:
    return value[:count] if key.endswith("token_embedding.weight") else value
