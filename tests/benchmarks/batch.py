"""Measure what a batch saves: `sdcli batch` beside a shell loop over `sdcli generate`, and beside a diffusers loop.

    python -m tests.benchmarks.batch [--images 32] [--loop 2] [--runs 3] [--model builtin|FOLDER] [--json]

All draw the same pictures: other prompts, seeds in a row, the model's own settings; start-up, decoding and PNG files
count. The shell loop draws fewer, for each costs a start-up of its own, and counts an image. They run in turn, A B C D
A B C D ..., each in processes of its own; a ratio is the median over the turns, so that a machine whose speed drifts
favours nobody. OMP_NUM_THREADS=1 keeps the clock from telling of the machine's other work.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sdcli import store
from tests.benchmarks.startup import SDCLI, Cost, once

THINGS = (
    "puppy",
    "red apple",
    "penguin",
    "green turtle",
    "hamburger",
    "unicorn",
    "bee",
    "pizza",
    "small cat in a corner",
)
NAMES = {
    "generate": "a shell loop over sdcli generate",
    "diffusers": "a diffusers loop, one prompt a call",
    "deterministic": "sdcli batch --deterministic",
}

DIFFUSERS = """
import sys, json, torch
from pathlib import Path
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
folder, source, target = map(Path, sys.argv[1:])
own = json.loads((folder / "sdcli.json").read_text()) if (folder / "sdcli.json").exists() else {}
pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
for seed, prompt in enumerate(source.read_text().splitlines()):
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(prompt, num_inference_steps=own.get("steps", 25), guidance_scale=own.get("guidance", 7.5),
                 generator=generator).images[0]
    image.save(target / f"{seed}.png")
"""


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Measure a batch beside loops.")
    parser.add_argument("--images", type=int, default=32, help="pictures of a batch (default 32)")
    parser.add_argument("--loop", type=int, default=2, help="pictures of the shell loop (default 2)")
    parser.add_argument("--runs", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--model", default="builtin", help="builtin, or a folder in the diffusers layout")
    parser.add_argument("--json", action="store_true", help="print one JSON object a comparison")
    arguments = parser.parse_args()
    folder = store.resolve(arguments.model, offline=True).folder
    turns = [turn(folder, arguments.images, arguments.loop) for _ in range(arguments.runs)]
    for other, words in NAMES.items():
        row = compared([one["batch"] for one in turns], [one[other] for one in turns]) | {"other": words}
        text = "sdcli batch: {cpu:.2f} s of CPU an image; {other}: {other_cpu:.2f} s"
        text += "; ratio of CPU {ratio_cpu:.2f}, of wall {ratio_wall:.2f}"
        print(json.dumps(row) if arguments.json else text.format(**row), flush=True)


def turn(folder: Path, images: int, loop: int) -> dict[str, Cost]:
    """One run of each way, as seconds an image."""
    prompts = [f"a picture of a {THINGS[i % len(THINGS)]}, number {i}" for i in range(images)]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        jobs, source, plain = scratch / "jobs.jsonl", scratch / "prompts.txt", scratch / "plain.py"
        rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
        jobs.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        source.write_text("\n".join(prompts), encoding="utf-8")
        plain.write_text(DIFFUSERS, encoding="utf-8")
        (scratch / "plain").mkdir()
        common = ("--model", str(folder), "--scheduler", "dpm", "--offline", "--quiet")
        batch = (*SDCLI, "batch", str(jobs), *common, "-o")
        each = 'while read -r prompt; do "$@" "$prompt" --seed $((i)) || exit 1; i=$((i + 1)); done'
        head = f"i=0; head -n {loop} {source} | {{ {each}; }}"
        generate = ("/bin/sh", "-c", head, "sh", *SDCLI, "generate", *common, "-o", str(scratch / "loop"))
        loop_of = (sys.executable, str(plain), str(folder), str(source))
        costs = {
            "batch": an_image(once((*batch, str(scratch / "together"))), images),
            "generate": an_image(once(generate), loop),
            "diffusers": an_image(once((*loop_of, str(scratch / "plain"))), images),
            "deterministic": an_image(once((*batch, str(scratch / "alone"), "--deterministic")), images),
        }
        made = [len(list((scratch / name).glob("*.png"))) for name in ("together", "plain", "alone", "loop")]
        assert made == [images, images, images, loop], made
    return costs


def an_image(cost: Cost, images: int) -> Cost:
    """What one of several images cost."""
    return Cost(cost.cpu / images, cost.wall / images)


def compared(ours: Sequence[Cost], theirs: Sequence[Cost]) -> dict[str, object]:
    """How many times what ours cost an image theirs did, the median over the turns."""
    median = statistics.median
    return {
        "cpu": median(one.cpu for one in ours),
        "other_cpu": median(one.cpu for one in theirs),
        "ratio_cpu": median(b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True)),
        "ratio_wall": median(b.wall / a.wall for a, b in zip(ours, theirs, strict=True)),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


if __name__ == "__main__":
    main()
