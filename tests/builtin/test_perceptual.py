"""The training of the embedded perceptual network: what it learns from, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from sdcli.builtin import perceptual, recipe
from sdcli.pipeline.features import EMBEDDED_FOLDER, Perceptual, embedded
from sdcli.pipeline.images import to_pixels
from tests.conftest import SHAPES, draw_shape

VARIANTS = 20
needs_emoji = pytest.mark.skipif(
    not (recipe.FONT.is_file() and recipe.EMOJI_LIST.is_file() and features.check("raqm")),
    reason="needs the Debian packages fonts-noto-color-emoji and unicode-data, and Pillow with libraqm",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shapes with twenty pictures each, named as the recipe names them."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "images").mkdir()
    for number, shape in enumerate(SHAPES):
        for variant in range(VARIANTS):
            image = draw_shape(shape, number).resize((32, 32), box=(variant % 3, 0, 32, 32 - variant % 4))
            image.save(folder / "images" / f"{shape}-{variant:03}.png")
    return folder


@pytest.fixture(scope="module")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three steps on these pictures write."""
    out = tmp_path_factory.mktemp("trained") / "network"
    list(perceptual.train(drawn, out, steps=3, seed=0))
    return out


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_every_tenth_picture_of_each_concept_is_held_out(drawn: Path) -> None:
    training, held_out = perceptual.read(drawn)
    assert training.count == held_out.count == len(SHAPES)
    assert torch.bincount(training.concepts).tolist() == [18] * len(SHAPES)
    assert torch.bincount(held_out.concepts).tolist() == [2] * len(SHAPES)
    with Image.open(drawn / "images" / "bar-009.png") as image:  # "bar" is the first by name
        assert Image.fromarray(held_out.values[0].permute(1, 2, 0).numpy()).tobytes() == image.tobytes()


def test_pixels_span_minus_one_to_one(drawn: Path) -> None:
    black_and_white = perceptual.Pictures(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.ones(2), 1)
    assert black_and_white.pixels().flatten().tolist() == [-1.0, 1.0]


def test_a_folder_without_pictures_says_how_to_draw_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m sdcli\.builtin\.recipe draw"):
        perceptual.read(tmp_path)


def test_variation_changes_every_picture_by_the_generator_alone() -> None:
    pixels = random_pixels(8, 3, 64, 64)
    sides = set()
    for seed in range(20):
        one, two = (perceptual.varied(pixels, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.abs().max() < 1 + 6 * perceptual.NOISE
        sides.add(tuple(one.shape))
    assert sides == {(8, 3, 32, 32), (8, 3, 64, 64)}


def test_training_lowers_the_loss(drawn: Path) -> None:
    training, _ = perceptual.read(drawn)
    torch.manual_seed(0)
    losses = list(perceptual.fit(perceptual.Classifier(training.count), training, steps=40, seed=0))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_accuracy_is_the_share_told_right(drawn: Path) -> None:
    training, _ = perceptual.read(drawn)
    classifier = perceptual.Classifier(training.count)
    torch.nn.init.zeros_(classifier.head.weight)
    classifier.head.bias.data = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # says the second for all
    ones_and_twos = training.some(training.concepts < 2)
    assert perceptual.accuracy(classifier, training) == pytest.approx(1 / 6)
    assert perceptual.accuracy(classifier, ones_and_twos) == pytest.approx(1 / 2)


def test_folding_the_normalisation_keeps_what_is_seen() -> None:
    torch.manual_seed(0)
    classifier = perceptual.Classifier(3).requires_grad_(False)
    for _ in range(3):  # the statistics of something
        classifier(random_pixels(8, 3, 32, 32) * 0.5 + 0.3)
    pixels = random_pixels(2, 3, 32, 32, seed=1)
    stages = perceptual.folded(classifier)  # which ends the classifier's own training mode
    x = y = pixels
    for plain, normalised in zip(stages, classifier.stages, strict=True):
        x, y = plain(x), normalised(y)
        assert float((x - y).norm() / y.norm()) < 2e-3  # float16 weights
        assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in plain.children())


def test_what_is_written_is_a_network_whose_stages_weigh_the_same_and_whose_unit_is_another_picture(
    drawn: Path, trained: Path
) -> None:
    network = embedded(trained)
    assert isinstance(network, Perceptual)
    _, held_out = perceptual.read(drawn)
    pixels = held_out.pixels()
    by_stage = network.by_stage(pixels, pixels.roll(len(pixels) // 2, 0)).mean(dim=0)
    assert by_stage.tolist() == pytest.approx([0.2] * 5, rel=1e-3)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(
    drawn: Path, trained: Path, tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        list(perceptual.train(drawn, tmp_path / name, steps=3, seed=seed))
    again, other, first = (
        [(folder / name).read_bytes() for name in ("config.json", "model.safetensors")]
        for folder in (tmp_path / "again", tmp_path / "other", trained)
    )
    assert again == first
    assert other[1] != first[1]


def test_the_embedded_network_has_the_shape_this_recipe_trains(trained: Path) -> None:
    shipped, made = embedded(EMBEDDED_FOLDER), embedded(trained)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (shipped, made)]
    assert shapes[0] == shapes[1]


@needs_emoji
def test_the_embedded_network_knows_a_concept_on_another_background_and_in_another_place() -> None:
    concepts = recipe.concepts()[::5]
    plain = torch.cat([to_pixels(recipe.render(concept)) for concept in concepts])
    other = torch.cat(
        [to_pixels(recipe.render(c, background=(90, 150, 230), fill=0.8, centre=(0.46, 0.53))) for c in concepts]
    )
    network = embedded()
    seen, known = (F.normalize(network.features(pixels)) for pixels in (other, plain))
    right = (seen @ known.T).argmax(dim=1) == torch.arange(len(concepts))
    assert float(right.double().mean()) > 0.9
