"""A page as headless Chromium shows it: its DOM, its picture, what it said to the console and asked of the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOT_A_PAGE = "not an origin"  # the initiator of what Chromium asks for itself: updates, dictionaries


@dataclass(frozen=True)
class View:
    """What came of showing a page."""

    dom: str
    screenshot: Image.Image
    console: list[str]
    requests: list[str]  # URLs that the page asked the network for


def show(page: Path, work: Path, *, width: int = 1000, height: int = 1200, is_dark: bool = False) -> View:
    """Open a page by its path, with a fresh profile under `work` and no server to be reached."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(
            "--hide-scrollbars",
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={int(not is_dark)}",
        ),
        *(f"--user-data-dir={work / 'profile'}", "--enable-logging=stderr", f"--log-net-log={work / 'net.json'}"),
        *(f"--screenshot={work / 'page.png'}", "--dump-dom", page.as_uri()),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    events = json.loads((work / "net.json").read_text(encoding="utf-8"))["events"]
    asked = [event["params"] for event in events if {"url", "initiator"} <= event.get("params", {}).keys()]
    return View(
        dom=ended.stdout,
        screenshot=Image.open(work / "page.png").convert("RGB"),
        console=re.findall(r":CONSOLE:\d+\] (.*)", ended.stderr),
        requests=[params["url"] for params in asked if params["initiator"] != NOT_A_PAGE],
    )
