"""What many tests start from: a few drawn pictures, a tiny VAE and a tiny model trained on them, real processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw

from tests.commands import Shell
from tests.forks import Forks
from tests.runs import train_unet, train_vae

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere: no test opens a socket

# The same examples every time, however slow the machine is at the moment.
settings.register_profile("sdcli", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sdcli")

SHAPES = ("disc", "square", "ring", "cross", "bar", "dot")
SIDE = 32  # px


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, README's examples: of two processes neither waits for the other in the end."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache, and the warm process, of whoever runs the tests out of them."""
    os.environ["SDCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="session")
def forks(own_cache: None) -> Iterator[Forks]:
    """Real processes, cheap: see `forks.py`."""
    client = Forks()
    yield client
    client.close()


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model shaped like Stable Diffusion 1.x; to be read only."""
    from tests import models  # deferred, as below: imports diffusers, which must see HF_HUB_OFFLINE

    return models.write_sd1(tmp_path_factory.mktemp("sd1"))


@pytest.fixture
def shell(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd1: Path
) -> Shell:
    """Commands in an empty folder, with the tiny model as the default."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SDCLI_MODEL", str(sd1))
    return Shell(capfdbinary, monkeypatch)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model shaped like Stable Diffusion XL; to be read only."""
    from tests import models

    return models.write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 32 x 32 with much in it, and a mask that is white in a part whose edges cut through latents."""
    folder = tmp_path_factory.mktemp("picture_files")
    pixels = np.kron(np.random.default_rng(5).integers(0, 256, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    white = np.zeros((32, 32), np.uint8)
    white[5:, 11:27] = 255
    Image.fromarray(white).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose UNet predicts variances, too; to be read only."""
    from tests import models

    return models.write_learned(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="session")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for inpainting, of nine channels; to be read only."""
    from tests import models

    return models.write_inpainting(tmp_path_factory.mktemp("inpainting"))


@pytest.fixture(scope="session")
def classed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that draws classes; to be read only."""
    from tests import models

    return models.write_classes(tmp_path_factory.mktemp("classed"))


@pytest.fixture(scope="session")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that draws whatever it learned; to be read only."""
    from tests import models

    return models.write_classes(tmp_path_factory.mktemp("unconditional"), names=())


@pytest.fixture
def model(sd1: Path, tmp_path: Path) -> Path:
    """A copy of that model, which a test may spoil."""
    from tests import models

    return models.copy(sd1, tmp_path / "model")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn pictures of 32 x 32 with a caption beside each; to be read only."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, shape in enumerate(SHAPES):
        draw_shape(shape, number).save(folder / f"{shape}.png")
        (folder / f"{shape}.txt").write_text(f"a picture of a {shape}\n", encoding="utf-8")
    return folder


@pytest.fixture
def own_pictures(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


@pytest.fixture(scope="session")
def vae_run(pictures: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny VAE, trained for six steps without a stop."""
    run = tmp_path_factory.mktemp("straight") / "vae"
    ended = forks.sdcli(*train_vae(pictures, run))
    assert ended.code == 0, ended.stderr
    return run


@pytest.fixture(scope="session")
def unet_run(pictures: Path, vae_run: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny model, its text encoder trained along, for six steps without a stop."""
    run = tmp_path_factory.mktemp("straight") / "unet"
    ended = forks.sdcli(*train_unet(pictures, run, vae_run))
    assert ended.code == 0, ended.stderr
    return run


def draw_shape(shape: str, number: int) -> Image.Image:
    """One of the six pictures: a shape in a colour of its own on a colour of its own."""
    image = Image.new("RGB", (SIDE, SIDE), (40 * number, 255 - 30 * number, 90))
    draw = ImageDraw.Draw(image)
    colour = (255 - 40 * number, 30 * number, 200)
    outlines = {"disc": (6, 6, 26, 26), "ring": (4, 4, 28, 28), "dot": (12, 12, 20, 20)}
    boxes = {"square": [(7, 7, 25, 25)], "bar": [(2, 12, 30, 20)], "cross": [(13, 3, 19, 29), (3, 13, 29, 19)]}
    if shape in outlines:
        draw.ellipse(outlines[shape], fill=None if shape == "ring" else colour, outline=colour, width=3)
    for box in boxes.get(shape, []):
        draw.rectangle(box, fill=colour)
    return image
