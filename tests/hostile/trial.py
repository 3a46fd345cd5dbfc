"""One hostile file tried by the command itself, in a process of its own, and what that cost and left behind."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.forks import Forks
from tests.hostile.attacks import CANARY, Attack

# How much a refusal may cost above a plain start with all imports done (issue and README): seconds of CPU, and memory.
SECONDS, MEGABYTES = 3.0, 200
# The process that reads pickles: its own start, which is importing torch, and the same above it.
CHILD_SECONDS, CHILD_MEGABYTES = 5.0 + SECONDS, 450 + MEGABYTES
DRAWN = "out.png"
MAX_LINE = 1000  # characters
CODE = """
import json, os, resource, signal, sys, time
os.chdir(arguments[0])
from sdcli.cli import app
signal.alarm(120)
memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
code = int(app.run(arguments[1:]))
child, own = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
told = {"code": code, "seconds": time.process_time() - began, "megabytes": (own.ru_maxrss - memory) / 1024}
told |= {"child_seconds": child.ru_utime + child.ru_stime, "child_megabytes": child.ru_maxrss / 1024}
sys.stdout.flush()
os.write(1, b"\\n" + json.dumps(told).encode())
"""


@dataclass(frozen=True)
class Trial:
    """What came of an attack. seconds: of CPU, imports not counted. megabytes: the most above a plain start."""

    attack: Attack
    code: int
    said: str
    new: tuple[str, ...] = ()
    has_run: bool = False
    seconds: float = 0.0
    megabytes: float = 0.0
    child_seconds: float = 0.0
    child_megabytes: float = 0.0

    @property
    def has_left(self) -> bool:
        """Whether there are other files than before, but for the picture where a file may be read."""
        return self.new != ((DRAWN,) if self.attack.code == 0 else ())

    def faults(self) -> list[str]:
        """What was not clean about it, in words; nothing if all was."""
        found = {
            f"exit code {self.code}": self.code != self.attack.code,
            f"{self.said.count(chr(10))} lines: {self.said}": self.said.count("\n") != (self.attack.code != 0),
            f"a line of {len(self.said)} characters": len(self.said) > MAX_LINE,
            "unprintable": not self.said.rstrip("\n").isprintable(),
            f"left {self.new}": self.has_left,
            "a payload was run": self.has_run,
            f"{self.seconds:.1f} s": self.seconds > SECONDS,
            f"{self.megabytes:.0f} MB": self.megabytes > MEGABYTES,
            f"{self.child_seconds:.1f} s of the child": self.child_seconds > CHILD_SECONDS,
            f"{self.child_megabytes:.0f} MB of the child": self.child_megabytes > CHILD_MEGABYTES,
        }
        return [what for what, is_so in found.items() if is_so]


def tried(attack: Attack, folder: Path, forks: Forks) -> Trial:
    """Try an attack in a folder, which is made, and goes afterwards."""
    folder.mkdir()
    here = Path.cwd()
    os.chdir(folder)
    try:
        command = [str(argument) for argument in attack.prepare()]
        before = names(folder)
        ended = forks.python(CODE, [str(folder), *command])
        told = json.loads(ended.stdout.splitlines()[-1]) if ended.code == 0 and ended.stdout else {"code": ended.code}
        new = tuple(sorted(names(folder) - before))
        return Trial(attack, said=ended.stderr, new=new, has_run=(folder / CANARY).exists(), **told)
    finally:
        os.chdir(here)
        shutil.rmtree(folder)


def names(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
