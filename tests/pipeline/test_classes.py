"""One row for each class and one for any: labels become contexts of one token."""

from __future__ import annotations

import pytest
import torch

from sdcli.pipeline.bundle import build
from sdcli.pipeline.classes import ClassEmbedder


@pytest.mark.parametrize(("names", "rows"), [(("cat", "dog"), 3), ((), 1)])
def test_there_is_a_row_for_each_class_and_a_last_one_for_any(names: tuple[str, ...], rows: int) -> None:
    embedder = ClassEmbedder(names, 6)
    assert embedder.embedding.weight.shape == (rows, 6)
    assert embedder.null == rows - 1


def test_a_label_becomes_one_token() -> None:
    embedder = ClassEmbedder(("cat", "dog"), 6)
    context = embedder(torch.tensor([1, embedder.null, 1, 0]))
    assert context.shape == (4, 1, 6)
    assert torch.equal(context[:, 0], embedder.embedding.weight[[1, 2, 1, 0]])


def test_only_the_rows_that_are_used_learn() -> None:
    embedder = ClassEmbedder(("cat", "dog"), 6)
    embedder(torch.tensor([0, embedder.null])).square().sum().backward()
    assert embedder.embedding.weight.grad is not None
    assert embedder.embedding.weight.grad.abs().sum(dim=1).bool().tolist() == [True, False, True]


def test_its_config_builds_it_again() -> None:
    embedder = ClassEmbedder(("cat", "dog"), 6)
    again = build({"_class_name": "ClassEmbedder", **embedder.config})
    assert isinstance(again, ClassEmbedder)
    assert again.config == embedder.config == {"width": 6, "names": ["cat", "dog"]}
