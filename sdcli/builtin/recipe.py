"""Draw the training pictures of the embedded model: animals, nature and food from an emoji font, with captions.

    python -m sdcli.builtin.recipe draw OUT [--size 64] [--seed 0] [--variants 40]
    python -m sdcli.builtin.recipe tokenizer bpe_simple_vocab_16e6.txt.gz OUT

Needs the Debian packages fonts-noto-color-emoji and unicode-data, and Pillow with libraqm. The same arguments give the
same bytes. A caption that says nothing about size, place or background means large, centred, on white.
"""

import argparse
import functools
import gzip
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from sdcli.builtin import words

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
GROUPS = ("Animals & Nature", "Food & Drink")
LATEST_VERSION = 15.0  # of Unicode's emoji: a newer list must not change the pictures
BITMAP_PX = (136, 128)  # the only bitmap size in the font, reached at 109 points
LARGE, SMALL = 0.9, 0.55  # longest side of the thing over the side of the picture
PLAIN_SHARE, COLOURED_SHARE = 0.80, 0.12  # of the variants; the rest is small, anywhere, on any colour
SMALL_ON_WHITE_SHARE = 0.4
EDGE = 0.03  # least distance of a small thing from the edge, over the side
SHADE_JITTER = 10  # of 255
PICTURE_CAPTIONS = 6  # at least
EXTRAS_SHARE = 0.1
TEMPLATES = (
    *["a picture of {a}"] * 2,
    *["{a}"] * 2,
    *("{bare}", "an image of {a}", "a drawing of {a}", "{bare} emoji"),
)
VOCABULARY = 49_408
MARKS = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class Concept:
    """One thing the embedded model can draw: its Unicode name and its emoji."""

    name: str
    emoji: str

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name.lower())


@dataclass(frozen=True)
class Scene:
    """How a concept is shown: fill is LARGE or SMALL, cell a key of words.PLACES, colour a key of words.COLOURS."""

    fill: float
    cell: tuple[int, int]
    colour: str


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """List every concept, in Unicode's order."""
    if not EMOJI_LIST.is_file():
        raise FileNotFoundError(f"{EMOJI_LIST} is missing: apt-get install unicode-data")
    found, group = [], ""
    for line in EMOJI_LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif group in GROUPS and "; fully-qualified" in line:
            codes, comment = line.split(";")[0], line.split("# ")[1]
            _, version, name = comment.split(" ", 2)
            if float(version.removeprefix("E")) <= LATEST_VERSION:
                found.append(Concept(name, "".join(chr(int(code, 16)) for code in codes.split())))
    return tuple(found)


def phrases(concept: Concept) -> tuple[str, ...]:
    """List what people call a concept, lower case, the canonical name first. No two concepts share a phrase."""
    found = [concept.name.lower(), *words.SYNONYMS.get(concept.name, ())]
    if concept.name.endswith(" face"):
        animal = concept.name.removesuffix(" face")
        found += [f"face of {with_article(animal)}", f"{animal} head"]
    if concept.name in words.HEADS:
        found += [f"{concept.name} face", f"face of {with_article(concept.name)}"]
    return tuple(found)


def with_article(phrase: str, adjective: str = "") -> str:
    """Put the adjective and "a", "an", "the" or nothing before a phrase."""
    thing = f"{adjective} {phrase}" if adjective else phrase
    if phrase in words.WITHOUT_ARTICLE:
        return thing
    if thing.startswith("face of "):
        return f"the {thing}"
    starts_with_vowel = thing[0] in "aeiou" and not thing.startswith(words.CONSONANT_SOUNDS)
    return f"an {thing}" if starts_with_vowel or thing.startswith(words.VOWEL_SOUNDS) else f"a {thing}"


def render(
    concept: Concept,
    size: int = 64,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    fill: float = LARGE,
    centre: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Draw a concept as a square RGB picture.

    size: side in px.  background: sRGB.
    fill: longest side of the thing over the side of the picture, in (0, 1].
    centre: middle of the thing, x and y as shares of the side; what falls outside the picture is cut.
    """
    glyph = _glyph(concept.emoji)
    side = max(glyph.size) / fill  # of the picture, in px of the font's bitmap
    left, top = (share * side - extent / 2 for share, extent in zip(centre, glyph.size, strict=True))
    column, row = math.ceil(left), math.ceil(top)  # whole px to paste at; the box below takes the fraction back
    canvas = Image.new("RGB", (math.ceil(side) + 1,) * 2, background)
    # Pasting before scaling is linear, so it gives what premultiplied alpha gives after scaling.
    canvas.paste(glyph, (column, row), mask=glyph)
    box = (column - left, row - top, column - left + side, row - top + side)
    return canvas.resize((size, size), Image.Resampling.LANCZOS, box=box)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    if not FONT.is_file():
        raise FileNotFoundError(f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
    if not features.check("raqm"):
        raise RuntimeError("Pillow was built without libraqm, which joins emoji sequences: install the wheel from PyPI")
    return ImageFont.truetype(str(FONT), 109, layout_engine=ImageFont.Layout.RAQM)


@functools.lru_cache(maxsize=512)
def _glyph(emoji: str) -> Image.Image:
    """Draw the emoji at the font's own size, cropped to what is visible. Returns RGBA."""
    bitmap = Image.new("RGBA", BITMAP_PX)
    ImageDraw.Draw(bitmap).text((0, 0), emoji, font=_font(), embedded_color=True)
    return bitmap.crop(bitmap.getchannel("A").getbbox())


def scenes(rng: random.Random, count: int) -> list[Scene]:
    """Choose the scenes of one concept: about 80 % plain, 12 % large on a colour, 8 % small anywhere on any colour."""
    plain, coloured = round(PLAIN_SHARE * count), round(COLOURED_SHARE * count)
    colours = [name for name in words.COLOURS if name != "white"]
    rng.shuffle(colours)
    cells = list(words.PLACES)
    rng.shuffle(cells)
    found = [Scene(LARGE, (0, 0), "white")] * plain
    found += [Scene(LARGE, (0, 0), colours[i % len(colours)]) for i in range(coloured)]
    for i in range(count - plain - coloured):
        colour = "white" if rng.random() < SMALL_ON_WHITE_SHARE else rng.choice(colours)
        found.append(Scene(SMALL, cells[i % len(cells)], colour))
    return found


def draw_scene(concept: Concept, scene: Scene, rng: random.Random, size: int) -> Image.Image:
    """Render a scene with the jitter of a training picture: up to 1/64 of the side, 3 % in scale, a shade in colour."""
    shade = words.COLOURS[scene.colour]
    if scene.colour != "white":
        red, green, blue = (min(max(value + rng.randint(-SHADE_JITTER, SHADE_JITTER), 0), 255) for value in shade)
        shade = red, green, blue
    # How far from the picture's middle a cell is: one step for all things, the longest side decides.
    free = (1 - scene.fill) / 2 - EDGE if scene.fill == SMALL else 0.0
    column, row = (0.5 + free * step + rng.uniform(-1, 1) / 64 for step in scene.cell)
    fill = scene.fill * (1 + rng.uniform(-0.03, 0.03))
    return render(concept, size, background=shade, fill=fill, centre=(column, row))


def captions(concept: Concept, scene: Scene, rng: random.Random) -> list[str]:
    """Write different true captions: the plainest first, then every phrase at least once, in changing words."""
    names = phrases(concept)
    found = dict.fromkeys([_caption(names[0], "a picture of {a}", scene, rng, extras=0.0)])
    for name in names:
        found[_caption(name, rng.choice(TEMPLATES), scene, rng)] = None
    while len(found) < PICTURE_CAPTIONS:
        found[_caption(rng.choice(names), rng.choice(TEMPLATES), scene, rng)] = None
    return list(found)


def _caption(phrase: str, template: str, scene: Scene, rng: random.Random, extras: float = EXTRAS_SHARE) -> str:
    """Fill a template and add what the scene needs: size or place if small, background if not white.

    extras: how often to say what needs no saying, that a thing is large or that the background is white.
    """
    adjective, place = "", ""
    if scene.fill == SMALL and scene.cell == (0, 0):
        adjective, place = rng.choice(words.SMALL), rng.choice(("", *words.PLACES[scene.cell]))
    elif scene.fill == SMALL:
        adjective, place = rng.choice(("", *words.SMALL)), rng.choice(words.PLACES[scene.cell])
    elif rng.random() < extras:
        adjective = rng.choice(words.LARGE)
    ground = ""
    if scene.colour != "white" or rng.random() < extras:
        ground = rng.choice(words.GROUNDS).format(with_article(f"{scene.colour} background"))
    bare = f"{adjective} {phrase}" if adjective else phrase
    thing = template.format(a=with_article(phrase, adjective), bare=bare)
    return " ".join(part for part in (thing, place, ground) if part)


def draw(folder: Path, *, size: int = 64, seed: int = 0, count: int = 40) -> None:
    """Write folder/images/*.png and folder/metadata.jsonl: count pictures of each concept."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for concept in concepts():
        for number, scene in enumerate(scenes(random.Random(f"{seed}/{concept.name}"), count)):
            rng = random.Random(f"{seed}/{concept.name}/{number}")
            file_name = f"images/{concept.slug}-{number:03}.png"
            draw_scene(concept, scene, rng, size).save(folder / file_name)
            lines.append(json.dumps({"file_name": file_name, "text": captions(concept, scene, rng)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(merges_file: Path, folder: Path) -> None:
    """Turn CLIP's own merge list into the four files of a Hugging Face CLIPTokenizer.

    Source: github.com/openai/CLIP, clip/simple_tokenizer.py (MIT): the vocabulary is the 256 bytes, the same
    ending a word, one entry for each merge, and two marks.
    """
    lines = gzip.decompress(merges_file.read_bytes()).decode("utf-8").split("\n")
    # Line 0 is a version comment; the file goes on past what CLIP uses.
    merges = lines[1 : VOCABULARY - 2 * 256 - 2 + 1]
    characters = byte_characters()
    entries = [*characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in merges), *MARKS]
    if len(set(entries)) != VOCABULARY:
        raise ValueError(f"{merges_file} gives {len(set(entries))} tokens, CLIP has {VOCABULARY}: wrong file?")
    begin, end = (
        {"content": mark, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} for mark in MARKS
    )
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": MARKS[1]}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "bos_token": {"__type": "AddedToken", **begin},
        "eos_token": {"__type": "AddedToken", **end},
        "unk_token": {"__type": "AddedToken", **end},
        "pad_token": MARKS[1],
        "tokenizer_class": "CLIPTokenizer",
    }
    texts = {
        "vocab.json": json.dumps({entry: number for number, entry in enumerate(entries)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def byte_characters() -> list[str]:
    """List the printable stand-ins of the 256 bytes, CLIP's order: Latin-1 first, then U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m sdcli.builtin.recipe", description="Make what the embedded model learns from."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="draw the training pictures and their captions")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("--size", type=int, default=64, help="side of a picture in px (default 64)")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--variants", type=int, default=40, help="pictures of each concept (default 40)")
    tokenizer = commands.add_parser("tokenizer", help="convert CLIP's merge list to a Hugging Face tokenizer folder")
    tokenizer.add_argument("merges", type=Path, help="bpe_simple_vocab_16e6.txt.gz of openai/CLIP")
    tokenizer.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "draw":
        draw(arguments.out, size=arguments.size, seed=arguments.seed, count=arguments.variants)
    else:
        write_tokenizer(arguments.merges, arguments.out)


if __name__ == "__main__":
    main()
