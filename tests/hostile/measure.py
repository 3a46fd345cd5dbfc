"""Try every hostile file and print what the dearest cost: `python -m tests.hostile.measure [PART OF A NAME]`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests import models
from tests.forks import Forks
from tests.hostile.attacks import attacks
from tests.hostile.trial import tried


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SDCLI_CACHE"] = os.environ["XDG_RUNTIME_DIR"] = scratch
        forks, place = Forks(), Path(scratch)
        sd1, trials = models.write_sd1(place / "sd1"), []
        for attack in attacks(sd1):
            if part in str(attack):
                trials.append(tried(attack, place / "tried", forks))
                print(f"{attack}: {'; '.join(trials[-1].faults()) or 'clean'}", flush=True)
        forks.close()
    print(f"{len(trials)} hostile files, {sum(not one.faults() for one in trials)} refused cleanly")
    print(f"payloads run: {sum(one.has_run for one in trials)}, left behind: {sum(one.has_left for one in trials)}")
    for what in ("seconds", "megabytes", "child_seconds", "child_megabytes"):
        dearest = max(trials, key=lambda one: float(getattr(one, what)))
        print(f"most {what}: {getattr(dearest, what):.2f} ({dearest.attack})")


if __name__ == "__main__":
    main()
