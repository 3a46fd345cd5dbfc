"""Measure the embedded model: how well the VAE keeps every concept, and how many prompts give the concept they name.

    python tests/quality/quality.py [--model builtin|FOLDER] [--seeds 1] [--json] [--sheet FILE.png]

A generated picture counts as right if, among the plain renderings of all concepts, the one nearest to it is the concept
of its prompt; nearest.py judges. The exit code is 1 when a figure is below what a release must reach.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from nearest import SIZE_PX, nearest, reference_views
from PIL import Image, ImageDraw, ImageFont

from sdcli import drawing, store
from sdcli.builtin import recipe
from sdcli.pipeline import vae
from sdcli.pipeline.bundle import load_bundle, load_vae
from sdcli.pipeline.images import to_images, to_pixels
from sdcli.plan import plan
from sdcli.specs import GenerateSpec

BATCH = 16
LEAST_PSNR_MEAN_DB, LEAST_PSNR_P5_DB, LEAST_RIGHT_SHARE = 28.0, 23.0, 0.94  # what a release must reach


@dataclass(frozen=True)
class VaeReport:
    """Peak signal-to-noise ratio of decode(encode(x)) over the plain renderings, in dB."""

    psnr_mean_db: float
    psnr_p5_db: float
    worst: dict[str, float]


@dataclass(frozen=True)
class Miss:
    """A picture whose nearest rendering is another concept than the prompt's."""

    concept: str
    taken_for: str
    seed: int


@dataclass(frozen=True)
class PromptReport:
    """How many pictures are nearest to the concept of their prompt."""

    pictures: int
    right_share: float
    misses: tuple[Miss, ...]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("--model", default="builtin", help="builtin, or a folder in the diffusers layout")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each concept (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sheet", type=Path, help="write the pictures of the first seed with their prompts, as PNG")
    arguments = parser.parse_args()
    coder = measure_vae(store.resolve(arguments.model, offline=True).folder)
    prompts = [f"a picture of {recipe.with_article(recipe.phrases(c)[0])}" for c in recipe.concepts()]
    pictures = [draw(prompts, seed, arguments.model) for seed in range(arguments.seeds)]
    report, guesses = measure_prompts(pictures)
    if arguments.sheet is not None:
        contact_sheet(pictures[0], prompts, guesses[0]).save(arguments.sheet)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "vae": asdict(coder), "prompts": asdict(report)}, indent=2))
    else:
        print("\n".join(lines(coder, report)))
    is_good = coder.psnr_mean_db >= LEAST_PSNR_MEAN_DB and coder.psnr_p5_db >= LEAST_PSNR_P5_DB
    sys.exit(0 if is_good and report.right_share >= LEAST_RIGHT_SHARE else 1)


def measure_vae(folder: Path) -> VaeReport:
    """Encode and decode the plain rendering of every concept."""
    originals = [recipe.render(concept, SIZE_PX) for concept in recipe.concepts()]
    decibels = [psnr(a, b) for a, b in zip(originals, reconstruct(originals, folder), strict=True)]
    names = [concept.name for concept in recipe.concepts()]
    worst = sorted(zip(names, decibels, strict=True), key=lambda pair: pair[1])[:10]
    return VaeReport(float(np.mean(decibels)), float(np.percentile(decibels, 5)), dict(worst))


def measure_prompts(pictures: Sequence[Sequence[Image.Image]]) -> tuple[PromptReport, list[list[int]]]:
    """Judge the pictures of every concept, one sequence for each seed. Returns the report and the nearest concepts."""
    views = reference_views(recipe.concepts())
    guesses = [nearest(of_one_seed, views) for of_one_seed in pictures]
    names = [concept.name for concept in recipe.concepts()]
    misses = tuple(
        Miss(names[i], names[guess], seed)
        for seed, of_one_seed in enumerate(guesses)
        for i, guess in enumerate(of_one_seed)
        if guess != i
    )
    count = sum(len(of_one_seed) for of_one_seed in guesses)
    return PromptReport(count, 1 - len(misses) / count, misses), guesses


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Compute the peak signal-to-noise ratio of two 8-bit pictures over all pixels and channels, in dB."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    error = float(np.mean(difference**2))
    return 10 * np.log10(255**2 / error) if error > 0 else float("inf")


def lines(coder: VaeReport, report: PromptReport) -> Iterator[str]:
    """Put the reports into words."""
    yield f"VAE      {coder.psnr_mean_db:.2f} dB mean, {coder.psnr_p5_db:.2f} dB at the 5th percentile"
    yield "worst    " + ", ".join(f"{name} {decibels:.1f}" for name, decibels in coder.worst.items())
    right = report.pictures - len(report.misses)
    yield f"prompts  {right} of {report.pictures} pictures are nearest to their own concept ({report.right_share:.1%})"
    for miss in report.misses:
        yield f"  {miss.concept} was taken for {miss.taken_for} (seed {miss.seed})"


def contact_sheet(pictures: Sequence[Image.Image], prompts: Sequence[str], guesses: Sequence[int]) -> Image.Image:
    """Lay out one picture for each concept with its prompt; what was taken for something else says so in red."""
    columns, width, height = 12, 160, 104
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (picture, prompt, guess) in enumerate(zip(pictures, prompts, guesses, strict=True)):
        x, y = i % columns * width, i // columns * height
        sheet.paste(picture.resize((SIZE_PX, SIZE_PX)), (x + (width - SIZE_PX) // 2, y + 4))
        pen.text((x + 4, y + 72), prompt.removeprefix("a picture of "), fill="black", font=font)
        if guess != i:
            pen.text((x + 4, y + 86), f"taken for {recipe.concepts()[guess].name}", fill="red", font=font)
    return sheet


@torch.inference_mode()
def reconstruct(pictures: Sequence[Image.Image], folder: Path) -> list[Image.Image]:
    """Encode with the mean of the posterior, and decode."""
    coder = load_vae(folder, device=torch.device("cpu"), dtype=torch.float32)
    found: list[Image.Image] = []
    for batch in (pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)):
        pixels = torch.cat([to_pixels(picture) for picture in batch])
        found += to_images(vae.decode(coder, vae.encode(coder, pixels)))
    return found


def draw(prompts: Sequence[str], seed: int, model: str) -> list[Image.Image]:
    """Generate one picture for each prompt with the model's own settings, every one from the noise of the same seed."""
    decided = plan(GenerateSpec(prompt="any", model=model, seed=seed, offline=True))
    bundle = load_bundle(decided.model.folder, device=torch.device("cpu"), dtype=torch.float32)
    found: list[Image.Image] = []
    for batch in (prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)):
        *_, last = drawing.draw(bundle, decided, batch, "", seeds=[seed] * len(batch))
        found += to_images(vae.decode_finite(bundle.vae, last.latents))
    return found


if __name__ == "__main__":
    main()
