"""Damage files at length: `python -m tests.fuzz.run [--runs 2000] [--seed 0] [--reader NAME ...]`.

Each reader gets its files in a process of its own with a limit on memory. What is neither read nor refused in a
sentence is kept under build/fuzz/ by reader, seed and number, and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import stat
import sys
import tempfile
import time
import traceback
from itertools import islice
from pathlib import Path

from tests.fuzz.readers import QUICK, READERS, damaged_files, verdict

KEPT = Path("build/fuzz")
MEMORY = 6 << 30  # bytes of address space: torch alone maps more than three
SECONDS = 20.0  # that one file may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="files a reader; of slow ones fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=sorted(READERS))
    asked = parser.parse_args()
    codes = [_of_one(name, asked.runs, asked.seed) for name in asked.reader or READERS]
    sys.exit(max(codes))


def _of_one(name: str, runs: int, seed: int) -> int:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, runs, seed))
    process.start()
    process.join()
    if process.exitcode not in (0, 1):
        print(f"{name}: the process died with {process.exitcode} (seed {seed})", flush=True)
    return 0 if process.exitcode == 0 else 1


def _work(name: str, runs: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    reader, refused, faults, began_all = READERS[name], 0, 0, time.process_time()
    count = max(1, runs * reader.share // QUICK)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SDCLI_CACHE"] = str(Path(scratch) / "none" / "none")  # hashes of what is read once
        (Path(scratch) / "none").touch()
        files = damaged_files(reader, Path(scratch), random.Random(f"{name} {seed}"))
        for number, path in enumerate(islice(files, count)):
            began = time.perf_counter()
            faulthandler.dump_traceback_later(10 * SECONDS, exit=True)
            try:
                error, fault = verdict(reader, Path(scratch), path)
                refused += error is not None
            except BaseException:  # noqa: BLE001  whatever it is, it is a fault
                fault = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            if not fault and time.perf_counter() - began > SECONDS:
                fault = f"took {time.perf_counter() - began:.0f} s"
            if fault:
                faults += 1
                kept = KEPT / f"{name}-{seed}-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(Path(scratch) / "damaged", kept, symlinks=True, ignore=_not_regular)
                print(f"{name}: {path.name} in {kept}: {fault}", flush=True)
    print(f"{name}: {count} files, {refused} refused, {count - refused - faults} read, {faults} faults", end="")
    print(f", {time.process_time() - began_all:.0f} s of CPU", flush=True)
    sys.exit(1 if faults else 0)


def _not_regular(folder: str, names: list[str]) -> list[str]:
    """The names of what cannot be copied: FIFOs."""
    return [name for name in names if stat.S_ISFIFO((Path(folder) / name).lstat().st_mode)]


if __name__ == "__main__":
    main()
