"""A small Hub on loopback, and commands in processes that may ask it; all else runs without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forks import RUN_COMMAND, Ended, Forks
from tests.hubs import Faults, Hub

IMPATIENT = "from sdcli.hub import fetching; fetching.PAUSE = 0.01; "
WARM_UP = ("huggingface_hub.hf_api", "sdcli.cli.app", "sdcli.cli.models", "sdcli.facts", "sdcli.listing")
Sdcli = Callable[..., Ended]


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def online(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes in which huggingface_hub asks that Hub, and nobody else."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "", "SDCLI_OFFLINE": ""}
    forks = Forks(WARM_UP, environment)
    yield forks
    forks.close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The Hub, empty and without a fault."""
    server.repos.clear()
    server.requests.clear()
    server.faults = Faults()
    return server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def sdcli(online: Forks, hub: Hub, cache: Path) -> Sdcli:
    """One command that may ask the Hub; the requests are those of the last one."""

    def run(*arguments: object, **environment: str) -> Ended:
        hub.requests.clear()
        environment = {"HF_HUB_CACHE": str(cache), **environment}
        return online.python(IMPATIENT + RUN_COMMAND, [str(one) for one in arguments], environment=environment)

    return run
