"""Inception v3 as the Frechet Inception distance has it: TensorFlow's network of 2015, in the weights others ported.

Szegedy et al. 2015, arXiv:1512.00567, section 6 and figures 5 to 7; the names of the weights are torchvision's. Against
torchvision's network three things differ, or figures do not agree with published ones: average pooling does not count
its padding, the last block pools by maximum, and there are 1,008 classes (which are not computed here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline.features import check_weight, read_weights

NAME = "fid-inception-v3"
SIDE = 299  # px
WIDTH = 2048  # of a picture's vector
CLASSES = 1008  # of TensorFlow's; torchvision's own weights have 1,000
FIRST_KEY = "Conv2d_1a_3x3.conv.weight"
EXPECTED = "expected is the state dict of FID's Inception v3 (pt_inception-2015-12-05), in .pth or .safetensors"
BATCH_NORM_EPSILON = 1e-3

Shape = tuple[int, int, tuple[int, int], int]  # channels in and out, kernel, stride
Chain = Sequence[str | tuple[str, ...]]  # layers in turn; a tuple forks, and its results lie beside each other
POOL = "pool"


class BasicConv(nn.Module):
    """Convolution, batch normalization by the running statistics, ReLU; padded so that stride 1 keeps the size."""

    def __init__(self, shape: Shape, *, is_padded: bool = True) -> None:
        super().__init__()
        before, after, kernel, stride = shape
        padding = (kernel[0] // 2, kernel[1] // 2) if is_padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(before, after, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=BATCH_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Several chains of convolutions over the same input, side by side; `pool` is what one of them begins with."""

    def __init__(self, convolutions: Mapping[str, Shape], chains: Sequence[Chain], pool: str) -> None:
        """pool: `average` and `maximum` keep the size, `halve` is the maximum with stride 2."""
        super().__init__()
        for name, shape in convolutions.items():
            self.add_module(name, BasicConv(shape))
        self.chains, self.pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part for chain in self.chains for part in self._walk(chain, x)], dim=1)

    def _walk(self, chain: Chain, x: Tensor) -> list[Tensor]:
        for layer in chain:
            if isinstance(layer, tuple):
                return [self.get_submodule(name)(x) for name in layer]
            x = self._pooled(x) if layer == POOL else self.get_submodule(layer)(x)
        return [x]

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "maximum" else F.max_pool2d(x, 3, stride=2)


class Inception(nn.Module):
    """Pictures -> 2,048 numbers each: the mean of the last block over the picture."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv((3, 32, (3, 3), 2))
        self.Conv2d_2a_3x3 = BasicConv((32, 32, (3, 3), 1), is_padded=False)
        self.Conv2d_2b_3x3 = BasicConv((32, 64, (3, 3), 1))
        self.Conv2d_3b_1x1 = BasicConv((64, 80, (1, 1), 1))
        self.Conv2d_4a_3x3 = BasicConv((80, 192, (3, 3), 1), is_padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "average"), _block_e(2048, "maximum")
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self.Conv2d_1a_3x3.conv.weight.device

    def features(self, pixels: Tensor) -> Tensor:
        """What pictures show: (B, 3, H, W) in [-1, 1] of any size, scaled to 299 px -> (B, 2048) float32."""
        x = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean(dim=(2, 3))


def inception(path: Path) -> Inception:
    """The network with the weights of a file, on the CPU: .safetensors, or what torch.save wrote.

    Raises InputError when the file cannot be read or holds something else, NumericalError when it holds NaN or Inf.
    """
    with torch.device("meta"):
        network = Inception()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}  # no file need have them
    found = read_weights(path)
    head = found.get("fc.weight")
    if head is not None and tuple(head.shape) != (CLASSES, WIDTH):
        raise InputError(f"{path}: is an Inception v3 of {len(head)} classes, not FID's of {CLASSES}", EXPECTED)
    state = {key: torch.zeros((), dtype=torch.int64) for key in counters}
    for key in (key for key in shapes if key not in counters):
        value = check_weight(path, key, found.get(key), shapes[key], EXPECTED)
        if not value.isfinite().all():
            raise NumericalError(f"{path}: {key} holds NaN or Inf", "get the weights again")
        state[key] = value.to(torch.float32, copy=True)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _block_a(before: int, pooled: int) -> Block:
    """Figure 5: 64 + 64 + 96 + `pooled` channels."""
    convolutions = {
        "branch1x1": (before, 64, (1, 1), 1),
        "branch5x5_1": (before, 48, (1, 1), 1),
        "branch5x5_2": (48, 64, (5, 5), 1),
        "branch3x3dbl_1": (before, 64, (1, 1), 1),
        "branch3x3dbl_2": (64, 96, (3, 3), 1),
        "branch3x3dbl_3": (96, 96, (3, 3), 1),
        "branch_pool": (before, pooled, (1, 1), 1),
    }
    chains = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), _numbered("branch3x3dbl", 3), (POOL, "branch_pool"))
    return Block(convolutions, chains, "average")


def _block_b(before: int) -> Block:
    """The first halving of the grid, figure 10: 384 + 96 + `before` channels."""
    convolutions = {
        "branch3x3": (before, 384, (3, 3), 2),
        "branch3x3dbl_1": (before, 64, (1, 1), 1),
        "branch3x3dbl_2": (64, 96, (3, 3), 1),
        "branch3x3dbl_3": (96, 96, (3, 3), 2),
    }
    return Block(convolutions, (("branch3x3",), _numbered("branch3x3dbl", 3), (POOL,)), "halve")


def _block_c(before: int, between: int) -> Block:
    """Figure 6, with n = 7: four times 192 channels."""
    convolutions = {
        "branch1x1": (before, 192, (1, 1), 1),
        "branch7x7_1": (before, between, (1, 1), 1),
        "branch7x7_2": (between, between, (1, 7), 1),
        "branch7x7_3": (between, 192, (7, 1), 1),
        "branch7x7dbl_1": (before, between, (1, 1), 1),
        "branch7x7dbl_2": (between, between, (7, 1), 1),
        "branch7x7dbl_3": (between, between, (1, 7), 1),
        "branch7x7dbl_4": (between, between, (7, 1), 1),
        "branch7x7dbl_5": (between, 192, (1, 7), 1),
        "branch_pool": (before, 192, (1, 1), 1),
    }
    chains = (("branch1x1",), _numbered("branch7x7", 3), _numbered("branch7x7dbl", 5), (POOL, "branch_pool"))
    return Block(convolutions, chains, "average")


def _block_d(before: int) -> Block:
    """The second halving of the grid: 320 + 192 + `before` channels."""
    convolutions = {
        "branch3x3_1": (before, 192, (1, 1), 1),
        "branch3x3_2": (192, 320, (3, 3), 2),
        "branch7x7x3_1": (before, 192, (1, 1), 1),
        "branch7x7x3_2": (192, 192, (1, 7), 1),
        "branch7x7x3_3": (192, 192, (7, 1), 1),
        "branch7x7x3_4": (192, 192, (3, 3), 2),
    }
    return Block(convolutions, (_numbered("branch3x3", 2), _numbered("branch7x7x3", 4), (POOL,)), "halve")


def _block_e(before: int, pool: str) -> Block:
    """Figure 7: 320 + 2 x 384 + 2 x 384 + 192 channels."""
    convolutions = {
        "branch1x1": (before, 320, (1, 1), 1),
        "branch3x3_1": (before, 384, (1, 1), 1),
        "branch3x3_2a": (384, 384, (1, 3), 1),
        "branch3x3_2b": (384, 384, (3, 1), 1),
        "branch3x3dbl_1": (before, 448, (1, 1), 1),
        "branch3x3dbl_2": (448, 384, (3, 3), 1),
        "branch3x3dbl_3a": (384, 384, (1, 3), 1),
        "branch3x3dbl_3b": (384, 384, (3, 1), 1),
        "branch_pool": (before, 192, (1, 1), 1),
    }
    chains: Sequence[Chain] = (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        (*_numbered("branch3x3dbl", 2), ("branch3x3dbl_3a", "branch3x3dbl_3b")),
        (POOL, "branch_pool"),
    )
    return Block(convolutions, chains, pool)


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(1, count + 1))
