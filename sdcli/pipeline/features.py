"""Networks that look at pictures: how different two look, and what one shows as a vector for the Frechet distance.

There are two. LPIPS on VGG16 is the published one, and its VGG weights (553 MB) are the user's to bring. The embedded
one is small, works offline, and was trained on drawn emoji by `sdcli.builtin.perceptual`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError
from sdcli.files import open_regular, reason
from sdcli.layout import read_json
from sdcli.pipeline.pickles import read_pickle

AUTO, BUILTIN = "auto", "builtin"
LPIPS, EMBEDDED = "lpips-vgg16", "sdcli-perceptual"  # the names of the networks
EMBEDDED_FOLDER = Path(__file__).parents[1] / "builtin" / "perceptual"
HEADS_FILE = Path(__file__).parents[1] / "builtin" / "lpips_vgg16_heads.safetensors"
HUB_FILE = "vgg16-397923af.pth"  # torchvision's vgg16, IMAGENET1K_V1, as torch.hub stores it
VGG16_WIDTHS, VGG16_DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)  # arXiv:1409.1556, table 1, column D
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of R, G, B in [-1, 1]; LPIPS v0.1
MAX_WEIGHT_BYTES = 1 << 30  # the whole VGG16 in float32 has 528 MiB
EXPECTED = "expected is the state dict of torchvision's vgg16, in .pth or .safetensors"
SQUARED_EPSILON = 1e-20  # LPIPS adds 1e-10 to the norm; inside the root the gradient of a zero vector is finite


class Perceptual(nn.Module):
    """A frozen network that compares what it sees in two pictures, stage by stage.

    name: what the network is, to be written into logs and configs.
    Its gradients reach the pictures and never its own weights; it works in its own precision, under autocast too.
    Source: Zhang et al. 2018, arXiv:1801.03924, section 3.1, eq. 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        stages: nn.ModuleList,
        heads: Sequence[Tensor],
        *,
        shift: Sequence[float] = (0.0, 0.0, 0.0),
        scale: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        """stages, heads: layers, each on the result of those before, and (C,) weights of their channels' differences.

        shift, scale: a channel of pixels becomes (value - shift) / scale.
        """
        super().__init__()
        self.name, self.stages, self.heads = name, stages, nn.ParameterList(heads)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
        self.least_side = 2 ** (len(stages) - 1)  # px
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self.scale.device

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """How different pictures look: 0 for equal ones.

        a, b: (B, 3, H, W) pixels in [-1, 1]; H and W at least `least_side` (16 for five stages).
        Returns (B,) in the network's dtype. Raises InputError when the pictures are smaller.
        """
        return self.by_stage(a, b).sum(dim=1)

    def by_stage(self, a: Tensor, b: Tensor) -> Tensor:
        """What each stage adds to the distance of `forward`: (B, stages)."""
        distances = []
        with torch.autocast(a.device.type, enabled=False):
            for head, x, y in zip(self.heads, self._seen(a), self._seen(b), strict=True):
                difference = (_unit(x) - _unit(y)).square() * head.view(1, -1, 1, 1)
                distances.append(difference.sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(distances, dim=1)

    def features(self, pixels: Tensor) -> Tensor:
        """What pictures show: the last stage's mean over the picture.

        pixels: as in `forward`. Returns (B, D), D the channels of the last stage (VGG16: 512).
        """
        with torch.autocast(pixels.device.type, enabled=False):
            *_, last = self._seen(pixels)
        return last.mean(dim=(2, 3))

    def _seen(self, pixels: Tensor) -> Iterator[Tensor]:
        """The result of each stage: (B, C_i, H / 2^i, W / 2^i)."""
        height, width = pixels.shape[-2:]
        if min(height, width) < self.least_side:
            what = f"pictures of {width} x {height} px cannot be compared by {self.name}"
            raise InputError(what, f"both sides must have {self.least_side} px or more")
        x = (pixels.to(self.scale.dtype) - self.shift) / self.scale
        for stage in self.stages:
            x = stage(x)
            yield x


def perceptual(weights: str | None = None) -> Perceptual:
    """The network that `weights` asks for, on the CPU.

    weights: a file with the weights of torchvision's VGG16 (.pth or .safetensors) gives LPIPS; `builtin` the embedded
    network; `auto`, also None, LPIPS where torch.hub's cache has that file, else the embedded network.
    Raises InputError when the file cannot be read or holds something else, NumericalError when it holds NaN or Inf,
    ResourceError when there is no room to read a .pth.
    """
    if weights == BUILTIN:
        return embedded()
    if weights is not None and weights != AUTO:
        return lpips(Path(weights))
    cached = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILE
    return lpips(cached) if os.access(cached, os.R_OK) else embedded()


def lpips(vgg16: Path) -> Perceptual:
    """LPIPS with the linear heads published for VGG16, version 0.1.

    vgg16: a file with torchvision's vgg16 state dict; only its convolutions are needed. Errors as in `perceptual`.
    """
    stages = convolution_stages(VGG16_WIDTHS, VGG16_DEPTHS)
    load_convolutions(stages, vgg16)
    heads = load_file(HEADS_FILE)
    return Perceptual(
        LPIPS, stages, [heads[f"lin{i}"] for i in range(len(stages))], shift=LPIPS_SHIFT, scale=LPIPS_SCALE
    )


def embedded(folder: Path = EMBEDDED_FOLDER) -> Perceptual:
    """The embedded network: a small VGG whose five stages weigh the same.

    Its unit is the mean distance between pictures of different things in the set it was trained on.
    """
    config = read_json(folder / "config.json")
    stages = convolution_stages(config["widths"], config["depths"])
    load_convolutions(stages, folder / "model.safetensors")
    heads = [
        torch.full((width,), weight) for width, weight in zip(config["widths"], config["stage_weights"], strict=True)
    ]
    return Perceptual(EMBEDDED, stages, heads)


def convolution_stages(widths: Sequence[int], depths: Sequence[int]) -> nn.ModuleList:
    """The convolutional part of a VGG, cut before each max-pooling, without memory for weights (on device `meta`).

    widths, depths: channels and number of the 3x3 convolutions of each stage, each followed by ReLU.
    """
    stages = nn.ModuleList()
    with torch.device("meta"):
        for i, ((before, width), depth) in enumerate(zip(pairwise((3, *widths)), depths, strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if i > 0 else []
            for j in range(depth):
                layers += [nn.Conv2d(before if j == 0 else width, width, 3, padding=1), nn.ReLU()]
            stages.append(nn.Sequential(*layers))
    return stages


def convolutions(stages: nn.ModuleList) -> nn.Sequential:
    """The layers of all stages in one row; its state dict has torchvision's names after `features.`."""
    return nn.Sequential(*(layer for stage in stages for layer in stage.children()))


def load_convolutions(stages: nn.ModuleList, path: Path) -> None:
    """Give the stages the weights of a file: `features.0.weight` and so on, as torchvision names them, in float32.

    path: .safetensors, or what torch.save wrote. Other tensors in it are passed over.
    Errors as in `perceptual`.
    """
    row = convolutions(stages)
    shapes = {f"features.{key}": tuple(value.shape) for key, value in row.state_dict().items()}
    found = read_weights(path, shapes.keys())
    checked = {key: check_weight(path, key, found.get(key), shape, EXPECTED) for key, shape in shapes.items()}
    # Copied, so that neither a user's file nor one that the pickle reader made stays mapped.
    state = {key.removeprefix("features."): value.to(torch.float32, copy=True) for key, value in checked.items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise NumericalError(f"{path}: features.{key} holds NaN or Inf", "get the weights again")
    row.load_state_dict(state, assign=True)


def read_weights(path: Path, wanted: Set[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a state dict in a file, .safetensors or what torch.save wrote; of the former those wanted alone.

    Raises InputError when the file cannot be read, ResourceError when there is no room to.
    """
    return _read_safetensors(path, wanted) if path.suffix == ".safetensors" else _read_pickled(path)


def check_weight(path: Path, key: str, value: Tensor | None, shape: tuple[int, ...], expected: str) -> Tensor:
    """The value of a state dict, if it is a plain tensor of that shape; else InputError, with what is expected."""
    if value is None:
        raise InputError(f"{path}: has no {key}", expected)
    if tuple(value.shape) != shape:
        raise InputError(f"{path}: {key} has shape {tuple(value.shape)}, not {shape}", expected)
    if not value.is_floating_point():
        raise InputError(f"{path}: {key} holds {value.dtype}", "expected are floating-point numbers")
    return value


def _unit(x: Tensor) -> Tensor:
    """Scale the vector of channels at each place to length 1."""
    return x / (x.square().sum(dim=1, keepdim=True) + SQUARED_EPSILON).sqrt()


def _read_safetensors(path: Path, wanted: Set[str] | None) -> dict[str, Tensor]:
    open_regular(path, max_bytes=MAX_WEIGHT_BYTES).close()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            return {key: file.get_tensor(key) for key in (names if wanted is None else names & wanted)}
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: is no whole safetensors file ({reason(error)})", "get the file again") from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a state dict that torch.save wrote."""
    found = read_pickle(path, max_bytes=MAX_WEIGHT_BYTES)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no state dict", EXPECTED)
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
