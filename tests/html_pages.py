"""Helpers that parse HTML pages or open them in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

VOID_TAGS = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A parsed page: its tags with attributes, and its text. Tags that do not match are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> names an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self._open, f"<{tag}/> outside an SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data

    def find_all(self, tag: str, css_class: str = "") -> list[dict[str, str]]:
        """Return the attributes of all tags with a name and, if not empty, a CSS class."""
        return [
            {key: value or "" for key, value in attributes.items()}
            for name, attributes in self.tags
            if name == tag and (not css_class or css_class in (attributes.get("class") or "").split())
        ]

    def images(self) -> Sequence[Image.Image]:
        """Decode the embedded PNG images."""
        sources = [image["src"] for image in self.find_all("img")]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        images = [
            Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))) for source in sources
        ]
        for image in images:
            image.load()
        return images

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) points of each curve by name."""
        return {
            curve["data-name"]: list(
                zip(map(int, curve["data-steps"].split()), map(float, curve["data-values"].split()), strict=True)
            )
            for curve in self.find_all("g", "curve")
        }


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ERROR_SCRIPT = """<script>window.wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message || event.target)), true);
addEventListener("securitypolicyviolation", (event) => wrong.push(event.violatedDirective));</script>"""
PROBE_SCRIPT = """<script>addEventListener("load", () => {
  const sizes = (all) => Array.from(all, (x) => Math.min(x.getBoundingClientRect().width, x.getBoundingClientRect().height));
  const player = document.querySelector("figure.player"), slider = player.querySelector("input");
  const visible = () => Array.from(player.querySelectorAll("img"), (x) => !x.hidden);
  const result = { images: Array.from(document.images, (x) => x.naturalWidth), charts: sizes(document.querySelectorAll("svg")) };
  result.width = innerWidth, result.beyond = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  result.before = visible(), result.step = player.querySelector("output").textContent;
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  result.after = visible(), result.stepAfter = player.querySelector("output").textContent;
  const chart = document.querySelector(".chart svg"), box = chart.getBoundingClientRect();
  const over = (share) => chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + share * box.width }));
  over(0.97); result.tip = document.querySelector(".tip")?.textContent;
  result.tips = [0, 0.5, 1].map((share) => {
    over(share);
    const tip = document.querySelector(".tip")?.getBoundingClientRect();
    return tip && [tip.left - box.left, box.right - tip.right, tip.bottom - box.top, tip.width];
  });
  player.querySelector("button").click();
  setTimeout(() => {
    result.played = visible(), result.button = player.querySelector("button").textContent, result.wrong = wrong;
    parent.postMessage(JSON.stringify(result), "*");
  }, 6000);
});</script>"""


FRAME = """<body><iframe src="probe.html" style="border: 0; width: {width}px; height: 2300px"></iframe>
<script>addEventListener("message", (event) => document.body.replaceChildren(event.data));</script></body>"""


def open_in_browser(
    page: Path, change: Callable[[str], str] = lambda text: text, width: int = 1280
) -> tuple[dict[str, Any], list[str]]:
    """Open a page in a headless browser.

    Args:
        page: HTML file.
        change: Changes the text of the page before it is opened.
        width: Width of the window in pixels.

    Returns:
        The result of `PROBE_SCRIPT` and the lines of the browser console.
    """
    if BROWSER is None:
        pytest.skip("no browser found; run `apt-get install chromium`")
    text = change(page.read_text(encoding="utf-8"))
    text = text.replace("<title>", f"{ERROR_SCRIPT}<title>").replace("</body>", f"{PROBE_SCRIPT}</body>")
    page.with_name("probe.html").write_text(text, encoding="utf-8")
    frame = page.with_name("frame.html")  # a browser window cannot be as narrow as a phone
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--window-size=1400,2400",
    ]
    arguments += [
        f"--user-data-dir={page.with_name('profile')}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        frame.as_uri(),
    ]
    environment = os.environ | {"HOME": str(page.parent)}
    completed = subprocess.run([BROWSER, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    body = re.search(r"<body>(.*)</body>", completed.stdout, flags=re.DOTALL)
    assert body, completed.stderr
    return json.loads(body[1].strip()), [line for line in completed.stderr.splitlines() if "CONSOLE" in line]
