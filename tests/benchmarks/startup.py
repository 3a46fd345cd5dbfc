"""Measure what a user waits for before the first step: help pages, and a whole `generate` beside plain diffusers.

    python tests/benchmarks/startup.py [--runs 7] [--model builtin|FOLDER] [--json]

Each pair runs in turn, A B A B ..., in processes of their own. What is compared is the median of user + system CPU time
and the ratio pair by pair, so that a machine whose speed drifts favours nobody.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sdcli import store

ONE_OPTION = """
import typer
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
@app.command()
def hello(name: str = typer.Option("you", help="Whom to greet.")) -> None:
    "Greet."
    print(name)
app()
"""

PLAIN_DIFFUSERS = """
import sys, json, torch
from pathlib import Path
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
folder, target = Path(sys.argv[1]), sys.argv[2]
guidance = json.loads((folder / "sdcli.json").read_text()).get("guidance", 7.5)
pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator("cpu").manual_seed(7)
image = pipe("a picture of a puppy", num_inference_steps=25, guidance_scale=guidance, generator=generator).images[0]
image.save(target)
"""

HELP_LIMIT = 1.5  # times the one-option program
SDCLI = (sys.executable, "-m", "sdcli")


@dataclass(frozen=True)
class Cost:
    """What one process took, in seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Pair:
    """Two commands timed in turn; `ratio` is the median of A/B of their CPU times, pair by pair."""

    name: str
    a_cpu: float
    b_cpu: float
    a_wall: float
    b_wall: float
    ratio: float


def main() -> None:
    """Parse the command line, measure, print; exit code 1 when a help page is over its limit."""
    parser = argparse.ArgumentParser(description="Measure start-up.")
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs (default 7)")
    parser.add_argument("--model", default="builtin", help="builtin, or a folder in the diffusers layout")
    parser.add_argument("--json", action="store_true", help="print one JSON object a pair")
    arguments = parser.parse_args()
    folder = store.resolve(arguments.model, offline=True).folder
    with tempfile.TemporaryDirectory() as scratch:
        one_option, plain = Path(scratch, "one_option.py"), Path(scratch, "plain.py")
        one_option.write_text(ONE_OPTION, encoding="utf-8")
        plain.write_text(PLAIN_DIFFUSERS, encoding="utf-8")
        yardstick = (sys.executable, str(one_option), "--help")
        draw = (*SDCLI, "generate", "a picture of a puppy", "--steps", "25", "--scheduler", "dpm", "--seed", "7")
        draw = (*draw, "--model", str(folder), "--if-exists", "overwrite", "-o", f"{scratch}/a.png")
        rows = [
            compare("sdcli --help / one-option Typer", (*SDCLI, "--help"), yardstick, arguments.runs),
            compare(
                "sdcli generate --help / one-option Typer", (*SDCLI, "generate", "--help"), yardstick, arguments.runs
            ),
            compare(
                "sdcli generate / plain diffusers",
                draw,
                (sys.executable, str(plain), str(folder), f"{scratch}/b.png"),
                arguments.runs,
            ),
        ]
    for row in rows:
        if arguments.json:
            print(json.dumps(asdict(row)))
        else:
            print(
                f"{row.name}: CPU {row.a_cpu:.2f} / {row.b_cpu:.2f} s, wall {row.a_wall:.2f} / {row.b_wall:.2f} s, "
                f"ratio of CPU {row.ratio:.2f}"
            )
    sys.exit(0 if all(row.ratio <= HELP_LIMIT for row in rows if "help" in row.name) else 1)


def compare(name: str, a: Sequence[str], b: Sequence[str], runs: int) -> Pair:
    """Run both once to warm the disk cache, then `runs` times in turn."""
    once(a), once(b)
    pairs = [(once(a), once(b)) for _ in range(runs)]
    median = statistics.median
    return Pair(
        name,
        a_cpu=median(x.cpu for x, _ in pairs),
        b_cpu=median(y.cpu for _, y in pairs),
        a_wall=median(x.wall for x, _ in pairs),
        b_wall=median(y.wall for _, y in pairs),
        ratio=median(x.cpu / y.cpu for x, y in pairs),
    )


def once(command: Sequence[str]) -> Cost:
    """Run a command to its end, its output thrown away, by the system's own accounting."""
    began = time.perf_counter()
    silence = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawn(command[0], list(command), os.environ, file_actions=silence)
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - began)


if __name__ == "__main__":
    main()
