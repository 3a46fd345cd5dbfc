"""The files that a command is given, folders of them included, and what the result of each is called. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdcli import latent_files
from sdcli.errors import InputError, UsageError
from sdcli.files import is_folder, open_regular
from sdcli.plan.naming import check_targets, is_output_folder


def files_of(inputs: Sequence[Path], suffixes: frozenset[str], *, opened: bool = True) -> list[Path]:
    """The files named, and those of the folders named in the order of their names.

    suffixes: of what is taken from a folder, in lower case. opened: whether a file named must be there to be read.
    Raises InputError when a folder holds none, or a file cannot be read.
    """
    found: list[Path] = []
    for path in inputs:
        if is_folder(path):
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
            if not inside:
                raise InputError(f"{path}: holds no file to read", f"accepted are {', '.join(sorted(suffixes))}")
            found += inside
        else:
            if opened:
                open_regular(path).close()
            found.append(path)
    return found


def targets_of(sources: Sequence[Path], output: Path, suffix: str, if_exists: str) -> list[Path]:
    """Where each result goes: the file named, or the source's stem in the folder named.

    Raises UsageError when that is no place for them all, OutputError when it cannot be written.
    """
    ending = "." + suffix.rpartition(".")[2]
    if str(output) == "-":
        raise UsageError("--output -: nothing of this goes to stdout", "name a file or a folder")
    many = is_output_folder(output)
    if not many and output.suffix.lower() != ending.lower():
        raise UsageError(
            f"--output {output}: the result is a {ending} file", f"name a {ending} file, or a folder as NAME/"
        )
    if not many and len(sources) > 1:
        raise UsageError(f"--output {output}: is one file for {len(sources)} results", "name a folder")
    targets = [output / f"{stem(source)}{suffix}" for source in sources] if many else [output]
    check_apart(targets, if_exists)
    check_targets(targets, if_exists)
    return targets


def check_apart(targets: Sequence[Path], if_exists: str) -> None:
    """Raise UsageError when two results would have one name, unless `--if-exists number` keeps them apart."""
    if if_exists != "number" and len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise UsageError(f"{twice}: would be the result of two inputs", "use --if-exists number, or one at a time")


def stem(source: Path) -> str:
    """The name of a file without its suffix, of a latent file without both."""
    return source.name.removesuffix(latent_files.SUFFIX) if source.name.endswith(latent_files.SUFFIX) else source.stem
