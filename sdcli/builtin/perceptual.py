"""Train the embedded perceptual network: a classifier of the drawn pictures, of which the convolutions are kept.

    python -m sdcli.builtin.perceptual train DATA OUT [--steps 4000] [--seed 0]

DATA is what `python -m sdcli.builtin.recipe draw` wrote. Nothing is blurred for training: a network that learned to
overlook blur could not tell a VAE of it. A little noise is added: without it, noise of std 0.2 was farther than another
picture for one picture in four. On one machine the same arguments give the same bytes.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sdcli.files import atomic_write, make_folder
from sdcli.layout import write_json
from sdcli.pipeline.features import EMBEDDED, Perceptual, convolution_stages, convolutions
from sdcli.pipeline.images import load_image

WIDTHS, DEPTHS = (24, 48, 96, 128, 160), (2, 2, 2, 2, 2)  # 0.83 million weights: 1.7 MB in float16
HELD_OUT_EACH = 10  # of a concept's pictures every tenth is never trained on: four of forty, one of them small
BATCH_SIZE = 64
LEARNING_RATE, WARM_UP_STEPS, WEIGHT_DECAY = 2e-3, 100, 1e-2
LABEL_SMOOTHING = 0.05
LARGEST_GRADIENT = 1.0  # norm
CROP_SHARE, HALF_SHARE = 0.45, 0.40  # of the batches: squares cut out, whole pictures halved; the rest is whole
SHIFT = 1 / 8  # at most, of the side
GAIN, BIAS = 0.20, 0.15  # at most, of each channel
RECOLOURED_SHARE = 0.2  # of the pictures: as a negative; likewise: with channels exchanged
NOISE = 0.1  # std at most; a step of 8 bits is 0.008
REPORTED_EACH = 100  # steps


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures (N, 3, S, S) uint8, and which concept each shows: (N,) int64, of `count` concepts."""

    values: Tensor
    concepts: Tensor
    count: int

    def some(self, rows: Tensor) -> "Pictures":
        """Those at some rows: indices or a mask."""
        return Pictures(self.values[rows], self.concepts[rows], self.count)

    def pixels(self) -> Tensor:
        """(N, 3, S, S) float32 in [-1, 1]."""
        return self.values.float() / 127.5 - 1


class Classifier(nn.Module):
    """The stages of the network, with batch normalisation while they learn, and a linear layer over their end."""

    def __init__(self, count: int) -> None:
        super().__init__()
        stages = convolution_stages(WIDTHS, DEPTHS).to_empty(device="cpu")
        self.stages = nn.ModuleList(_normalised(stage) for stage in stages.children())
        self.head = nn.Linear(WIDTHS[-1], count)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, count) logits."""
        x = pixels
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def read(folder: Path) -> tuple[Pictures, Pictures]:
    """The pictures that recipe.draw wrote into a folder: those to learn from, and those held out."""
    paths = sorted((folder / "images").glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no drawn pictures: python -m sdcli.builtin.recipe draw {folder}")
    slugs, numbers = zip(*(path.stem.rsplit("-", 1) for path in paths), strict=True)
    names = sorted(set(slugs))
    concepts = torch.tensor([names.index(slug) for slug in slugs])
    values = torch.from_numpy(np.stack([np.asarray(load_image(path)) for path in paths])).permute(0, 3, 1, 2)
    pictures = Pictures(values.contiguous(), concepts, len(names))
    is_held_out = torch.tensor([int(number) % HELD_OUT_EACH == HELD_OUT_EACH - 1 for number in numbers])
    return pictures.some(~is_held_out), pictures.some(is_held_out)


def fit(classifier: Classifier, pictures: Pictures, *, steps: int, seed: int) -> Iterator[float]:
    """Teach the classifier to tell what pictures show, and yield the loss of each step, in nats."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    classifier.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)
        batch = pictures.some(torch.randint(len(pictures.concepts), (BATCH_SIZE,), generator=generator))
        # Channels last and bfloat16 make it nine times as fast on a CPU that has instructions for them.
        pixels = varied(batch.pixels(), generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(pixels)
        loss = F.cross_entropy(logits.float(), batch.concepts, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        yield loss.item()


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Change place, size, side and colours of pictures as what they show allows. Sizes are those of the whole batch.

    pixels: (B, 3, S, S) in [-1, 1]. Returns (B, 3, S, S) or (B, 3, S/2, S/2).
    """
    count, side = len(pixels), pixels.shape[-1]
    kind = float(torch.rand((), generator=generator))
    if kind < CROP_SHARE:
        x = _cut(pixels, side // 2, generator)
    else:
        whole = F.avg_pool2d(pixels, 2) if kind < CROP_SHARE + HALF_SHARE else pixels
        margin = round(SHIFT * whole.shape[-1])
        x = _cut(F.pad(whole, (margin,) * 4, mode="replicate"), whole.shape[-1], generator)

    def chosen(share: float) -> Tensor:
        return (torch.rand(count, generator=generator) < share).view(-1, 1, 1, 1)

    def spread(most: float, *shape: int) -> Tensor:
        return most * (2 * torch.rand(shape, generator=generator) - 1)

    x = torch.where(chosen(0.5), x.flip(3), x)
    x = x * (1 + spread(GAIN, count, 3, 1, 1)) + spread(BIAS, count, 3, 1, 1)
    x = torch.where(chosen(RECOLOURED_SHARE), -x, x)
    x = torch.where(chosen(RECOLOURED_SHARE), x[:, torch.randperm(3, generator=generator)], x)
    return x.clamp(-1, 1) + spread(NOISE, count, 1, 1, 1) * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def accuracy(classifier: Classifier, pictures: Pictures) -> float:
    """The share of pictures that are told right, as drawn."""
    classifier.eval()
    parts = zip(pictures.pixels().split(BATCH_SIZE), pictures.concepts.split(BATCH_SIZE), strict=True)
    right = sum(int((classifier(pixels).argmax(dim=1) == concepts).sum()) for pixels, concepts in parts)
    return right / len(pictures.concepts)


def folded(classifier: Classifier) -> nn.ModuleList:
    """The stages with each normalisation folded into the convolution before it, rounded to float16, in float32."""
    classifier.eval()
    stages = nn.ModuleList()
    for stage in classifier.stages.children():
        layers: list[nn.Module] = []
        for layer in stage.children():
            if isinstance(layer, nn.BatchNorm2d):
                assert isinstance(layers[-1], nn.Conv2d)
                layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
            else:
                layers.append(layer)
        stages.append(nn.Sequential(*layers))
    return stages.half().float()


@torch.no_grad()
def stage_weights(stages: nn.ModuleList, pictures: Pictures) -> list[float]:
    """Weights with which every stage adds as much to the mean distance of pictures of different things, and all 1."""
    network = Perceptual(EMBEDDED, stages, [torch.ones(width) for width in WIDTHS])
    partners = pictures.some(torch.arange(len(pictures.concepts)).roll(len(pictures.concepts) // 2))
    is_other = pictures.concepts != partners.concepts
    pairs = (one.some(is_other).pixels().split(BATCH_SIZE) for one in (pictures, partners))
    means = torch.cat([network.by_stage(a, b) for a, b in zip(*pairs, strict=True)]).mean(dim=0)
    return [1 / (len(stages) * mean) for mean in means.tolist()]


def save(folder: Path, stages: nn.ModuleList, weights: list[float]) -> None:
    """Write the network as sdcli.pipeline.features reads it: config.json and model.safetensors, float16."""
    make_folder(folder)
    tensors = {f"features.{k}": v.half().contiguous() for k, v in convolutions(stages).state_dict().items()}
    with atomic_write(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_json(folder / "config.json", {"widths": list(WIDTHS), "depths": list(DEPTHS), "stage_weights": weights})


def train(data: Path, out: Path, *, steps: int, seed: int) -> Iterator[str]:
    """Read, fit, fold, weigh and save; yield what to tell."""
    training, held_out = read(data)
    torch.manual_seed(seed)
    classifier = Classifier(training.count)
    for step, loss in enumerate(fit(classifier, training, steps=steps, seed=seed), start=1):
        if step % REPORTED_EACH == 0 or step == steps:
            yield f"step {step} of {steps}: loss {loss:.3f}, {time.process_time():.0f} s of CPU time"
    yield f"right of {len(held_out.concepts)} held-out pictures: {accuracy(classifier, held_out):.1%}"
    stages = folded(classifier)
    weights = [round(weight, 4) for weight in stage_weights(stages, held_out)]
    save(out, stages, weights)
    yield f"{out}: a difference in each stage weighs {', '.join(map(str, weights))}"


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m sdcli.builtin.perceptual", description="Train the embedded perceptual network."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train it on the pictures of recipe.py")
    training.add_argument("data", type=Path, help="what `python -m sdcli.builtin.recipe draw` wrote")
    training.add_argument("out", type=Path)
    training.add_argument("--steps", type=int, default=4000)
    training.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for line in train(arguments.data, arguments.out, steps=arguments.steps, seed=arguments.seed):
        print(line, flush=True)


def _normalised(stage: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in stage.children():
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers[-1] = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*layers)


def _cut(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of `side` px at one random place of all pictures."""
    top, left = torch.randint(pixels.shape[-1] - side + 1, (2,), generator=generator).tolist()
    return pixels[:, :, top : top + side, left : left + side]


if __name__ == "__main__":
    main()
