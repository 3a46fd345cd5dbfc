"""The training report: one file that says what the run folder holds, and refers to nothing outside itself."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdcli.errors import InputError
from sdcli.pages import report as module
from sdcli.pages.report import read_metrics, write_report
from tests import browser

VOID = {"meta", "link", "img", "br", "input"}
REFERRING = {"src", "href", "srcset", "poster", "data", "action", "formaction", "background", "cite", "xlink:href"}
CONFIG = {"kind": "vae", "steps": 4000, "lr": 0.001, "batch_size": 32, "seed": 0, "caption": None, "random_crop": True}


@dataclass
class Element:
    """A part of a page with all the text in it."""

    tag: str
    attributes: dict[str, str]
    within: frozenset[str] = frozenset()  # the classes of all that it lies in
    text: str = ""


class Page(HTMLParser):
    """A page as its elements, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        within = frozenset(name for e in self._open for name in e.attributes.get("class", "").split())
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}, within))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"unbalanced </{tag}>"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, kind: str = "") -> list[Element]:
        """The elements of a tag and, where one is named, of a class."""
        return [
            e for e in self.elements if e.tag == tag and (not kind or kind in e.attributes.get("class", "").split())
        ]

    def texts(self, tag: str, kind: str = "") -> list[str]:
        """Their texts, blanks joined."""
        return [" ".join(element.text.split()) for element in self.all(tag, kind)]

    @property
    def charts(self) -> dict[str, list[str]]:
        """Each chart's title with the names in its legend."""
        found: dict[str, list[str]] = {}
        for element in self.elements:
            if element.tag == "figcaption" and element.attributes.get("id", "").startswith("chart-"):
                names = found.setdefault(" ".join(element.text.split()), [])
            elif element.tag == "th" and element.attributes.get("scope") == "row":
                names.append(element.text.strip())
        return found

    def facts(self, kind: str) -> dict[str, str]:
        """The terms of a list of a class with what is said of each."""
        words = [" ".join(e.text.split()) for e in self.elements if e.tag in ("dt", "dd") and kind in e.within]
        return dict(zip(words[::2], words[1::2], strict=True))

    @property
    def figures(self) -> dict[str, str]:
        """The key figures by their labels."""
        return self.facts("figures")


def make_run(
    folder: Path, rows: list[dict[str, Any]] | None = None, config: dict[str, Any] | None = None, tail: str = ""
) -> Path:
    """A run folder of these metrics and settings, and a tail of metrics.jsonl that is no line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config), encoding="utf-8")
    if rows is not None:
        text = "".join(json.dumps(row) + "\n" for row in rows) + tail
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def add_sample(folder: Path, step: int, name: str, colour: str = "magenta", size: tuple[int, int] = (64, 64)) -> Path:
    place = folder / "samples" / f"step-{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(place / name)
    return place / name


def terms(step: int, **others: float | None) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "grad_norm": 2.0, "lr": 1e-3, **others}


def report(folder: Path) -> Page:
    return Page(write_report(folder))


def picture(element: Element) -> Image.Image:
    """The picture inside a data: URI."""
    return Image.open(io.BytesIO(base64.b64decode(element.attributes["src"].partition(",")[2])))


# what it says


def test_the_terms_are_grouped_into_charts(tmp_path: Path) -> None:
    row = terms(1, l1=0.2, kl=3.0, adversarial=-0.4, d_weight=1.0, discriminator_loss=1.0, discriminator_grad_norm=0.5)
    row |= {"images_per_second": 30.0, **{f"loss_t{band}": 0.1 for band in range(4)}}
    validation = {"step": 1, "validation": {"loss": 0.9, "l1": 0.3, "psnr": 20.0}}
    assert report(make_run(tmp_path, [row, validation])).charts == {
        "Loss": ["loss", "validation loss"],
        "Loss terms log scale": ["l1", "kl", "validation l1"],
        "Terms of either sign": ["adversarial"],
        "Validation PSNR": ["validation psnr"],
        "Discriminator": ["discriminator_loss"],
        "Adaptive weight": ["d_weight"],
        "Loss by timestep band t0 is the band of the least noise": ["loss_t0", "loss_t1", "loss_t2", "loss_t3"],
        "Gradient norm": ["grad_norm", "discriminator_grad_norm"],
        "Learning rate": ["lr"],
        "Images per second": ["images_per_second"],
    }


def test_the_key_figures_are_those_of_the_run(tmp_path: Path) -> None:
    rows = [terms(step, images_per_second=31.0) for step in range(1, 101)]
    rows += [{"step": step, "validation": {"loss": loss}} for step, loss in ((50, 0.4), (75, 0.25), (100, 0.3))]
    make_run(tmp_path / "my-run", rows)
    (tmp_path / "my-run" / "summary.json").write_text(
        '{"scaling_factor": 0.9312, "dtype": "float16"}', encoding="utf-8"
    )
    (tmp_path / "my-run" / "export").mkdir()
    page = report(tmp_path / "my-run")
    expected = {
        "Steps": "100 of 4,000",
        "Best validation loss": "0.25 at step 75",
        "Images per second": "31 smoothed",
        "Scaling factor": "0.9312",
        "Export": "export/ dtype float16",
    }
    assert page.figures.items() >= expected.items()
    assert page.figures["Last loss"].startswith("0.01 smoothed 0.010")
    assert "Steps not finite" not in page.figures
    assert page.texts("h1") == ["VAE training"]
    assert page.texts("title") == ["VAE training · my-run"]


@pytest.mark.parametrize(
    ("steps", "is_exported", "says"), [(4, True, "finished"), (4, False, "step 4 of 4"), (9, True, "step 4 of 9")]
)
def test_a_run_is_finished_when_its_last_step_is_exported(
    tmp_path: Path, steps: int, is_exported: bool, says: str
) -> None:
    make_run(tmp_path, [terms(step) for step in range(1, 5)], {**CONFIG, "steps": steps})
    if is_exported:
        (tmp_path / "export").mkdir()
    assert report(tmp_path).texts("p", "progress") == [says]


def test_settings_that_differ_from_the_defaults_come_first(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, config={**CONFIG, "origin": "small", "kl_weight": 1e-6, "l1_weight": 2.5}))
    chosen = {"kind": "vae", "steps": "4000", "lr": "0.001", "batch size": "32", "random crop": "yes"}
    chosen |= {"origin": "small", "L1 weight": "2.5"}
    defaults = {"seed": "0", "caption": "–", "KL weight": "1e-06"}
    assert list(page.facts("facts").items()) == [*chosen.items(), *defaults.items()]
    assert page.facts("defaults") == defaults


def test_a_run_of_an_unknown_kind_has_a_report(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [terms(1)], {"kind": "hypernetwork", "strength": [1, 2], "lr": 1e-5}))
    assert page.texts("h1") == ["hypernetwork training"]
    assert page.facts("facts") == {"kind": "hypernetwork", "strength": "[1, 2]", "lr": "1e-05"}
    assert page.facts("defaults") == {"lr": "1e-05"}


@pytest.mark.parametrize("odd", [{"kind": ["vae"]}, {"kind": None, "steps": "many"}, {}], ids=str)
def test_odd_settings_do_not_keep_the_page_from_being_written(tmp_path: Path, odd: dict[str, Any]) -> None:
    assert report(make_run(tmp_path, [terms(1)], odd)).figures["Steps"] == "1"


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    page = report(make_run(tmp_path))
    assert page.charts == {}
    assert "No step has been logged yet." in page.texts("p", "note")


def test_the_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("checkpoint-00001250", "checkpoint-00000250", "checkpoint-00001500.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert report(tmp_path).texts("li") == ["250", "1,250"]


def test_a_validation_has_the_colour_of_its_term_among_several(tmp_path: Path) -> None:
    rows = [terms(1, l1=1.0, l2=1.0), {"step": 1, "validation": {"l2": 1.0, "loss": 1.0}}]
    names = [e for e in report(make_run(tmp_path, rows)).all("th") if e.attributes["scope"] == "row"]
    colours = {e.text: e.attributes["class"].split()[-1] for e in names}
    assert colours["l1"] != colours["l2"] == colours["validation l2"]
    assert colours["loss"] != colours["validation loss"]  # alone with it, the other would be hard to see


# what it reads


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [terms(1), terms(2)], tail='{"step": 3, "lo'))
    assert page.figures["Steps"] == "2 of 4,000"
    assert "1 line of metrics.jsonl could not be read." in page.texts("p", "note")


def test_steps_whose_loss_is_not_finite_are_shown_and_bands_without_a_sample_are_not(tmp_path: Path) -> None:
    rows = [terms(step, loss_t0=None if step % 2 else 0.1) for step in range(1, 9)]
    rows[4]["loss"] = rows[4]["grad_norm"] = None
    rows[6]["grad_norm"] = None
    page = report(make_run(tmp_path, rows))
    assert page.figures["Steps not finite"] == "2 at 5, 7"
    marks = [title for title in page.texts("title") if title.startswith("not finite")]
    assert marks == ["not finite at step 5", "not finite at step 7"] * 2  # in the charts of loss and gradient norm
    assert read_metrics(tmp_path / "metrics.jsonl").bad_steps == [5, 7]


def test_a_hundred_thousand_steps_make_a_small_page_in_little_time(tmp_path: Path) -> None:
    others = '"l1": 0.1, "l2": 0.2, "lpips": 0.3, "kl": 9.5, "grad_norm": 1.5, "lr": 0.001, "images_per_second": 30'
    with (make_run(tmp_path) / "metrics.jsonl").open("w", encoding="utf-8") as stream:
        for step in range(1, 100_001):
            stream.write(f'{{"step": {step}, "loss": {0.5 + step % 17}, {others}}}\n')
    began = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - began < 5
    assert path.stat().st_size < 3_000_000
    assert Page(path).figures["Steps"] == "100,000 of 4,000"


def test_terms_beyond_reason_are_counted_and_not_drawn(tmp_path: Path) -> None:
    page = report(make_run(tmp_path, [{"step": 1, **{f"term{i}": 1.0 for i in range(70)}}]))
    assert "6 further terms are not drawn." in page.texts("p", "note")


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# samples


def test_samples_are_rows_by_step_the_newest_first(tmp_path: Path) -> None:
    make_run(tmp_path)
    for step, colour in ((250, "red"), (1000, "blue"), (500, "lime")):
        add_sample(tmp_path, step, "00-cat.png", colour)
    page = report(tmp_path)
    assert page.texts("h3")[:3] == ["step 1,000", "step 500", "step 250"]
    assert [picture(e).convert("RGB").getpixel((9, 9)) for e in page.all("img")] == [
        (0, 0, 255),
        (0, 255, 0),
        (255, 0, 0),
    ]


@pytest.mark.parametrize(
    ("size", "expected"), [((1024, 512), (256, 128)), ((300, 900), (85, 256)), ((48, 40), (48, 40))]
)
def test_samples_are_scaled_down_to_256_px_and_never_up(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    add_sample(make_run(tmp_path), 1, "a.png", size=size)
    assert picture(report(tmp_path).all("img")[0]).size == expected


def test_the_same_pictures_step_by_step_are_named_once(tmp_path: Path) -> None:
    make_run(tmp_path)
    for step, names in ((1, "abc"), (2, "ab"), (3, "ab")):
        for name in names:
            add_sample(tmp_path, step, f"{name}.webp")
    page = report(tmp_path)
    assert [e.attributes["alt"] for e in page.all("img")] == [*"ab", *"ab", *"abc"]
    assert page.texts("figcaption") == [*"ab", *"abc"]


def test_samples_that_cannot_be_read_or_lead_outside_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    broken = add_sample(run, 1, "a-broken.png")
    broken.write_bytes(broken.read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (broken.parent / "b-outside.png").symlink_to(tmp_path / "secret.png")
    add_sample(run, 1, "c-whole.png")
    (broken.parent / "notes.txt").touch()
    page = report(run)
    assert page.texts("div", "unreadable") == ["cannot be read"] * 2
    assert page.texts("figcaption") == ["a-broken", "b-outside", "c-whole"]
    assert len(page.all("img")) == 1


def test_many_samples_are_thinned_to_rows_over_the_whole_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    for step in range(1, 101):
        add_sample(tmp_path, step, "a.png", size=(8, 8))
    page = report(tmp_path)
    steps = [int(text.removeprefix("step ")) for text in page.texts("h3") if text.startswith("step ")]
    assert len(steps) == module.MAX_SAMPLE_ROWS
    assert (steps[0], steps[-1]) == (100, 1)
    assert max(a - b for a, b in itertools.pairwise(steps)) <= 8
    assert "24 of 100 sampled steps, spread over the run." in page.texts("p", "note")


@pytest.mark.parametrize(
    ("room", "shown", "said"),
    [(3, "abc", ["1 of 2 sampled steps, spread over the run.", "and 1 more"]), (7, "abcd", ["1 of 2 sampled steps, "])],
)
def test_when_the_page_is_full_of_pictures_the_others_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, shown: str, said: list[str]
) -> None:
    make_run(tmp_path)
    for name in "abcd":
        add_sample(tmp_path, 1, f"{name}.png", "red")
        add_sample(tmp_path, 2, f"{name}.png")
    one = len(report(tmp_path).all("img")[0].attributes["src"])
    monkeypatch.setattr(module, "MAX_SAMPLE_BYTES", room * one)
    page = report(tmp_path)
    assert [e.attributes["alt"] for e in page.all("img")] == [*shown]
    assert {picture(e).convert("RGB").getpixel((0, 0)) for e in page.all("img")} == {(255, 0, 255)}  # the newest
    notes = page.texts("p", "note")[1:]  # the first says that there are no curves
    assert len(notes) == len(said) and all(map(str.startswith, notes, said))


# what it is made of


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    add_sample(make_run(tmp_path, [terms(1)]), 1, "a.png")
    page = report(tmp_path)
    referred = [value for e in page.elements for name, value in e.attributes.items() if name in REFERRING]
    assert len(referred) == 2 and all(value.startswith("data:") for value in referred)  # the sample and the icon
    style = page.all("style")[0].text
    assert "url(" not in style and "@import" not in style
    assert "http:" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_policy_allows_our_style_and_script_by_their_hashes_and_pictures_inside(tmp_path: Path) -> None:
    page = report(make_run(tmp_path))
    policies = [
        e.attributes["content"] for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    hashes = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(page.all(tag)[0].text.encode()).digest()).decode() + "'"
        for tag in ("style", "script")
    }
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": hashes["style"],
        "script-src": hashes["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [e for e in page.elements if "style" in e.attributes] == []  # the policy would drop them


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = make_run(
        tmp_path / "<b>run",
        [{"step": 1, evil: 1.0, "loss": 1.0}],
        {**CONFIG, "caption": evil, evil: "&amp;", "kind": evil},
    )
    add_sample(run, 1, "'\"><img src=x onerror=alert(1)>.png")
    page = report(run)
    assert len(page.all("script")) == 1 and len(page.all("img")) == 1 and page.all("b") == []
    assert page.charts.popitem()[1] == [evil]
    assert page.texts("p", "run") == ["<b>run"]
    assert page.texts("figcaption")[-1] == "'\"><img src=x onerror=alert(1)>"
    assert page.facts("facts").items() >= {"caption": evil, evil: "&amp;"}.items()


def test_text_that_is_no_unicode_does_not_keep_the_page_from_being_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, config={**CONFIG, "caption": "\ud800"})
    assert report(run).facts("facts")["caption"] == "?"


def test_the_same_run_gives_the_same_bytes_and_nothing_but_the_report(tmp_path: Path) -> None:
    add_sample(make_run(tmp_path, [terms(step) for step in range(1, 50)]), 1, "a.png")
    before = {path.name for path in tmp_path.iterdir()}
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == before | {"report.html"}


# in a browser


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """The report of a run of 3,000 steps with samples in magenta."""
    rows = [terms(step, l1=0.5 / step, kl=3.0) for step in range(1, 3001)]
    rows += [{"step": step, "validation": {"loss": 1.5 / step}} for step in range(250, 3001, 250)]
    run = make_run(tmp_path / "run", rows)
    for step in (1500, 3000):
        add_sample(run, step, "00-square.png")
        add_sample(run, step, "01-square.png")
    return write_report(run)


def without_policy(page: Path, script: str) -> Path:
    """A copy of a page in which a script of the test's own runs, too."""
    text = page.read_text(encoding="utf-8")
    start = text.index('<meta http-equiv="Content-Security-Policy"')
    text = text[:start] + text[text.index(">", start) + 1 :]
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium is installed")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_dark", "paper", "line"), [(False, "#fdfdfc", "#1f5fbf"), (True, "#131416", "#6ea8ff")], ids=["light", "dark"]
)
def test_chromium_shows_curves_and_samples_without_a_complaint_or_a_request(
    shown: Path, tmp_path: Path, is_dark: bool, paper: str, line: str
) -> None:
    view = browser.show(shown, tmp_path, height=2400, is_dark=is_dark)
    assert (view.console, view.requests) == ([], [])
    assert view.dom.count('<path class="line') == 5 and view.dom.count('<path class="dots') == 1
    assert view.dom.count("<img ") == 4
    colours = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in view.screenshot.getcolors(1 << 24) or []}
    assert max(colours, key=lambda colour: colours[colour]) == paper
    assert colours[line] > 1000
    assert colours["#ff00ff"] > 4 * 64 * 64


@needs_chromium
@pytest.mark.slow
def test_the_check_in_chromium_sees_what_goes_wrong(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/a.png"><script>undefined_name()</script>', encoding="utf-8")
    view = browser.show(page, tmp_path)
    assert view.requests == ["http://127.0.0.1:9/a.png"]
    assert any("undefined_name is not defined" in text for text in view.console)


@needs_chromium
@pytest.mark.slow
def test_a_narrow_page_does_not_scroll_sideways(shown: Path, tmp_path: Path) -> None:
    frame = f'<iframe width="400" height="800" srcdoc="{html.escape(shown.read_text(encoding="utf-8"))}"></iframe>'
    measure = """
        const root = document.querySelector("iframe").contentDocument.documentElement;
        const plot = root.querySelector(".plot").getBoundingClientRect();
        document.title = `${root.scrollWidth <= root.clientWidth} ${Math.round(plot.width)}`;
    """
    holder = tmp_path / "holder.html"
    holder.write_text(f"{frame}<script>onload = () => {{{measure}}}</script>", encoding="utf-8")
    fits, width = browser.show(holder, tmp_path).dom.partition("<title>")[2].partition("</title>")[0].split()
    assert fits == "true" and 250 < int(width) < 400


@needs_chromium
@pytest.mark.slow
def test_under_the_pointer_every_legend_reads_the_values_of_that_step(shown: Path, tmp_path: Path) -> None:
    move = """
        const plot = document.querySelectorAll(".plot")[1], box = plot.getBoundingClientRect();
        const at = (share) => ({ clientX: box.left + share * box.width });
        const read = () => [...document.querySelectorAll(".when, .now")].map((cell) => cell.textContent).join(" ");
        plot.dispatchEvent(new PointerEvent("pointermove", at(0.2)));
        const under = read();
        plot.dispatchEvent(new PointerEvent("pointerleave", at(0.2)));
        document.title = `${under} | ${read()}`;
    """
    view = browser.show(without_policy(shown, move), tmp_path)
    under, after = view.dom.partition("<title>")[2].partition("</title>")[0].split(" | ")
    assert under.count("at 600") == 4 and after.count("last") == 4
    loss, validation = under.split()[2:4]
    assert float(loss) == pytest.approx(1 / 600, rel=0.1)
    assert float(validation) == pytest.approx(1.5 / 500, rel=1e-3)  # the last one before
    assert after.split()[2] == "0.0005"
