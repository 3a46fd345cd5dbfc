"""Where results go: names from a prompt, and what a path may be. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter

from sdcli import latent_files
from sdcli.checks import FolderPath
from sdcli.errors import OutputError, UsageError
from sdcli.files import check_writable, exists, is_folder, open_regular, remove_dead_parts
from sdcli.specs import GenerateSpec

SLUG_LENGTH = 60
SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
FIELD_FORM = re.compile(r"[<>^]?0?\d{0,3}(\.\d{1,3})?[sdxXbefg]?")  # of Python's forms what makes sense in a name
MAX_WEBP_SIDE = 16_383  # px
GALLERY = "gallery.html"  # in a batch's folder
PAGE_OF_OURS = b'<meta name="generator" content="sdcli">'  # among the first lines of every page
MAX_NAME_BYTES = 255  # of a file, on every file system in common use


def targets(
    spec: GenerateSpec, seeds: Sequence[int], subjects: Sequence[str], settings: Mapping[str, object]
) -> tuple[Path, ...]:
    """The path of each image: a name of its own in a folder, or by a template, or the file, numbered from the second.

    subjects: what each picture shows, in words; settings: what a template may name besides index, seed and slug.
    Raises UsageError for what cannot be a name, OutputError when a folder cannot be written, or a file is there that
    must not be replaced.
    """
    output = spec.output
    has_fields = is_template(output)
    if has_fields and isinstance(output, FolderPath):
        output = output / "{slug}-{seed}"
    many = not has_fields and is_output_folder(output)
    if has_fields:
        form = _template_format(str(_parted(output)[1]), spec.format)
    else:
        form = picture_format(Path() if many else output, spec.format)
    check_quality(form, spec.quality)
    check_sides(form, settings)
    if str(output) == "-":
        return (output,)
    if has_fields:
        each = [{"seed": one, "slug": slug(words)} for one, words in zip(seeds, subjects, strict=True)]
        paths = [_filled(output, form, {"index": i, **own, **settings}) for i, own in enumerate(each, start=1)]
        paths = apart(paths, spec.if_exists)
    elif many:
        paths = [output / f"{slug(words)}-{seed}.{form}" for seed, words in zip(seeds, subjects, strict=True)]
    else:
        paths = _numbered(output, len(seeds))
    for path in paths:
        check_names(path)
    for folder in {path.parent for path in paths}:
        check_writable(folder)
    check_free(paths, spec.if_exists)
    return tuple(paths)


def latent_targets(spec: GenerateSpec, seeds: Sequence[int], subjects: Sequence[str]) -> tuple[Path, ...]:
    """The path of each image's latents: the file named, numbered from the second on, or names as of the pictures.

    subjects, errors: as in `targets`.
    """
    place = spec.save_latents
    if place is None:
        return ()
    check_names(place, "--save-latents")
    many = is_output_folder(place)
    if not many and place.suffix.lower() != ".safetensors":
        raise UsageError(
            f"--save-latents {place}: latents are safetensors", "name a .safetensors file, or a folder as NAME/"
        )
    check_writable(place if many else place.parent)
    if many:
        names = [f"{slug(words)}-{seed}{latent_files.SUFFIX}" for seed, words in zip(seeds, subjects, strict=True)]
    else:
        ending = latent_files.SUFFIX if place.name.endswith(latent_files.SUFFIX) else place.suffix
        names = [place.name, *(f"{place.name.removesuffix(ending)}-{i}{ending}" for i in range(2, len(seeds) + 1))]
    paths = tuple((place if many else place.parent) / name for name in names)
    check_free(paths, spec.if_exists)
    return paths


def picture_format(output: Path, asked: str | None) -> str:
    """The format of a picture, `png`, `webp` or `jpg`: by its suffix if it has one, else the one asked for, else PNG.

    Raises UsageError for a suffix that names none of them, or another than asked for.
    """
    suffix = output.suffix.lower()
    if not suffix:
        return asked if asked is not None else "png"
    if suffix not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise UsageError(
            f"--output {output}: is of no kind of picture", f"name a file of {kinds}, or a folder as NAME/"
        )
    if asked not in (None, SUFFIXES[suffix]):
        raise UsageError(f"--output {output} with --format {asked}: contradict each other", "leave out --format")
    return SUFFIXES[suffix]


def check_quality(form: str, quality: int | None) -> None:
    """Raise UsageError for a quality of what has none."""
    if quality is not None and form == "png":
        raise UsageError(f"--quality {quality}: a PNG picture loses nothing", "leave it out, or use --format webp")


def is_output_folder(output: Path) -> bool:
    """Whether `--output` means a folder: one that is there, a name without a suffix, or with a slash at its end."""
    return isinstance(output, FolderPath) or is_folder(output) or output.suffix == ""


def slug(subject: str) -> str:
    """A prompt, or the name of a class, as a file name: lower-case letters and digits, words joined by hyphens."""
    words = "".join(c if c.isalnum() else " " for c in subject.lower()).split()
    name = "-".join(words).encode()[: SLUG_LENGTH * 2].decode(errors="ignore")[:SLUG_LENGTH].strip("-")
    return name or "image"


def check_names(output: Path, option: str = "--output") -> None:
    """Raise OutputError when a name in the path is longer than file systems take."""
    for name in output.parts:
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise OutputError(f"{option} {name[:40]}...: has over {MAX_NAME_BYTES} bytes", "choose a shorter name")


def check_targets(paths: Sequence[Path], if_exists: str) -> None:
    """Raise OutputError now, before any work, if one of the files could not be put in place.

    Of each folder the part files that killed processes left are removed.
    """
    for path in paths:
        check_names(path)
    for folder in dict.fromkeys(path.parent for path in paths):
        check_writable(folder)
        remove_dead_parts(folder)
    check_free(paths, if_exists)


def check_gallery(folder: Path, if_exists: str) -> None:
    """Raise OutputError when the gallery of a folder could not be put in place, or would take that of a page of others.

    if_exists: `overwrite` lets it.
    """
    path = folder / GALLERY
    if not exists(path):
        return
    if is_folder(path):
        raise OutputError(f"{path}: is a folder", "move it away, or leave out --gallery")
    with open_regular(path) as stream:
        is_ours = PAGE_OF_OURS in stream.read(1000)
    if not is_ours and if_exists != "overwrite":
        raise OutputError(f"{path}: exists and is no gallery of sdcli", "move it away, or use --if-exists overwrite")


def check_free(targets: Iterable[Path], if_exists: str) -> None:
    """Raise OutputError when a file is there although `--if-exists error` forbids it, or a folder in its place."""
    for path in targets:
        if if_exists != "number" and is_folder(path):
            raise OutputError(f"{path}: is a folder", "choose another name")
        if if_exists == "error" and path.exists():
            raise OutputError(f"{path}: exists", "choose another name, or another --if-exists")


def is_template(output: Path) -> bool:
    """Whether a path has fields to fill, or braces written twice, behind the folders of it that are there."""
    return not set("{}").isdisjoint(str(_parted(output)[1]))


def fill(template: str, values: Mapping[str, object]) -> str:
    """A template with its fields filled: `{seed}`, `{index:04d}`, and `{{` for a brace.

    A value stays in the part of the path where it stands: see `_safe`. Fields are names alone: Python's own formatting
    would look up attributes and items of what it is given.
    Raises UsageError for an unknown field, or a form that does not fit one.
    """
    filled = ""
    for literal, field, form, conversion in _pieces(template):
        filled += literal
        if field is None:
            continue
        if field not in values:
            raise UsageError(f"--output {template}: {{{field}}} is no field", f"there are {', '.join(values)}")
        if conversion or not FIELD_FORM.fullmatch(form or ""):
            what = f"{field}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise UsageError(f"--output {template}: {{{what}}} is in no form for names", "write it as in {index:04d}")
        value = values[field]
        form = "g" if not form and isinstance(value, float) else form or ""
        try:
            filled += _safe(format(value, form))
        except (ValueError, OverflowError) as error:
            what = f"--output {template}: {{{field}:{form}}}: {str(error)[:1].lower()}{str(error)[1:]}"
            raise UsageError(what, "write it as in {index:04d} or {slug:.20}") from error
    return filled


def _parted(output: Path) -> tuple[Path, Path]:
    """The folders of a path that are there, whatever braces their names have, and the rest of it."""
    there = next((one for one in (output, *output.parents) if is_folder(one)), Path())
    return there, output.relative_to(there)


def _pieces(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """Text, field, form and conversion of each piece of a template. Raises UsageError for a brace without partner."""
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        what = f"--output {template}: has a brace without its partner"
        raise UsageError(what, "write {{ for a brace that is none of a field") from error


def _template_format(template: str, asked: str | None) -> str:
    """The format by the suffix of a template, which is what is written, not what a field may end with."""
    return picture_format(Path(template) if _has_suffix(template) else Path(), asked)


def _has_suffix(template: str) -> bool:
    tail = ""
    for literal, field, _, _ in _pieces(template):
        tail = tail + literal if field is None else ""
    return Path("x" + tail).suffix != ""


def _filled(template: Path, form: str, values: Mapping[str, object]) -> Path:
    there, rest = _parted(template)
    path = fill(str(rest), values)
    return there / (path if _has_suffix(str(rest)) else f"{path}.{form}")


def _safe(value: str) -> str:
    """A value as a piece of a file name: no separator, no control character, no dot at an end, never empty."""
    plain = "".join(c if c.isalnum() or c in "-_.+," else "-" for c in value)
    return plain.strip(".-") or "_"


def apart(paths: Sequence[Path], if_exists: str) -> list[Path]:
    """The same paths, equal ones numbered. Raises UsageError unless `--if-exists number` asks for that."""
    taken: set[Path] = set()
    numbers: dict[Path, int] = {}
    found: list[Path] = []
    for path in paths:
        if path in taken and if_exists != "number":
            raise UsageError(f"{path}: would be the name of two pictures", "add {seed} or {index} to the template")
        one = path
        while one in taken:
            numbers[path] = numbers.get(path, 1) + 1
            one = path.with_name(f"{path.stem}-{numbers[path]}{path.suffix}")
        taken.add(one)
        found.append(one)
    return found


def _numbered(output: Path, count: int) -> list[Path]:
    numbers = (output.with_name(f"{output.stem}-{i}{output.suffix.lower()}") for i in range(2, count + 1))
    return [output, *numbers]


def check_sides(form: str, settings: Mapping[str, object]) -> None:
    """Raise UsageError for a width or height in px that the format cannot have."""
    for name in ("width", "height"):
        if form == "webp" and isinstance(side := settings.get(name), int) and side > MAX_WEBP_SIDE:
            raise UsageError(f"{name} {side} px: WebP takes up to {MAX_WEBP_SIDE}", "use --format png")
