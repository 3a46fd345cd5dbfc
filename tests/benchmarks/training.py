"""Steps of train-unet beside those of a plain loop, in one run: the ratios of their times, and the memory of both.

Time is the clock's, and the CPU's of all threads: the latter says more where other programs run, with one thread.

The plain loop does in every step what diffusers' example does: it reads and encodes the picture, encodes the caption,
noises, predicts, and moves weights and their average; same model, batch, resolution and optimizer. The model has the
proportions of Stable Diffusion 1.5 at a quarter of its width and half its side (256 px), and random weights; with
--embedded it is the embedded one, whose VAE and text encoder are small beside its UNet.

    python tests/benchmarks/training.py [--embedded] [--batch-size 2] [--steps 8] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from sdcli import layout, store
from sdcli.pipeline import text
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import ModelBundle, TextEncoder, build, load_bundle, save_bundle
from sdcli.pipeline.vocabulary import load_tokenizer
from sdcli.schedulers.config import prediction_type
from sdcli.train_specs import TrainUnetSpec
from sdcli.training import data, parts, unet
from sdcli.training.loop import StepDone

PICTURES = 24
QUARTER = {"norm_num_groups": 16, "block_out_channels": [80, 160, 320, 320], "cross_attention_dim": 192}


def draw(folder: Path) -> None:
    """Pictures with captions."""
    for i in range(PICTURES):
        Image.effect_noise((288, 256), 60).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}", encoding="utf-8")


def build_quarter(folder: Path) -> None:
    """A model of the shape of Stable Diffusion 1.5 at a quarter of its width, with random weights."""
    configs = parts.preset("sd15")
    torch.manual_seed(0)
    vae = build(configs["vae"] | {"norm_num_groups": 16, "block_out_channels": [32, 64, 128, 128]})
    unet_part = build(configs["unet"] | QUARTER | {"sample_size": 32})
    width = {"hidden_size": 192, "intermediate_size": 768, "projection_dim": 192}
    encoder = TextEncoder(load_tokenizer(layout.TOKENIZER_FOLDER), cast("Any", build(configs["text_encoder"] | width)))
    cpu, kept = torch.device("cpu"), torch.float32
    bundle = ModelBundle(cast("Any", vae), cast("Any", unet_part), encoder, configs["scheduler"], cpu, kept)
    save_bundle(folder, bundle, layout.TOKENIZER_FOLDER, {})


def ours(folder: Path, model: Path, batch_size: int, steps: int) -> Iterator[float]:
    """Seconds of each step of train-unet; the caches are filled before the first."""
    spec = TrainUnetSpec(
        data=folder,
        model=str(model),
        run=folder / "run",
        batch_size=batch_size,
        steps=steps,
        device="cpu",
        save_every=10 * steps,
    )
    for report in unet.run(spec):
        if isinstance(report, StepDone):
            yield batch_size / report.images_per_second


def plain(folder: Path, model_folder: Path, batch_size: int, steps: int) -> Iterator[float]:
    """Seconds of each step of the plain loop."""
    bundle = load_bundle(model_folder, device=torch.device("cpu"), dtype=torch.float32)
    encoder = bundle.conditioner
    assert isinstance(encoder, TextEncoder)
    model = bundle.unet.requires_grad_(True).train()
    side = int(model.config["sample_size"]) * latent.factor(bundle.vae)
    wanted = prediction_type(bundle.scheduler_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    average = EMAModel(model.parameters())
    noise = DDPMScheduler.from_config(bundle.scheduler_config)
    samples = data.find(folder).samples
    for step in range(steps):
        began = time.perf_counter()
        chosen = [samples[(step * batch_size + i) % len(samples)] for i in range(batch_size)]
        pixels = torch.cat([data.load_pixels(sample, (side, side)) for sample in chosen])
        with torch.no_grad():
            x_0 = bundle.vae.encode(pixels).latent_dist.sample() * bundle.vae.config["scaling_factor"]
            context = text.encode(encoder, [text.tokenize(encoder, sample.captions[0]) for sample in chosen])
        eps, t = torch.randn_like(x_0), torch.randint(1000, (batch_size,))
        prediction = model(noise.add_noise(x_0, eps, t), t, context).sample
        target = eps if wanted == "epsilon" else noise.get_velocity(x_0, eps, t)
        (prediction - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        yield time.perf_counter() - began


def measure(kind: str, batch_size: int, steps: int, *, is_embedded: bool) -> None:
    """Print the median step in seconds, by the clock and of the CPU, and the peak memory in MiB of one loop."""
    times, cpu_times = [], []
    with tempfile.TemporaryDirectory() as name:
        pictures, model = Path(name) / "pictures", store.BUILTIN_FOLDER
        pictures.mkdir()
        draw(pictures)
        if not is_embedded:
            model = Path(name) / "model"
            model.mkdir()
            build_quarter(model)
        before = time.process_time()
        for seconds in (ours if kind == "ours" else plain)(pictures, model, batch_size, steps):
            times.append(seconds)
            cpu_times.append(time.process_time() - before)
            before = time.process_time()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before the export, which plain has not
    medians = {"seconds": statistics.median(times[2:]), "cpu_seconds": statistics.median(cpu_times[2:])}
    print(json.dumps({**medians, "mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("ours", "plain"))
    given = parser.parse_args()
    if given.only:
        measure(given.only, given.batch_size, given.steps, is_embedded=given.embedded)
        return
    ratios: dict[str, list[float]] = {"seconds": [], "cpu_seconds": [], "mib": []}
    for _ in range(given.rounds):
        rows = {}
        for kind in ("ours", "plain"):
            sizes = ["--batch-size", str(given.batch_size), "--steps", str(given.steps)]
            sizes += ["--embedded"] if given.embedded else []
            command = [sys.executable, __file__, "--only", kind, *sizes]
            rows[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for name, found in ratios.items():
            found.append(rows["plain"][name] / rows["ours"][name])
        print(f"plain {rows['plain']}, ours {rows['ours']}: {ratios['seconds'][-1]:.2f} times as fast", flush=True)
    clock, cpu, memory = (statistics.median(found) for found in ratios.values())
    print(f"median {clock:.2f} times as fast, {cpu:.2f} in CPU time, memory {1 / memory:.2f} times")


if __name__ == "__main__":
    main()
