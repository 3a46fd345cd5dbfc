"""The gallery: one file that shows the pictures of a folder, whatever their names and prompts are."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from sdcli.pages import gallery as module
from sdcli.pages.gallery import write_gallery
from tests import browser
from tests.pages.test_report import Element, Page, needs_chromium, picture

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"


def record(name: str, **own: Any) -> dict[str, Any]:
    """What a ledger says of a picture."""
    usual = {"prompt": "a dog", "negative": "", "model": "builtin", "model_hash": "0" * 64, "seed": 7}
    usual |= {"width": 64, "height": 64, "scheduler": "dpm", "steps": 25, "evaluations": 25, "guidance": 7.5}
    return {"key": "k", **usual, "seconds": 1.0, "tokens": {"kept": 3}, "job": "k", "path": name} | own


def draw(folder: Path, name: str, colour: str = "magenta", size: tuple[int, int] = (64, 64)) -> None:
    Image.new("RGB", size, colour).save(folder / name)


def write(folder: Path, records: Sequence[dict[str, Any]], left_out: int = 0) -> Page:
    assert list(write_gallery(folder, records, left_out)) == list(range(1, len(records) + 1))
    return Page(folder / "gallery.html")


def common(page: Page) -> dict[str, str]:
    return page.facts("common")


def cards(page: Page) -> list[Element]:
    return page.all("li", "card")


def test_every_picture_is_there_in_its_order_with_its_thumbnail_its_words_and_a_relative_link(tmp_path: Path) -> None:
    draw(tmp_path, "b.png", "red")
    draw(tmp_path, "a.jpg", "blue", (800, 400))
    draw(tmp_path, "c.webp")
    page = write(tmp_path, [record("b.png", prompt="one"), record("a.jpg", prompt="two"), record("c.webp", prompt="")])
    images = [e for e in page.all("img") if "src" in e.attributes]
    assert [e.attributes["alt"] for e in images] == page.texts("p", "title") == ["one", "two", "c.webp"]
    assert [e.attributes["href"] for e in page.all("a")[:3]] == ["./b.png", "./a.jpg", "./c.webp"]
    assert [picture(e).size for e in images] == [(64, 64), (320, 160), (64, 64)]
    assert picture(images[0]).convert("RGB").getpixel((9, 9)) == (255, 0, 0)
    assert page.texts("p", "run") == ["3 pictures"]


def test_what_all_have_in_common_is_said_once_and_the_rest_beside_each(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path, name)
    own = {"class": {"index": 3, "name": "cat"}, "mask": {"file": "m.png", "sha256": "0"}, "replace": ["a=b", "c=d"]}
    page = write(tmp_path, [record("a.png", steps=9), record("b.png", seed=8, guidance=3.0, negative="fog", **own)])
    assert common(page) == {"Size": "64 × 64", "Scheduler": "dpm", "Model": "builtin"}
    assert [" ".join(e.text.split()) for e in cards(page)] == [
        "a dog Seed 7 Steps 9 Guidance 7.5",
        "a dog Negative fog Seed 8 Steps 25 Guidance 3 Class cat Mask m.png Replace a=b, c=d",
    ]


def test_a_setting_of_several_values_can_be_chosen_by_but_not_one_of_too_many(tmp_path: Path) -> None:
    steps, sizes = [100, 9, 25], range(8, 8 * (module.MAX_CHOICES + 2), 8)
    page = write(
        tmp_path, [record(f"{w}.png", width=w, seed=w, steps=steps[w % 3], mix="x" * 81 * (w % 2)) for w in sizes]
    )
    assert [e.attributes["data-setting"] for e in page.all("select")] == ["Steps"]
    assert page.texts("option") == ["any", "9", "25", "100"]


def test_a_single_picture_says_all_beside_itself(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    page = write(tmp_path, [record("a.png")])
    assert page.texts("p", "run") == ["1 picture"] and common(page) == {}
    assert "Seed 7 Size 64 × 64 Scheduler dpm Steps 25" in " ".join(cards(page)[0].text.split())


def test_a_page_without_pictures_is_a_page(tmp_path: Path) -> None:
    assert write(tmp_path, []).texts("p", "run") == ["0 pictures"]


@pytest.mark.parametrize(
    "name", [EVIL.replace("/", "_") + ".png", "javascript:alert(1).png", "100% #1?.png", "小狗.png"]
)
def test_untrusted_text_stays_text_and_a_link_leads_to_its_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "<b>folder"
    folder.mkdir()
    draw(folder, name)
    page = write(folder, [record(name, prompt=EVIL, negative=EVIL, **{EVIL: EVIL}), record(name, steps=EVIL)])
    assert len(page.all("script")) == 1 and page.all("b") == []
    assert len(page.all("img")) == 3  # with that of the viewer
    assert page.texts("p", "title")[0] == page.all("img")[0].attributes["alt"] == EVIL
    assert page.texts("h1") == ["<b>folder"]
    link = page.all("a")[0].attributes["href"]
    assert link.startswith("./") and not set(link) & set("<>\"'#?: ") and unquote(link[2:]) == name
    assert page.texts("option")[-1] in (EVIL, "25")


def test_text_that_is_no_unicode_does_not_keep_the_page_from_being_written(tmp_path: Path) -> None:
    name = b"\xff.png".decode(errors="surrogateescape")
    draw(tmp_path, name)
    page = write(tmp_path, [record(name, prompt="\ud800")])
    assert page.texts("p", "title") == ["?"] and page.all("a")[0].attributes["href"] == "./%FF.png"


def test_what_is_no_picture_or_lies_elsewhere_is_not_shown(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    draw(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "text.txt").write_text("x", encoding="utf-8")
    page = write(folder, [record(name) for name in ("link.png", "broken.png", "text.txt", "gone.png")])
    assert page.texts("span", "unreadable") == ["cannot be read"] * 4
    assert "data:image" not in (folder / "gallery.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_but_pictures_beside_it_and_its_policy_says_so(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    page = write(tmp_path, [record("a.png"), record("a.png", seed=8)])
    (policy,) = (
        e.attributes["content"] for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(page.all(tag)[0].text.encode()).digest()).decode() + "'"
        for tag in ("style", "script")
    }
    assert rules == {
        "default-src": "'none'",
        "img-src": "data: 'self' file:",
        "style-src": hashes["style"],
        "script-src": hashes["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [e for e in page.elements if "style" in e.attributes] == []  # the policy would drop them
    assert not re.search(r"(src|href)=\"(?!data:|\./)", (tmp_path / "gallery.html").read_text(encoding="utf-8"))


def test_the_same_pictures_give_the_same_bytes_and_the_page_takes_the_place_of_the_last(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    write(tmp_path, [record("a.png")])
    first = (tmp_path / "gallery.html").read_bytes()
    write(tmp_path, [record("a.png")])
    assert (tmp_path / "gallery.html").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "gallery.html"}


def noise(folder: Path, count: int, side: int) -> list[dict[str, Any]]:
    """Pictures that no format makes small, with words without end."""
    chance = np.random.default_rng(0)
    data = Image.fromarray(chance.integers(0, 256, (side, side, 3), dtype=np.uint8))
    data.save(folder / "0.png", compress_level=0)
    for number in range(1, count):
        (folder / f"{number}.png").hardlink_to(folder / "0.png")
    return [record(f"{n}.png", prompt=f"{n} " + "'" * 9_000, negative="小" * 9_000, seed=n) for n in range(count)]


def test_the_more_pictures_the_less_of_each_so_that_the_page_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_THUMBNAIL_BYTES", 60_000)
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 20_000)
    page = write(tmp_path, noise(tmp_path, 20, 300), left_out=5)
    size = (tmp_path / "gallery.html").stat().st_size
    frame = len("".join(e.text for e in (*page.all("style"), *page.all("script"))))
    assert 40_000 < size - frame < 60_000 + 20_000 + 20 * 600 + 10_000
    assert page.texts("span", "unreadable") == [] and page.texts("p", "title")[3].endswith("…")
    assert page.texts("p", "run") == ["20 pictures of 25: as many as a page has room for"]


def test_a_record_of_many_long_settings_takes_no_more_than_its_room(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    write(tmp_path, [record("a.png")])
    usual = (tmp_path / "gallery.html").stat().st_size
    page = write(tmp_path, [record("a.png", **{f"{n:03d}" * 40: "<" * 9_000 for n in range(100)})])
    assert (tmp_path / "gallery.html").stat().st_size < usual + module.MOST_TEXT_BYTES
    assert " ".join(page.texts("dd")[-1:])[-1] == "…"


@pytest.mark.slow
def test_two_thousand_pictures_of_noise_take_few_bytes_little_memory_and_two_minutes_of_one_core(
    tmp_path: Path,
) -> None:
    records = noise(tmp_path, 2_000, 512)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    write(tmp_path, records)
    assert time.process_time() - began < 120
    assert (tmp_path / "gallery.html").stat().st_size < 50_000_000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 400_000_000


# in a browser


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A page of six pictures of 600 x 600 in three colours, with two numbers of steps."""
    folder = tmp_path / "out"
    folder.mkdir()
    records = []
    for number, colour in enumerate(("red", "lime", "blue") * 2):
        draw(folder, f"{number} {colour}.png", colour, (600, 600))
        records.append(record(f"{number} {colour}.png", prompt=f"{colour} <b>thing", steps=9 + 16 * (number > 2)))
    write(folder, records)
    return folder / "gallery.html"


def with_script(page: Path, script: str) -> Path:
    """A copy of a page in which a script of the test's own runs, too; images are held to the policy as before."""
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page.read_text(encoding="utf-8"))
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


ACT = """
    const press = (key) =>
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    const links = [...document.querySelectorAll(".card a")];
    const seen = () => links.filter((link) => link.offsetParent).map((link) => link.getAttribute("href")[2]).join("");
    const at = () => links.indexOf(document.activeElement);
    const find = (id) => document.getElementById(id);
    const text = (id) => find(id).textContent.replace(/\\s+/g, " ").trim();
    const large = find("large"), viewer = find("viewer"), words = find("words");
    const select = document.querySelector("select");
    const wait = async () => {
        await new Promise((done) => large.addEventListener("load", done, { once: true }));
        return `${large.alt[0]}${large.naturalWidth}`;
    };
    const said = [];
    // A document that is open keeps the page from being loaded, and Chromium from telling what it shows.
    const hold = document.body.appendChild(document.createElement("iframe")).contentDocument;
    hold.open();
    const tell = () => { document.title = JSON.stringify(said); hold.close(); };
"""


def acted(page: Path, work: Path, script: str) -> list[Any]:
    """What a script in the page has said, and last of all what it failed of."""
    whole = f"{ACT} (async () => {{ {script} }})().catch((problem) => said.push(String(problem))).finally(tell);"
    view = browser.show(with_script(page, whole), work)
    assert view.requests == []
    found: list[Any] = json.loads(html.unescape(view.dom.partition("<title>")[2].partition("</title>")[0]))
    return found


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(("is_dark", "paper"), [(False, "#fdfdfc"), (True, "#131416")], ids=["light", "dark"])
def test_chromium_shows_every_picture_without_a_complaint_or_a_request(
    shown: Path, tmp_path: Path, is_dark: bool, paper: str
) -> None:
    view = browser.show(shown, tmp_path, is_dark=is_dark)
    assert (view.console, view.requests) == ([], [])
    colours = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in view.screenshot.getcolors(1 << 24) or []}
    assert paper in sorted(colours, key=lambda colour: -colours[colour])[:7]
    reds = sum(count for count, (r, g, b) in view.screenshot.getcolors(1 << 24) or [] if r > 240 and g < 9 and b < 9)
    assert reds > 2 * 150 * 150


@needs_chromium
@pytest.mark.slow
def test_words_and_settings_filter_together_and_escape_shows_all_again(shown: Path, tmp_path: Path) -> None:
    assert acted(
        shown,
        tmp_path,
        """
        const type = (text) => { words.value = text; words.dispatchEvent(new Event("input")); said.push(seen()); };
        said.push(seen());
        type("BLUE  thing"); type("0 red.png"); type("<b>"); type("none such");
        said.push(find("none").hidden, text("count"));
        type("red");
        select.value = "25"; select.dispatchEvent(new Event("change")); said.push(seen());
        words.focus(); press("Escape"); said.push(seen(), words.value);
        """,
    ) == ["012345", "25", "0", "012345", "", False, "0 of 6", "03", "3", "345", ""]


@needs_chromium
@pytest.mark.slow
def test_a_click_enlarges_the_file_itself_and_the_arrows_and_escape_lead_on_and_back(
    shown: Path, tmp_path: Path
) -> None:
    assert acted(
        shown,
        tmp_path,
        """
        links[1].click(); said.push(viewer.open, await wait(), text("viewer-title"));
        press("ArrowRight"); said.push(await wait(), text("place"));
        press("Home"); press("ArrowLeft"); said.push(await wait(), text("facts"));
        press("End"); said.push(await wait(), text("file"));
        const closed = new Promise((done) => viewer.addEventListener("close", done, { once: true }));
        viewer.close(); await closed; said.push(viewer.open, at());
        press("ArrowLeft"); said.push(at());
        const box = links[at()].getBoundingClientRect();
        press("ArrowUp");
        const above = links[at()].getBoundingClientRect();
        said.push(above.left === box.left && above.bottom < box.top);
        press("ArrowDown"); said.push(at());
        press("/"); said.push(document.activeElement === words);
        """,
    ) == [
        *(True, "l600", "lime <b>thing"),
        *("b600", "3 of 6"),
        *("r600", "Steps 9Seed 7Size 64 × 64Scheduler dpmGuidance 7.5Model builtin"),
        *("b600", "5 blue.png"),
        *(False, 5, 4, True, 4, True),
    ]


@needs_chromium
@pytest.mark.slow
def test_a_page_sent_without_its_pictures_enlarges_the_thumbnails_and_says_so(shown: Path, tmp_path: Path) -> None:
    for path in shown.parent.glob("*.png"):
        path.unlink()
    assert acted(
        shown,
        tmp_path,
        """
        links[0].click();
        said.push(await wait(), find("small-only").hidden);
        """,
    ) == ["r320", False]
