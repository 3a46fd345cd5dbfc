"""Measure what `sdcli generate` takes beyond its sampling, by itself and drawn by `sdcli serve`.

    python tests/benchmarks/warm.py [--runs 7] [--steps 25] [--json]

Both run in turn, A B A B ..., on the embedded model, in processes of their own. Overhead is the wall clock of the whole
process less the `seconds` of its record: from the text in hand to the pixels, writing the file left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

SDCLI = (sys.executable, "-m", "sdcli")
LIMIT_SECONDS = 0.4  # of overhead, drawn by a warm process


@dataclass(frozen=True)
class Cost:
    """What one process took, in seconds; `overhead` by the clock, without its sampling."""

    overhead: float
    cpu: float


def main() -> None:
    """Parse the command line, measure, print; exit code 1 when a warm drawing is over its limit."""
    parser = argparse.ArgumentParser(description="Measure the overhead of a warm and of a cold drawing.")
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs (default 7)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default 25)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_RUNTIME_DIR"] = scratch  # a warm process of ours alone
        draw = (*SDCLI, "generate", "a picture of a puppy", "--seed", "7", "--steps", str(arguments.steps), "--json")
        draw = (*draw, "--if-exists", "overwrite", "-o", f"{scratch}/a.png")
        server = subprocess.Popen((*SDCLI, "serve", "--idle", "1h"), stdout=subprocess.PIPE)
        assert server.stdout is not None
        server.stdout.readline()  # ready
        once(draw), once((*draw, "--no-serve"))
        pairs = [(once(draw), once((*draw, "--no-serve"))) for _ in range(arguments.runs)]
        server.terminate()
        server.communicate()
    for name, costs in (("warm", [warm for warm, _ in pairs]), ("cold", [cold for _, cold in pairs])):
        middle = Cost(statistics.median(c.overhead for c in costs), statistics.median(c.cpu for c in costs))
        least = min(cost.overhead for cost in costs)
        if arguments.json:
            print(json.dumps({"name": name, **asdict(middle), "least_overhead": least}))
        else:
            print(f"{name}: overhead {middle.overhead:.2f} s (least {least:.2f} s), CPU time {middle.cpu:.2f} s")
    sys.exit(0 if statistics.median(warm.overhead for warm, _ in pairs) < LIMIT_SECONDS else 1)


def once(command: tuple[str, ...]) -> Cost:
    """Run a drawing to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall - float(json.loads(done.stdout)["seconds"]), cpu)


if __name__ == "__main__":
    main()
