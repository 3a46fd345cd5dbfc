"""Measure the orders of convergence of every deterministic scheduler on the exact denoiser of Gaussian data.

    python -m tests.benchmarks.orders [--json]

The error at the last nonzero sigma is fitted over numbers of steps from 10 to 200. A scheduler whose timesteps are
whole numbers has a floor under its error, which flattens the fit: pndm.
"""

import argparse
import json

from sdcli.schedulers import find, names
from tests.orders import OPTIONS, STEPS, comparable_options, error_and_evaluations, slope


def main() -> None:
    """Parse the command line, measure, print a line a scheduler."""
    parser = argparse.ArgumentParser(description="Measure orders of convergence.")
    parser.add_argument("--json", action="store_true", help="print one JSON object a scheduler")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"{'scheduler':18}{'order':>6}{'measured':>10}{'  error at':>12} {STEPS[0]:>4}{STEPS[-1]:>10}  sigmas")
    for name in names():
        row = measure(name)
        if row is None:
            continue
        if arguments.json:
            print(json.dumps(row), flush=True)
            continue
        first, last = row["errors"][0], row["errors"][-1]
        figures = f"{row['order']:>6}{row['measured']:>10.2f}{first:>17.1e}{last:>10.1e}"
        print(f"{name:18}{figures}  {row['sigmas']}", flush=True)


def measure(name: str) -> dict[str, object] | None:
    """The row of a scheduler; None for one that draws noise, or ends at other sigmas for other steps."""
    scheduler = find(name)
    key = None if scheduler.is_stochastic else comparable_options(name)
    if key is None:
        return None
    errors = [error_and_evaluations(name, steps, OPTIONS[key])[0] for steps in STEPS]
    facts = {"scheduler": name, "order": scheduler.order, "measured": slope(STEPS, errors)}
    return {**facts, "steps": list(STEPS), "errors": errors, "sigmas": key}


if __name__ == "__main__":
    main()
