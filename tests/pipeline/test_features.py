"""The networks that look at pictures: LPIPS against a plain computation, the embedded one by what it orders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError, SdcliError
from sdcli.pipeline import features
from sdcli.pipeline.features import Perceptual, perceptual
from sdcli.pipeline.images import to_pixels
from tests.conftest import SHAPES, draw_shape

# torchvision's vgg16: the number of each convolution among the layers of its `features`, and the channels it gives
VGG16 = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
POOLED_BEFORE = {5, 10, 17, 24}
TAPPED_AFTER = (2, 7, 14, 21, 28)  # relu1_2, 2_2, 3_3, 4_3, 5_3
State = dict[str, Tensor]


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def vgg16() -> State:
    """Random weights with the names and shapes of torchvision's vgg16, its classifier (cut short) included."""
    generator = torch.Generator().manual_seed(0)
    state, before = {}, 3
    for number, width in VGG16.items():
        weight = torch.randn((width, before, 3, 3), generator=generator) * (2 / (9 * before)) ** 0.5
        state |= {f"features.{number}.weight": weight}
        state |= {f"features.{number}.bias": 0.1 * torch.randn(width, generator=generator)}
        before = width
    return state | {"classifier.0.weight": torch.ones(2, 2), "classifier.0.bias": torch.ones(2)}


@pytest.fixture(scope="module")
def vgg16_file(vgg16: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(vgg16, path)
    return path


@pytest.fixture(scope="module")
def lpips(vgg16_file: Path) -> Perceptual:
    return perceptual(str(vgg16_file))


@pytest.fixture(scope="module")
def embedded() -> Perceptual:
    return perceptual("builtin")


@pytest.fixture(params=["lpips", "embedded"])
def network(request: pytest.FixtureRequest) -> Perceptual:
    return request.getfixturevalue(request.param)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch.hub cache; returns the folder of its checkpoints."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def plain_lpips(state: State, heads: State, a: Tensor, b: Tensor) -> float:
    """LPIPS of one pair, (3, H, W) each, in float64 and in numpy alone."""

    def taps(x: np.ndarray) -> list[np.ndarray]:
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        x = (x - shift[:, None, None]) / scale[:, None, None]
        found = []
        for number in VGG16:
            if number in POOLED_BEFORE:
                height, width = (side // 2 for side in x.shape[1:])
                x = x[:, : 2 * height, : 2 * width].reshape(len(x), height, 2, width, 2).max(axis=(2, 4))
            weight, bias = (state[f"features.{number}.{part}"].double().numpy() for part in ("weight", "bias"))
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
            x = np.maximum(np.tensordot(weight, windows, axes=((1, 2, 3), (0, 3, 4))) + bias[:, None, None], 0)
            if number in TAPPED_AFTER:
                found.append(x / np.linalg.norm(x, axis=0))
        return found

    layers = zip(taps(a.double().numpy()), taps(b.double().numpy()), strict=True)
    terms = [np.tensordot(heads[f"lin{i}"].numpy(), (x - y) ** 2, axes=1).mean() for i, (x, y) in enumerate(layers)]
    return float(sum(terms))


def test_lpips_is_what_a_plain_computation_gives(lpips: Perceptual, vgg16: State) -> None:
    a, b = random_pixels(2, 3, 33, 24, seed=1), random_pixels(2, 3, 33, 24, seed=2)
    heads = load_file(features.HEADS_FILE)
    expected = [plain_lpips(vgg16, heads, x, y) for x, y in zip(a, b, strict=True)]
    assert lpips.name == "lpips-vgg16"
    assert lpips(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_heads_are_those_published() -> None:
    heads = load_file(features.HEADS_FILE)
    assert [len(heads[f"lin{i}"]) for i in range(5)] == [64, 128, 256, 512, 512]
    assert [float(heads[f"lin{i}"].min()) > 0 for i in range(5)] == [True] * 5
    means = [float(heads[f"lin{i}"].mean()) for i in range(5)]
    assert means == pytest.approx([0.1082186, 0.0692057, 0.0684180, 0.1006276, 0.0918650], abs=1e-6)


def test_the_distance_is_zero_for_equal_pictures_and_symmetric(network: Perceptual) -> None:
    a, b = random_pixels(2, 3, 32, 32, seed=1), random_pixels(2, 3, 32, 32, seed=2)
    assert network(a, a).tolist() == [0.0, 0.0]
    assert torch.equal(network(a, b), network(b, a))
    assert network(a, b).min() > 0


def test_a_picture_s_distance_does_not_depend_on_its_neighbours(network: Perceptual) -> None:
    a, b = random_pixels(3, 3, 32, 32, seed=1), random_pixels(3, 3, 32, 32, seed=2)
    alone = [float(network(x, y)) for x, y in zip(a.split(1), b.split(1), strict=True)]
    assert network(a, b).tolist() == pytest.approx(alone, rel=1e-5)


def test_the_stages_add_up_to_the_distance(network: Perceptual) -> None:
    a, b = random_pixels(2, 3, 32, 32, seed=1), random_pixels(2, 3, 32, 32, seed=2)
    assert network.by_stage(a, b).shape == (2, 5)
    assert torch.equal(network.by_stage(a, b).sum(dim=1), network(a, b))


def test_gradients_reach_both_pictures_and_no_weight(network: Perceptual) -> None:
    a, b = random_pixels(1, 3, 32, 32, seed=1), random_pixels(1, 3, 32, 32, seed=2)
    a.requires_grad_(True)
    b.requires_grad_(True)
    network(a, b).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert float(a.grad.abs().sum()) > 0 and float(b.grad.abs().sum()) > 0
    assert [p.grad for p in network.parameters()] == [None] * len(list(network.parameters()))


def test_the_gradient_is_the_slope_of_the_distance() -> None:
    network = features.embedded().double()
    a, b = random_pixels(1, 3, 16, 16, seed=1).double(), random_pixels(1, 3, 16, 16, seed=2).double()
    along = random_pixels(1, 3, 16, 16, seed=3).double()
    a.requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(a, b).sum(), a)
    step = 1e-8  # short enough to cross no kink of ReLU or max-pooling
    with torch.no_grad():
        slope = (network(a + step * along, b) - network(a - step * along, b)) / (2 * step)
    assert float((gradient * along).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_a_place_where_nothing_is_seen_gives_no_distance_and_a_finite_gradient() -> None:
    stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())])
    nn.init.constant_(stages[0][0].bias, -100.0)  # every channel is off, whatever the picture
    network = Perceptual("blind", stages, [torch.ones(4)])
    a = random_pixels(1, 3, 8, 8, seed=1).requires_grad_(True)
    distance = network(a, random_pixels(1, 3, 8, 8, seed=2))
    distance.sum().backward()
    assert distance.tolist() == [0.0]
    assert a.grad is not None and torch.equal(a.grad, torch.zeros_like(a))


def test_autocast_does_not_make_it_coarser(embedded: Perceptual) -> None:
    a = random_pixels(2, 3, 32, 32)
    b = a + 0.01 * random_pixels(2, 3, 32, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        distances, seen = embedded(a, b), embedded.features(a)
    assert torch.equal(distances, embedded(a, b)) and torch.equal(seen, embedded.features(a))


def test_features_are_the_mean_of_the_last_stage(network: Perceptual) -> None:
    pixels = random_pixels(2, 3, 32, 48)
    found = network.features(pixels)
    x = (pixels - network.shift) / network.scale
    for stage in network.stages:
        x = stage(x)
    assert found.shape == (2, {"lpips-vgg16": 512, "sdcli-perceptual": 160}[network.name])
    assert torch.equal(found, x.mean(dim=(2, 3)))


@pytest.mark.parametrize("size", [(16, 16), (47, 33), (64, 20)])
def test_any_size_from_sixteen_pixels_on_is_compared(network: Perceptual, size: tuple[int, int]) -> None:
    assert float(network(random_pixels(1, 3, *size), random_pixels(1, 3, *size, seed=1))) > 0


def test_pictures_below_sixteen_pixels_are_refused(network: Perceptual) -> None:
    small = random_pixels(1, 3, 15, 40)
    with pytest.raises(InputError, match=r"pictures of 40 x 15 px.*both sides must have 16 px or more"):
        network(small, small)


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    reach = round(4 * sigma)
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    rows = (weight / weight.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    x = F.pad(pixels, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, rows, groups=3), rows.transpose(2, 3), groups=3)


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """Six shapes in colours of their own, and six faces, which differ in little: (12, 3, 32, 32) pixels."""
    pictures = [draw_shape(shape, number) for number, shape in enumerate(SHAPES)]
    for number in range(6):
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((3, 3, 28, 28), fill=(250, 200, 40 * number))
        for left in (9, 19):
            draw.ellipse((left, 10, left + 3 + number % 3, 14), fill="black")
        draw.arc((9, 12, 22, 24 - number % 2 * 4), 20, 160, fill=(150, 30, 30), width=2)
        pictures.append(image)
    return torch.cat([to_pixels(picture) for picture in pictures])


def test_the_distance_grows_with_every_step_of_blur_and_of_noise(embedded: Perceptual, drawn: Tensor) -> None:
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    blurs = [embedded(drawn, blurred(drawn, sigma)) for sigma in (0.5, 1.0, 2.0, 3.0)]
    noises = [embedded(drawn, drawn + sigma * noise) for sigma in (0.05, 0.1, 0.2, 0.4)]
    for growing in (blurs, noises):
        assert (growing[0] > 0).all()
        for less, more in pairwise(growing):
            assert (less < more).all()


def test_another_picture_is_farther_than_a_small_blur_a_little_noise_or_one_pixel(
    embedded: Perceptual, drawn: Tensor
) -> None:
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    moved = F.pad(drawn, (1, 0, 0, 0), mode="replicate")[..., :-1]
    # every other shape from a shape, every other face from a face
    others = [torch.cat([half.roll(places, 0) for half in drawn.split(6)]) for places in range(1, 6)]
    nearest = torch.stack([embedded(drawn, other) for other in others]).amin(dim=0)
    for changed in (blurred(drawn, 0.7), drawn + 0.1 * noise, moved):
        assert (embedded(drawn, changed) < nearest).all()


def test_of_changes_with_equal_squared_error_blur_is_the_farthest_and_a_shift_the_nearest(
    embedded: Perceptual, drawn: Tensor
) -> None:
    def error(changed: Tensor) -> Tensor:
        return (changed - drawn).square().mean(dim=(1, 2, 3), keepdim=True)

    moved = F.pad(drawn, (1, 0, 0, 0), mode="replicate")[..., :-1]
    soft = torch.cat(
        [
            min((blurred(one, 0.25 * k) for k in range(2, 24)), key=lambda x: abs(float((x - one).square().mean() - e)))
            for one, e in zip(drawn.split(1), error(moved).flatten(), strict=True)
        ]
    )
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    noisy = drawn + noise * error(moved).sqrt()
    shift, blur, grain = (float(embedded(drawn, x).mean()) for x in (moved, soft, noisy))
    assert float(error(soft).mean()) == pytest.approx(float(error(moved).mean()), rel=0.1)
    assert 2 * shift < grain < blur


def test_the_embedded_network_is_small_and_named_as_what_it_is(embedded: Perceptual) -> None:
    assert embedded.name == "sdcli-perceptual"
    assert sum(file.stat().st_size for file in features.EMBEDDED_FOLDER.iterdir()) < 3_000_000


def test_auto_takes_torchvision_s_file_from_the_hub_cache_and_else_the_embedded_network(
    torch_home: Path, vgg16: State, lpips: Perceptual
) -> None:
    assert [perceptual(choice).name for choice in ("auto", None)] == ["sdcli-perceptual"] * 2
    torch.save(vgg16, torch_home / "vgg16-397923af.pth")
    a, b = random_pixels(1, 3, 32, 32, seed=1), random_pixels(1, 3, 32, 32, seed=2)
    assert torch.equal(perceptual("auto")(a, b), lpips(a, b))  # the same weights, out of a .pth
    assert perceptual("builtin").name == "sdcli-perceptual"


def test_a_damaged_file_in_the_hub_cache_is_refused_and_not_passed_over(torch_home: Path) -> None:
    (torch_home / "vgg16-397923af.pth").write_bytes(b"half a download")
    with pytest.raises(InputError, match=r"vgg16-397923af\.pth: was not written by torch\.save"):
        perceptual("auto")


def test_half_precision_weights_are_widened(lpips: Perceptual, vgg16: State, tmp_path: Path) -> None:
    save_file({key: value.half() for key, value in vgg16.items()}, tmp_path / "half.safetensors")
    network = perceptual(str(tmp_path / "half.safetensors"))
    a, b = random_pixels(1, 3, 32, 32, seed=1), random_pixels(1, 3, 32, 32, seed=2)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert float(network(a, b)) == pytest.approx(float(lpips(a, b)), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda s: s.pop("features.2.weight"), InputError, r"has no features\.2\.weight; expected is .* vgg16"),
        (lambda s: s.update({"features.5.bias": torch.ones(3)}), InputError, r"has shape \(3,\), not \(128,\)"),
        (lambda s: s.update({"features.5.bias": torch.ones(128).int()}), InputError, "holds torch.int32"),
        (lambda s: s.update({"features.5.bias": torch.full((128,), torch.nan)}), NumericalError, "holds NaN or Inf"),
    ],
)
def test_weights_of_something_else_are_refused(
    vgg16: State, tmp_path: Path, change: Callable[[State], object], kind: type[SdcliError], message: str
) -> None:
    state = dict(vgg16)
    change(state)
    save_file(state, tmp_path / "vgg.safetensors")
    with pytest.raises(kind, match=rf"vgg\.safetensors: .*{message}") as refusal:
        perceptual(str(tmp_path / "vgg.safetensors"))
    assert refusal.value.hint


@pytest.mark.parametrize("content", [[torch.ones(3)], {"features.0.weight": "a text", 0: torch.ones(3)}])
def test_a_pickled_file_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"vgg\.pth: (holds no state dict|has no features\.0\.weight)"):
        perceptual(str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.safetensors"])
def test_a_file_that_is_missing_cut_short_or_a_folder_is_refused(vgg16_file: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=rf"{name}: no such file"):
        perceptual(str(path))
    path.write_bytes(vgg16_file.read_bytes()[:100_000])
    with pytest.raises(InputError, match=rf"{name}: (was not written by torch.save|is no whole safetensors file)"):
        perceptual(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=rf"{name}: is a folder"):
        perceptual(str(path))
