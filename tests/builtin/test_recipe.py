"""The pictures and captions the embedded model learns from."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from sdcli.builtin import recipe, words

TOKENIZER = Path(recipe.__file__).parent / "model" / "tokenizer"

needs_emoji = pytest.mark.skipif(
    not (recipe.FONT.is_file() and recipe.EMOJI_LIST.is_file() and features.check("raqm")),
    reason="needs the Debian packages fonts-noto-color-emoji and unicode-data, and Pillow with libraqm",
)
needs_tokenizer = pytest.mark.skipif(not TOKENIZER.is_dir(), reason="the embedded model has not been built")


@pytest.fixture
def few_concepts(monkeypatch: pytest.MonkeyPatch) -> list[recipe.Concept]:
    few = [concept for concept in recipe.concepts() if concept.name in {"dog face", "black cat", "grapes"}]
    monkeypatch.setattr(recipe, "concepts", lambda: few)
    return few


def metadata(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def scenes_and_captions() -> list[tuple[recipe.Scene, str]]:
    found = []
    for concept in recipe.concepts()[::9]:
        for number, scene in enumerate(recipe.scenes(random.Random(concept.name), 20)):
            rng = random.Random(f"{concept.name}/{number}")
            found += [(scene, caption) for caption in recipe.captions(concept, scene, rng)]
    return found


@needs_emoji
def test_there_are_285_concepts_with_different_names_and_files() -> None:
    assert len(recipe.concepts()) == 285
    assert len({concept.name for concept in recipe.concepts()}) == 285
    assert len({concept.slug for concept in recipe.concepts()}) == 285


@needs_emoji
def test_every_phrase_belongs_to_one_concept() -> None:
    counts = Counter(phrase for concept in recipe.concepts() for phrase in recipe.phrases(concept))
    assert [phrase for phrase, count in counts.items() if count > 1] == []


@needs_emoji
def test_every_entry_of_the_word_tables_is_in_use() -> None:
    names = {concept.name for concept in recipe.concepts()}
    known = {phrase for concept in recipe.concepts() for phrase in recipe.phrases(concept)}
    assert words.SYNONYMS.keys() - names == set()
    assert words.HEADS - names == set()
    assert words.WITHOUT_ARTICLE - known == set()


@needs_emoji
@pytest.mark.parametrize(
    ("phrase", "name"),
    [("puppy", "dog face"), ("dog", "dog"), ("kitten", "cat face"), ("apple", "red apple"), ("coffee", "hot beverage")],
)
def test_a_plain_word_is_the_thing_people_mean(phrase: str, name: str) -> None:
    assert [concept.name for concept in recipe.concepts() if phrase in recipe.phrases(concept)] == [name]


@needs_emoji
def test_the_canonical_name_comes_first_and_in_lower_case() -> None:
    assert all(recipe.phrases(concept)[0] == concept.name.lower() for concept in recipe.concepts())


@pytest.mark.parametrize(
    ("phrase", "adjective", "expected"),
    [
        ("puppy", "", "a puppy"),
        ("owl", "", "an owl"),
        ("owl", "small", "a small owl"),
        ("ewe", "", "a ewe"),
        ("unicorn", "", "a unicorn"),
        ("herb", "", "an herb"),
        ("grapes", "", "grapes"),
        ("grapes", "tiny", "tiny grapes"),
        ("face of a dog", "", "the face of a dog"),
        ("orange background", "", "an orange background"),
    ],
)
def test_articles_follow_english(phrase: str, adjective: str, expected: str) -> None:
    assert recipe.with_article(phrase, adjective) == expected


@needs_emoji
def test_every_concept_is_visible_on_white_and_looks_like_no_other() -> None:
    pictures = [recipe.render(concept, 16) for concept in recipe.concepts()]
    assert all(np.asarray(picture).min() < 200 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@needs_emoji
def test_a_large_picture_is_centred_and_fills_nine_tenths() -> None:
    for concept in recipe.concepts()[::20]:
        drawn = np.argwhere(np.asarray(recipe.render(concept, 200)).min(axis=2) < 250)
        low, high = drawn.min(axis=0), drawn.max(axis=0) + 1
        assert (high - low).max() == pytest.approx(180, abs=6)
        assert (low + high) / 2 == pytest.approx([100, 100], abs=4)


@needs_emoji
def test_drawing_at_a_fraction_of_a_pixel_moves_the_picture_by_it() -> None:
    concept = recipe.concepts()[0]
    shifts = []
    for centre in (0.5, 0.5 + 0.25 / 64):
        darkness = 255.0 - np.asarray(recipe.render(concept, 64, fill=0.5, centre=(centre, 0.5))).mean(axis=2)
        shifts.append((darkness.sum(axis=0) * np.arange(64)).sum() / darkness.sum())
    assert shifts[1] - shifts[0] == pytest.approx(0.25, abs=0.02)


@needs_emoji
def test_drawing_twice_gives_equal_bytes(tmp_path: Path, few_concepts: list[recipe.Concept]) -> None:
    for name in ("one", "two"):
        recipe.draw(tmp_path / name, seed=3, count=6)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.*")} for name in ("one", "two"))
    assert len(one) == 3 * 6 + 1
    assert one == two


@needs_emoji
def test_another_seed_gives_other_pictures(tmp_path: Path, few_concepts: list[recipe.Concept]) -> None:
    for seed in (0, 1):
        recipe.draw(tmp_path / str(seed), seed=seed, count=2)
    first = [(tmp_path / str(seed) / "images" / "dog-face-001.png").read_bytes() for seed in (0, 1)]
    assert first[0] != first[1]


@needs_emoji
def test_the_metadata_names_every_picture_and_at_least_four_captions(
    tmp_path: Path, few_concepts: list[recipe.Concept]
) -> None:
    recipe.draw(tmp_path, size=32, count=5)
    records = metadata(tmp_path)
    assert {record["file_name"] for record in records} == {f"images/{p.name}" for p in (tmp_path / "images").iterdir()}
    for record in records:
        with Image.open(tmp_path / str(record["file_name"])) as picture:
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
        assert isinstance(record["text"], list)
        assert len(set(record["text"])) == len(record["text"]) >= 4


@needs_emoji
def test_captions_that_name_no_colour_come_only_with_white_pictures() -> None:
    for scene, caption in scenes_and_captions():
        named = re.findall(r"(\w+) background", caption)
        assert named == [scene.colour] or (named == [] and scene.colour == "white"), caption


@needs_emoji
def test_captions_that_name_no_size_and_no_place_come_only_with_large_pictures() -> None:
    cells = {place: cell for cell, places in words.PLACES.items() for place in places}
    any_place = "|".join(sorted(cells, key=len, reverse=True))  # longest first: "at the top left" is not "at the top"
    any_size = "|".join(words.SMALL)
    for scene, caption in scenes_and_captions():
        named = [cells[place] for place in re.findall(rf" ({any_place})\b", caption)]
        says_small = re.search(rf"\b({any_size})\b", caption) is not None
        if scene.fill == recipe.LARGE:
            assert (named, says_small) == ([], False), caption
        else:
            assert named == [scene.cell] or (named == [] and scene.cell == (0, 0) and says_small), caption


@needs_emoji
def test_the_first_caption_of_a_plain_picture_says_nothing_but_the_name() -> None:
    plain = recipe.Scene(recipe.LARGE, (0, 0), "white")
    for concept in recipe.concepts():
        first = recipe.captions(concept, plain, random.Random(0))[0]
        assert first == f"a picture of {recipe.with_article(concept.name.lower())}"


def test_the_scenes_are_mostly_plain_and_show_every_colour_and_every_place() -> None:
    scenes = [scene for seed in range(10) for scene in recipe.scenes(random.Random(seed), 40)]
    large = [scene for scene in scenes if scene.fill == recipe.LARGE]
    assert Counter(scene.colour == "white" for scene in large) == {True: 320, False: 50}
    assert {scene.colour for scene in large} == set(words.COLOURS)
    assert {scene.cell for scene in scenes if scene.fill == recipe.SMALL} == set(words.PLACES)


@needs_emoji
def test_a_drawn_scene_has_its_colour_and_is_in_its_cell() -> None:
    concept = recipe.concepts()[0]
    for cell in words.PLACES:
        scene = recipe.Scene(recipe.SMALL, cell, "blue")
        pixels = np.asarray(recipe.draw_scene(concept, scene, random.Random(0), 64)).astype(int)
        ground = pixels[0, 0] if cell != (-1, -1) else pixels[-1, -1]
        assert abs(ground - words.COLOURS["blue"]).max() <= recipe.SHADE_JITTER
        drawn = np.argwhere(abs(pixels - ground).max(axis=2) > 24)
        row, column = (drawn.min(axis=0) + drawn.max(axis=0) - 63) / 2 / 64  # of the middle, from the picture's middle
        assert (round(column * 5), round(row * 5)) == cell


@needs_tokenizer
def test_the_tokenizer_gives_the_ids_of_clip() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    tokens = tokenizer("A picture of a puppy", padding="max_length").input_ids
    assert len(tokenizer) == recipe.VOCABULARY
    assert tokens == [49406, 320, 1674, 539, 320, 6829] + [49407] * 71


@needs_tokenizer
def test_the_tokenizer_is_what_the_merge_list_gives(tmp_path: Path) -> None:
    unused = "\nnot a merge of CLIP's"  # the original file goes on past the merges in use
    merges = (TOKENIZER / "merges.txt").read_text(encoding="utf-8").rstrip("\n") + unused
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(merges.encode("utf-8")))
    recipe.write_tokenizer(tmp_path / "bpe.txt.gz", tmp_path / "out")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (TOKENIZER / name).read_bytes()


def test_a_merge_list_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"#version: 0.2\na b\n"))
    with pytest.raises(ValueError, match="49408"):
        recipe.write_tokenizer(tmp_path / "bpe.txt.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
