"""Time and memory of one picture at Stable Diffusion 1.5's size on a CPU, against plain diffusers in float32.

    python -m tests.benchmarks.memory [FOLDER] [--rounds N] [--steps N]

A model of random weights is written into FOLDER (else a temporary one) as a folder and as a single file, both float16:
4 GB in all. Each way of loading and drawing is a process of its own, one after the other, in as many rounds. Told are
CPU time of loading and of the fastest step, of all threads, and the most resident memory, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

PRESET = Path(__file__).parents[2] / "sdcli" / "training" / "presets" / "sd15.json"
TOKENIZER = Path(__file__).parents[2] / "sdcli" / "builtin" / "model" / "tokenizer"
PROMPT, SEED, SIDE = "a picture of a puppy", 7, 512
WAYS = ("sdcli folder", "diffusers folder", "sdcli file", "diffusers file")


def write(folder: Path) -> None:
    """A float16 model of random weights as `folder/model` and `folder/model.safetensors`."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    configs = json.loads(PRESET.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    whole = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(configs["vae"]),
        unet=UNet2DConditionModel.from_config(configs["unet"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        scheduler=DDIMScheduler.from_config(configs["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    whole.to(torch.float16).save_pretrained(folder / "model")
    command = [sys.executable, "-m", "sdcli", "models", "convert", folder / "model", "-o", folder / "model.safetensors"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def by_sdcli(place: Path, steps: int) -> dict[str, float]:
    """Load and draw as `sdcli generate` does."""
    import diffusers.models.autoencoders.autoencoder_kl
    import diffusers.models.unets.unet_2d_condition
    import transformers.models.clip.modeling_clip

    from sdcli import generate
    from sdcli.plan import plan
    from sdcli.specs import GenerateSpec

    assert diffusers and transformers
    facts: dict[str, float] = {}

    def load(folder: Path, **how: Any) -> Any:
        return timed(facts, lambda: generate.load_bundle(folder, **how))

    size = {"width": SIDE, "height": SIDE, "steps": steps, "scheduler": "ddim", "seed": SEED}
    target = place.parent / "drawn.png"
    spec = GenerateSpec(prompt=PROMPT, model=str(place), output=target, if_exists="overwrite", device="cpu", **size)
    events = generate.run(spec, plan(spec), load)
    moments = [time.process_time() for event in events if isinstance(event, generate.Progress)]
    return facts | {"step": min(b - a for a, b in pairwise(moments))}


def by_diffusers(place: Path, steps: int) -> dict[str, float]:
    """Load and draw as a script over diffusers does, in float32: half precision is slower on most CPUs."""
    import torch
    import transformers.models.clip.modeling_clip
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    assert AutoencoderKL and UNet2DConditionModel and transformers
    facts: dict[str, float] = {}
    how: dict[str, Any] = {"torch_dtype": torch.float32, "safety_checker": None, "local_files_only": True}
    if place.is_file():
        config = str(place.with_suffix(""))
        pipe = timed(facts, lambda: StableDiffusionPipeline.from_single_file(place, config=config, **how))
    else:
        pipe = timed(facts, lambda: StableDiffusionPipeline.from_pretrained(place, **how))
    pipe.set_progress_bar_config(disable=True)
    moments: list[float] = []

    def look(_: object, index: int, t: object, values: dict[str, Any]) -> dict[str, Any]:
        moments.append(time.process_time())
        return values

    chance = torch.Generator().manual_seed(SEED)
    pipe(PROMPT, num_inference_steps=steps, generator=chance, callback_on_step_end=look, width=SIDE, height=SIDE)
    return facts | {"step": min(b - a for a, b in pairwise(moments))}


def timed(facts: dict[str, float], load: Callable[[], Any]) -> Any:
    """What `load` gives; its CPU time goes to the facts."""
    began = time.process_time()
    loaded = load()
    facts["load"] = time.process_time() - began
    return loaded


def measure(way: str, folder: Path, steps: int) -> None:
    """One way, in this process; prints its figures as JSON."""
    warnings.simplefilter("ignore")
    who, kind = way.split()
    place = folder / ("model" if kind == "folder" else "model.safetensors")
    facts = (by_sdcli if who == "sdcli" else by_diffusers)(place, steps)
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss also counts what started this process
    facts["peak"] = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    print(json.dumps(facts))


def report(folder: Path, rounds: int, steps: int) -> None:
    """All ways in turn, and a table of the least of each figure."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.memory",
                str(folder),
                "--way",
                way,
                "--steps",
                str(steps),
            ]
            told = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(told.stdout.splitlines()[-1]))
            print(f"{way}: {found[way][-1]}", file=sys.stderr, flush=True)
    print(f"{'':18}{'load, CPU s':>12}{'step, CPU s':>12}{'peak GB':>10}")
    for way, rows in found.items():
        least = {name: min(row[name] for row in rows) for name in ("load", "step", "peak")}
        print(f"{way:18}{least['load']:12.2f}{least['step']:12.2f}{least['peak'] / 1e9:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        measure(asked.way, asked.folder, asked.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        if not (folder / "model.safetensors").exists():
            write(folder)
        report(folder, asked.rounds, asked.steps)


if __name__ == "__main__":
    main()
