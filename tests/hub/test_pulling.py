"""`sdcli models pull`, and Hub ids where a model is named, against a small Hub on loopback."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any

import pytest

from sdcli.errors import ExitCode
from sdcli.hub import HubId, lacking_mark, pulling
from sdcli.hub import contents as contents_of
from sdcli.hub.choosing import Remote, Repository
from tests import models
from tests.commands import tree
from tests.forks import RUN_COMMAND, Ended, Forks
from tests.hubs import LARGE, PATIENCE, Faults, Hub, digest, model_files, small_file

UNET = "unet/diffusion_pytorch_model.safetensors"
Sdcli = Callable[..., Ended]


def refused(ended: Ended, code: ExitCode = ExitCode.INPUT) -> str:
    """What a command says that failed as it should: one line."""
    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (code, "", 1), ended.stderr
    return ended.stderr.removeprefix("sdcli: error: ").rstrip("\n")


def contents(cache: Path) -> dict[str, bytes]:
    """What the cache has of the one repository that it has, and nothing of locks."""
    (folder,) = cache.glob("models--*")
    return {name: data for name, data in tree(folder).items() if data is not None}


def test_a_model_is_fetched_once_and_what_is_new_of_it_later(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    files = model_files()
    first = hub.add("owner/tiny", files)
    record = json.loads(sdcli("models", "pull", "owner/tiny", "--json").stdout)
    read = [name for name in files if name.endswith(("config.json", "vocab.json", "merges.txt"))]
    read = [name for name in read if "safety" not in name] + ["model_index.json"]
    weights = [UNET, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert record == {
        "model": "owner/tiny",
        "repo": "owner/tiny",
        "model_revision": first,
        "path": str(cache / "models--owner--tiny" / "snapshots" / first),
        "files": sorted([*read, *weights]),
        "bytes": sum(len(files[name]) for name in (*read, *weights)),
        "bytes_fetched": sum(len(files[name]) for name in (*read, *weights)),
    }
    assert sorted(hub.fetched()) == sorted(Path(name).name for name in weights)
    assert {one.authorization for one in hub.requests} == {None}
    again = sdcli("models", "pull", "owner/tiny")
    assert (again.code, again.stdout, len(hub.requests)) == (0, record["path"] + "\n", 1)
    assert "nothing to fetch, all was there" in again.stderr
    second = hub.add("owner/tiny", files | {UNET: b"another" * 1000})
    assert sdcli("models", "show", "owner/tiny").code == ExitCode.INPUT  # what is in its files is no model's; but ...
    assert hub.requests == []  # ... what is in the cache asks nobody, however old it is
    record = json.loads(sdcli("models", "pull", "owner/tiny", "--json").stdout)
    assert (record["model_revision"], record["bytes_fetched"]) == (second, 7000)
    listed = [json.loads(line) for line in sdcli("models", "list", "--json").stdout.splitlines()]
    assert {row["model"]: row.get("model_revision") for row in listed} == {
        "builtin": None,
        "owner/tiny": second,
        f"owner/tiny@{first}": first,
    }


def test_the_cache_is_what_huggingface_hub_makes_of_the_same_files(
    sdcli: Sdcli, online: Forks, hub: Hub, cache: Path
) -> None:
    commit = hub.add("owner/tiny", model_files())
    assert sdcli("models", "pull", "owner/tiny").code == 0
    ours = contents(cache)
    names = [name.split("/", 2)[2] for name in ours if name.startswith(f"snapshots/{commit}/")]
    assert len(names) == 11
    hub.requests.clear()
    code = "from huggingface_hub import snapshot_download; import sys\n"
    code += (
        "for folder in arguments[:2]: snapshot_download('owner/tiny', cache_dir=folder, allow_patterns=arguments[2:])"
    )
    ended = online.python(code, [str(cache.parent / "theirs"), str(cache), *names])
    assert ended.code == 0, ended.stderr
    assert ours == {name: data for name, data in contents(cache.parent / "theirs").items() if "trees" not in name}
    assert hub.fetched().count(Path(UNET).name) == 2  # of UNet and VAE, for their cache, and not again for ours


def test_diffusers_reads_what_was_pulled(sdcli: Sdcli, hub: Hub, cache: Path, sd1: Path) -> None:
    files = {path.relative_to(sd1).as_posix(): path.read_bytes() for path in sd1.rglob("*") if path.is_file()}
    hub.add("owner/tiny", files)
    assert sdcli("models", "pull", "owner/tiny").code == 0
    unet = models.pipeline("owner/tiny", cache_dir=cache).unet.state_dict()
    expected = models.pipeline(sd1).unet.state_dict()
    assert all(bool((unet[key] == expected[key]).all()) for key in expected)


# What breaks off.


def test_what_broke_off_is_gone_on_with_and_is_no_model_until_then(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    files = model_files()
    hub.add("owner/tiny", files)
    hub.faults.breaks_after = {UNET: 30_000}
    assert sdcli("models", "pull", "owner/tiny").code == 0  # two answers to one file
    ranges = [one.range for one in hub.requests if one.path.endswith(UNET) and "/cdn/" in one.path]
    assert ranges == [None, "bytes=30000-"]
    assert sdcli("models", "remove", "owner/tiny", "--yes").code == 0
    hub.faults.breaks_after = {"vae/diffusion_pytorch_model.safetensors": 0}
    line = refused(sdcli("models", "pull", "owner/tiny"))
    assert line.startswith("owner/tiny: vae/diffusion_pytorch_model.safetensors broke off (")
    assert line.endswith("what has arrived is kept: the same command goes on from there")
    assert "is not in the local cache, or not whole" in refused(sdcli("models", "show", "owner/tiny", "--offline"))
    listed = sdcli("models", "list")
    assert (listed.stdout.count("\n"), "owner/tiny" in listed.stdout) == (1, False)
    hub.faults.breaks_after = {}
    assert sdcli("models", "pull", "owner/tiny").code == 0
    assert list(cache.glob("**/*.incomplete")) == []


def test_what_a_stopped_process_has_fetched_is_gone_on_with_by_one_that_waits(
    online: Forks, sdcli: Sdcli, hub: Hub, cache: Path
) -> None:
    hub.add("owner/tiny", model_files())
    hub.faults.waits = threading.Event()
    command = [sys.executable, "-m", "sdcli", "models", "pull", "owner/tiny"]
    environment = {**online.environment, "HF_HUB_CACHE": str(cache)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: [path.stat().st_size for path in cache.glob("**/*.incomplete")] == [25_000])
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(sdcli, "models", "pull", "owner/tiny", "--json")
            until(lambda: [one.path for one in hub.requests] == ["/api/models/owner/tiny"])
            process.send_signal(signal.SIGTERM)  # a shell script starts its background jobs with SIGINT ignored
            assert process.wait(PATIENCE) == ExitCode.TERMINATED
            hub.faults.waits.set()
            record = json.loads(waiting.result(PATIENCE).stdout)
        assert process.stderr is not None and process.stderr.read() == "sdcli: error: stopped\n"
    assert record["bytes_fetched"] == 125_000  # the configs and half of the first file were there


def until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_every_third_write_nothing_half_is_left_that_counts(online: Forks, hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/tiny", model_files())
    cache = tmp_path / "straight"
    straight = online.sdcli("models", "pull", "owner/tiny", environment={"HF_HUB_CACHE": str(cache)})
    assert straight.code == 0 and straight.writes > 60
    for at in range(1, straight.writes + 1, 3):
        environment = {"HF_HUB_CACHE": str(tmp_path / str(at))}
        killed = online.sdcli("models", "pull", "owner/tiny", at=at, send=signal.SIGKILL, environment=environment)
        assert killed.code == -signal.SIGKILL
        shown = online.sdcli("models", "list", "--json", environment=environment).stdout
        is_listed = "owner/tiny" in shown
        assert not is_listed or len(list((tmp_path / str(at)).glob(f"*/snapshots/{commit}/**/*.safetensors"))) == 3
        assert online.sdcli("models", "pull", "owner/tiny", environment=environment).code == 0
        left = contents(tmp_path / str(at))
        assert {name: data for name, data in left.items() if not name.endswith(".part")} == contents(cache)


def test_what_broke_off_of_another_file_stays_as_long_as_the_hub_has_that_file(
    sdcli: Sdcli, hub: Hub, original: bytes, cache: Path
) -> None:
    files = {"large.ckpt": b"l" * 50_000, "sd.safetensors": original}
    hub.add("owner/two", files)
    hub.faults.breaks_after, hub.faults.ignores_ranges = {"large.ckpt": 30_000}, True
    assert "broke off" in refused(sdcli("models", "pull", "owner/two/large.ckpt"))
    hub.faults = Faults()
    for commit, left in ((files, [30_000]), (files | {"large.ckpt": b"another"}, [])):
        hub.add("owner/two", commit)
        assert sdcli("models", "pull", "owner/two/sd.safetensors").code == 0
        assert [path.stat().st_size for path in cache.glob("models--owner--two/blobs/*.incomplete")] == left


def test_a_server_that_begins_anew_is_followed(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    hub.add("owner/tiny", model_files())
    hub.faults.breaks_after, hub.faults.ignores_ranges = {UNET: 30_000}, True
    assert "broke off" in refused(sdcli("models", "pull", "owner/tiny"))
    hub.faults.breaks_after = {}
    assert sdcli("models", "pull", "owner/tiny").code == 0
    assert sdcli("models", "list").stdout.count("owner/tiny  ") == 1


def test_a_server_that_begins_anew_again_and_again_is_given_up(sdcli: Sdcli, hub: Hub) -> None:
    hub.add("owner/tiny", model_files())
    hub.faults.breaks_after = {UNET: chain([20_000, 10_000, 11_000, 30_000] + 10 * [10_000, 20_000], repeat(50_000))}
    hub.faults.ignores_ranges = True
    assert "broke off" in refused(sdcli("models", "pull", "owner/tiny"))
    assert len([one for one in hub.requests if one.path.endswith(UNET) and "/cdn/" in one.path]) == 8


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"y" * 50_000, "did not arrive as it is on the Hub (its hash is another)"),
        (b"y" * 60_000, "is longer than the 50,000 bytes it should have"),
        (b"y" * 10_000, "broke off (it ended early)"),
    ],
)
def test_wrong_bytes_are_never_taken_for_a_file(sdcli: Sdcli, hub: Hub, cache: Path, sent: bytes, said: str) -> None:
    files = model_files()
    hub.add("owner/tiny", files)
    hub.faults.sends = {UNET: sent}
    assert said in refused(sdcli("models", "pull", "owner/tiny"))
    assert not any(digest(UNET, files[UNET]) == path.name for path in cache.rglob("blobs/*"))
    hub.faults.sends = {}
    assert sdcli("models", "pull", "owner/tiny").code == 0  # what is left of the wrong ones is seen to be wrong
    assert contents(cache)[f"snapshots/{next(iter(hub.repos['owner/tiny'].commits))}/{UNET}"] == files[UNET]


def test_a_file_of_the_cache_that_was_cut_short_is_fetched_again(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    files = model_files()
    commit = hub.add("owner/tiny", files)
    sdcli("models", "pull", "owner/tiny")
    path = cache / "models--owner--tiny" / "snapshots" / commit / UNET
    path.resolve().write_bytes(b"short")
    assert json.loads(sdcli("models", "pull", "owner/tiny", "--json").stdout)["bytes_fetched"] == 50_000
    assert path.read_bytes() == files[UNET]


def test_a_disk_without_room_is_told_before_and_when_it_fills(
    sdcli: Sdcli, online: Forks, hub: Hub, cache: Path
) -> None:
    hub.add("owner/tiny", model_files())
    hub.faults.about = lambda row: with_sizes(row, 1 << 60)
    line = refused(sdcli("models", "pull", "owner/tiny"), ExitCode.OUTPUT)
    assert line.startswith("owner/tiny: needs 3,458,764,513,820.5 MB in ") and "free some space" in line
    assert hub.fetched() == []
    hub.faults.about = lambda row: row
    ended = online.sdcli("models", "pull", "owner/tiny", file_limit=20_000, environment={"HF_HUB_CACHE": str(cache)})
    assert "file too large; free some space, or let HF_HUB_CACHE" in refused(ended, ExitCode.OUTPUT)
    line = refused(sdcli("models", "pull", "owner/tiny", HF_HUB_CACHE="/dev/null/x"), ExitCode.OUTPUT)
    assert "/dev/null/x/models--owner--tiny: not a directory; free some space, or let HF_HUB_CACHE" in line


def test_a_folder_that_another_process_removes_meanwhile_is_no_full_disk(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    hub.add("owner/tiny", model_files())

    def removing() -> Iterator[int]:
        shutil.rmtree(cache / "models--owner--tiny")
        yield 50_000

    hub.faults.breaks_after = {UNET: removing()}
    line = refused(sdcli("models", "pull", "owner/tiny"), ExitCode.OUTPUT)
    assert line.endswith("no such file or directory (removed by another process); run the same command again")
    hub.faults = Faults()
    assert sdcli("models", "pull", "owner/tiny").code == 0


def test_what_is_fetched_is_hashed_once(online: Forks, hub: Hub, cache: Path) -> None:
    hub.add("owner/tiny", model_files())
    counted = "import hashlib, sys; whole = hashlib.file_digest\n"
    counted += "def count(*given): print('hashed', file=sys.stderr); return whole(*given)\n"
    counted += f"hashlib.file_digest = count; {RUN_COMMAND}"
    ended = online.python(counted, ["models", "pull", "owner/tiny"], environment={"HF_HUB_CACHE": str(cache)})
    assert (ended.code, ended.stderr.count("hashed")) == (0, 11)


def with_sizes(row: dict[str, Any], size: int) -> dict[str, Any]:
    for one in row["siblings"]:
        if "lfs" in one:
            one["lfs"]["size"] = size
    return row


# What the Hub refuses.


def test_what_the_hub_does_not_have_is_told_by_name(sdcli: Sdcli, hub: Hub) -> None:
    hub.add("owner/tiny", model_files())
    for ref, said in (
        ("owner/none", "owner/none: is not on the Hub, or private; check the name; of a private one, set HF_TOKEN"),
        ("owner/tiny@v9", "owner/tiny@v9: has no revision v9; name a branch, a tag or a commit that it has"),
        (f"owner/tiny@{'0' * 40}", f"has no revision {'0' * 40}"),
        (
            "owner/tiny/x.ckpt",
            "owner/tiny/x.ckpt: there is no such file; owner/tiny has safety_checker/model.safetensors",
        ),
    ):
        assert said in refused(sdcli("models", "pull", ref))


def test_a_token_opens_what_is_private_or_gated_and_is_never_shown(sdcli: Sdcli, hub: Hub) -> None:
    for name in ("private", "gated"):
        hub.add(f"owner/{name}", model_files())
        hub.repos[f"owner/{name}"].token = "hf_secret"
    hub.repos["owner/gated"].is_gated = True
    assert "is not on the Hub, or private" in refused(sdcli("models", "pull", "owner/private"))
    line = refused(sdcli("models", "pull", "owner/gated"))
    assert f"owner/gated: is gated; accept its terms at {hub.endpoint}/owner/gated, and set HF_TOKEN" in line
    wrong = sdcli("models", "pull", "owner/private", "--debug", HF_TOKEN="hf_wrong")
    assert "is not on the Hub, or private" in wrong.stderr and "Traceback" in wrong.stderr
    assert "hf_wrong" not in wrong.stdout + wrong.stderr
    assert "is gated" in refused(sdcli("models", "pull", "owner/gated", HF_TOKEN="hf_wrong"))
    for name in ("private", "gated"):
        ended = sdcli("models", "pull", f"owner/{name}", "--json", HF_TOKEN="hf_secret")
        assert (ended.code, "hf_secret" in ended.stdout + ended.stderr) == (0, False)
    at_the_hub = {one.authorization for one in hub.requests if one.host.startswith("127.0.0.1")}
    elsewhere = {one.authorization for one in hub.requests if one.host.startswith("localhost")}
    assert (at_the_hub, elsewhere) == ({"Bearer hf_secret"}, {None})


def test_a_hub_that_fails_or_is_not_there_is_told(sdcli: Sdcli, hub: Hub, online: Forks, cache: Path) -> None:
    hub.add("owner/tiny", model_files())
    hub.faults.status = 503
    assert "the Hub cannot be asked (the Hub answers with HTTP 503)" in refused(sdcli("models", "pull", "owner/tiny"))
    hub.faults.status, hub.faults.about = 0, lambda row: ["no", "object"]
    assert "the Hub cannot be asked" in refused(sdcli("models", "pull", "owner/tiny"))
    hub.faults.about = lambda row: row | {"sha": "../../x"}
    assert "answers what makes no sense (commit '../../x')" in refused(sdcli("models", "pull", "owner/tiny"))
    code = "import huggingface_hub.constants as c; c.ENDPOINT = 'http://127.0.0.1:9'; "
    code += "from sdcli.cli import app; import sys; sys.exit(app.run(arguments))"
    ended = online.python(code, ["models", "pull", "owner/tiny"], environment={"HF_HUB_CACHE": str(cache)})
    assert "the Hub cannot be asked (ConnectError: [Errno 111] Connection refused)" in refused(ended)


def test_of_what_a_server_says_no_more_is_read_than_means_something(sdcli: Sdcli, hub: Hub) -> None:
    hub.add("owner/tiny", model_files())
    hub.faults.refusal_bytes = 64 << 20
    hub.sent_in_refusals = 0
    assert "has no revision v9" in refused(sdcli("models", "pull", "owner/tiny@v9"))
    hub.repos["owner/tiny"].token, hub.repos["owner/tiny"].is_gated = "hf_secret", True
    assert "is gated" in refused(sdcli("models", "pull", "owner/tiny"))
    assert hub.sent_in_refusals < 64 << 20  # of twice as much; the rest was under way
    hub.faults.about = lambda row: row | {"id": "x" * (17 << 20)}
    assert "the Hub tells more than 16,777,216 bytes of it" in refused(sdcli("models", "pull", "owner/tiny"))


def test_no_name_of_a_hostile_server_leads_out_of_the_cache(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    names = ["../../evil.json", "/tmp/evil.json", "unet/../../../evil.json", "unet/..", "a\\..\\b.json", "..", ""]
    hub.add("owner/tiny", model_files() | {f"{at}{name}": b"evil" for name in names for at in ("", "tokenizer/")})
    ended = sdcli("models", "pull", "owner/tiny")
    assert ended.code == 0, ended.stderr
    files = {path.relative_to(cache.parent).parts[:2] for path in cache.parent.rglob("*") if path.is_file()}
    assert files == {("hub", ".locks"), ("hub", "models--owner--tiny")}
    assert not Path("/tmp/evil.json").exists()
    assert "evil" not in {path.read_text() for path in cache.glob("models--*/snapshots/*/tokenizer/*")}


@pytest.mark.parametrize("name", ["\x1b[31mred", "half \ud800", "line\n", "y" * 300, "folder/" * 200])
def test_a_file_whose_name_cannot_be_shown_or_written_is_no_file(sdcli: Sdcli, hub: Hub, name: str) -> None:
    hub.add("owner/odd", {f"{name}.safetensors": small_file()})
    line = refused(sdcli("models", "pull", "owner/odd"))
    assert line.endswith("it has neither a model_index.json nor a .safetensors file beside it; it has none")


def test_a_name_in_the_cache_steers_no_terminal(sdcli: Sdcli, cache: Path) -> None:
    folder, commit = cache / "models--owner--odd", "a" * 40
    for place in ("snapshots", ".no_exist"):
        (folder / place / commit).mkdir(parents=True)
    (folder / ".no_exist" / commit / "model_index.json").write_text("\x1b[31mred.safetensors", encoding="utf-8")
    (folder / "snapshots" / commit / "\x1b[31mred.safetensors").write_bytes(small_file())
    for command in (("list",), ("remove", "owner/odd", "--yes")):
        ended = sdcli("models", *command)
        assert (ended.code, "\x1b" in ended.stdout) == (0, False)


def test_a_file_without_a_sound_hash_and_size_is_no_file(sdcli: Sdcli, hub: Hub) -> None:
    hub.add("owner/tiny", {name: data for name, data in model_files().items() if not name.endswith(LARGE)})
    changes = cycle([{"blobId": "../../../x"}, {"size": -1}, {"size": "1"}, {"blobId": None}, {"size": True}])
    hub.faults.about = lambda row: row | {"siblings": [one | next(changes) for one in row["siblings"]]}
    line = refused(sdcli("models", "pull", "owner/tiny"))
    assert line.endswith("it has neither a model_index.json nor a .safetensors file beside it; it has none")


def test_where_there_are_no_links_files_are_there_themselves(
    sdcli: Sdcli, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = model_files()
    commit = hub.add("owner/tiny", files)
    repository = Repository(HubId("owner/tiny"), commit, {UNET: Remote(UNET, 50_000, digest(UNET, files[UNET]))})
    blob = contents_of.blob_of(repository, repository.files[UNET])
    blob.parent.mkdir(parents=True)
    blob.write_bytes(files[UNET])
    monkeypatch.setattr("os.symlink", no_links)
    contents_of.link(blob, repository.folder / UNET)
    assert (blob.exists(), (repository.folder / UNET).is_symlink()) == (False, False)
    record = json.loads(sdcli("models", "pull", "owner/tiny", "--json").stdout)
    assert UNET in record["files"]
    assert not any(UNET in one.path for one in hub.requests)


def test_a_link_that_fails_for_another_reason_leaves_the_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(HubId("owner/tiny"), "a" * 40, {UNET: Remote(UNET, 3, "b" * 64)})
    blob = contents_of.blob_of(repository, repository.files[UNET])
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"abc")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.symlink", full)
    with pytest.raises(OSError, match="no space"):
        contents_of.link(blob, repository.folder / UNET)
    assert blob.read_bytes() == b"abc"


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "operation not permitted")


# What it is.


def test_another_kind_of_model_is_refused_before_its_weights(sdcli: Sdcli, hub: Hub) -> None:
    hub.add("owner/flux", model_files("FluxPipeline"))
    for command in ("pull", "show"):
        assert refused(sdcli("models", command, "owner/flux")).startswith(
            "owner/flux: is a 'FluxPipeline'; only models"
        )
        assert hub.fetched() == []


def test_a_single_file_is_known_by_its_header_before_it_is_fetched(sdcli: Sdcli, hub: Hub, cache: Path) -> None:
    lora = small_file("lora_unet_down_blocks_0.lora_down.weight", shape=(4000, 100))
    hub.add("owner/lora", {"pytorch_lora_weights.safetensors": lora, "README.md": b""})
    hub.faults.breaks_after = {"pytorch_lora_weights.safetensors": 70_000}  # so that all of it would take 12 answers
    line = refused(sdcli("models", "pull", "owner/lora"))
    assert line == "owner/lora: is a LoRA, no model; a LoRA is added to a model"
    assert len(hub.fetched()) <= 2
    assert list(cache.glob("models--owner--lora/blobs/*")) == []
    assert "not whole" not in sdcli("models", "list").stderr


def test_of_two_files_in_the_cache_none_is_taken_for_the_repository(sdcli: Sdcli, hub: Hub, original: bytes) -> None:
    commit = hub.add("owner/two", {"a.safetensors": original, "b.safetensors": original[:-1] + b"1"})
    assert sdcli("models", "pull", "owner/two/b.safetensors").code == 0
    mark = lacking_mark(HubId("owner/two"), commit)
    mark.parent.mkdir(parents=True)
    for name in ("", "a.safetensors", "sub/b.safetensors", "../b.safetensors", "y" * 999):  # "": huggingface_hub's own
        mark.write_text(name, encoding="utf-8")
        assert "is not in the local cache" in refused(sdcli("models", "show", "owner/two", "--offline"))


def test_a_repository_of_one_file_is_that_file(sdcli: Sdcli, hub: Hub, original: bytes, cache: Path) -> None:
    commit = hub.add("owner/single", {"sd.safetensors": original, "sub/b.safetensors": original, "x.yaml": b""})
    record = json.loads(sdcli("models", "pull", "owner/single", "--json").stdout)
    assert (record["bytes_fetched"], record["model_revision"]) == (len(original), commit)
    assert record["path"].endswith(f"snapshots/{commit}/sd.safetensors")
    shown = json.loads(sdcli("models", "show", "owner/single", "--offline", "--json").stdout)
    assert (shown["model"], shown["model_revision"]) == ("owner/single", commit)
    other = json.loads(sdcli("models", "show", "owner/single/sub/b.safetensors@main", "--json").stdout)
    assert (other["model_revision"], hub.fetched()) == (commit, [])  # the same content, which is there
    listed = sdcli("models", "list").stdout
    assert "owner/single  " in listed and "owner/single/sub/b.safetensors  " in listed
    assert pulling.in_cache(HubId("owner/single", "x.safetensors")) is None


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small checkpoint in one file."""
    from tests import originals

    path = originals.write(tmp_path_factory.mktemp("original") / "sd.safetensors", originals.Kind(vocabulary=10))
    return path.read_bytes()


# Offline.


@pytest.mark.parametrize("variable", ["SDCLI_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked(sdcli: Sdcli, hub: Hub, variable: str) -> None:
    hub.add("owner/tiny", model_files())
    name = {"SDCLI_OFFLINE": "--offline"}.get(variable, variable)
    line = refused(sdcli("models", "pull", "owner/tiny", **{variable: "1"}), ExitCode.USAGE)
    assert line == f"{name} with models pull, which asks the Hub what it has; leave one of them out"
    line = refused(sdcli("models", "show", "owner/tiny", **{variable: "1"}))
    assert line == "owner/tiny: is not in the local cache, or not whole; sdcli models pull owner/tiny fetches it"
    assert hub.requests == []


def test_offline_a_commit_that_is_whole_is_named(sdcli: Sdcli, hub: Hub) -> None:
    commit = hub.add("owner/tiny", model_files(), "v1")
    assert sdcli("models", "pull", "owner/tiny@v1").code == 0
    line = refused(sdcli("models", "show", "owner/tiny", "--offline"))
    assert line.endswith("sdcli models pull owner/tiny fetches it, or name owner/tiny@v1, which is whole")
    hub.requests.clear()
    assert sdcli("models", "pull", f"owner/tiny@{commit}").code == 0
