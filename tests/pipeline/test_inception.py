"""Inception v3 as FID has it: the published names and sizes, the three differences, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline import frechet
from sdcli.pipeline.inception import Block, Inception, inception
from sdcli.pipeline.measures import RunningGaussian, frechet_distance

CPU = torch.device("cpu")
# torchvision's inception_v3 without its auxiliary classifier has 23,834,568, of which its last layer has 2,049,000.
PARAMETERS = 23_834_568 - 2_049_000
CONVOLUTIONS = 94
# Names and shapes as published with the weights, one of each kind of block.
PUBLISHED = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_1a_3x3.bn.running_var": (32,),
    "Conv2d_3b_1x1.conv.weight": (80, 64, 1, 1),
    "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
    "Mixed_6d.branch7x7_2.conv.weight": (160, 160, 1, 7),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
    "Mixed_7c.branch_pool.bn.bias": (192,),
}


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    return Inception()


@pytest.fixture(scope="module")
def state(network: Inception) -> dict[str, Tensor]:
    """What a published file holds: no counters of batches, but the classes."""
    kept = {key: value.clone() for key, value in network.state_dict().items() if "num_batches" not in key}
    return kept | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def test_it_has_the_published_names_shapes_and_number_of_parameters(network: Inception) -> None:
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert PUBLISHED.items() <= shapes.items()
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS
    assert sum(key.endswith("conv.weight") for key in shapes) == CONVOLUTIONS


def test_the_grid_shrinks_as_in_the_paper_to_2048_numbers_a_picture(network: Inception) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape[1:])}))
        for name, module in network.named_children()
    ]
    with torch.no_grad():
        found = network.features(torch.rand(1, 3, 64, 48) * 2 - 1)
    for hook in hooks:
        hook.remove()
    assert found.shape == (1, 2048) and found.dtype == torch.float32
    expected = {"Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2b_3x3": (64, 147, 147), "Conv2d_4a_3x3": (192, 71, 71)}
    expected |= {"Mixed_5b": (256, 35, 35), "Mixed_5d": (288, 35, 35), "Mixed_6a": (768, 17, 17)}
    expected |= {"Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8), "Mixed_7c": (2048, 8, 8)}
    assert expected.items() <= seen.items()


def test_average_pools_do_not_count_their_padding_and_the_last_block_takes_the_maximum(network: Inception) -> None:
    ones = torch.ones(1, 1, 4, 4)
    for name in ("Mixed_5b", "Mixed_5d", "Mixed_6b", "Mixed_6e", "Mixed_7b"):
        block = network.get_submodule(name)
        assert isinstance(block, Block) and torch.equal(block._pooled(ones), ones)
        assert block._pooled(torch.eye(4)[None, None])[0, 0, 0, 0] == 0.5  # two of the four in the picture
    last = network.get_submodule("Mixed_7c")
    assert isinstance(last, Block) and last._pooled(torch.eye(4)[None, None])[0, 0, 0, 0] == 1.0


def test_chains_lie_beside_each_other_in_the_published_order() -> None:
    block = Inception().get_submodule("Mixed_7b")
    x = torch.rand(1, 1280, 8, 8)
    with torch.no_grad():
        out = block(x)
        assert torch.equal(out[:, :320], block.get_submodule("branch1x1")(x))
        once = block.get_submodule("branch3x3_1")(x)
        assert torch.equal(out[:, 320:704], block.get_submodule("branch3x3_2a")(once))
        assert torch.equal(out[:, 704:1088], block.get_submodule("branch3x3_2b")(once))


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_come_from_a_file_and_its_names_tell_the_family(
    state: dict[str, Tensor], network: Inception, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"weights{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    loaded = frechet.extractor(str(path), CPU)
    assert isinstance(loaded, Inception) and loaded.name == "fid-inception-v3"
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.features(pixels), network.features(pixels))


def test_the_distance_of_pictures_to_themselves_is_0_and_to_others_more(network: Inception) -> None:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    size = network.features(pixels).std()  # untrained, its numbers are tiny
    found = []
    for some in (pixels, pixels, -pixels.abs()):
        seen = RunningGaussian()
        seen.add(network.features(some)[:, :64] / size)  # of 2,048 the roots take a minute
        found.append(seen.gaussian())
    assert frechet_distance(found[0], found[1]) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(found[0], found[2]) > 0.01


def test_files_of_something_else_are_refused_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    wrong = {
        "holds neither VGG16 nor Inception v3": {"weight": torch.zeros(1)},
        r"has no Mixed_7c\.branch1x1\.conv\.weight": {k: v for k, v in state.items() if "7c.branch1x1" not in k},
        r"Conv2d_1a_3x3\.bn\.bias has shape \(3,\), not \(32,\)": state | {"Conv2d_1a_3x3.bn.bias": torch.zeros(3)},
        "is an Inception v3 of 1000 classes, not FID's of 1008": state | {"fc.weight": torch.zeros(1000, 2048)},
        "holds torch.int64": state | {"Conv2d_1a_3x3.bn.bias": torch.zeros(32, dtype=torch.int64)},
    }
    for words, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(InputError, match=words):
            frechet.extractor(str(path), CPU)
    save_file(state | {"Conv2d_1a_3x3.bn.bias": torch.full((32,), torch.nan)}, path)
    with pytest.raises(NumericalError, match="holds NaN or Inf"):
        inception(path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"weights\.safetensors: is no whole safetensors file"):
        frechet.extractor(str(path), CPU)
