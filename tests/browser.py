"""Pages in headless Chromium: what `browser.js` finds in them, and the picture of them."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TALL = 9_000
"""Height of the window in pixels: whole pages are in the picture, side by side."""


@dataclass(frozen=True)
class Seen:
    """What became of some pages in a window.

    Attributes:
        pages: what `browser.js` found, by page and the width of its frame.
        picture: the window.
    """

    pages: dict[tuple[str, int], dict[str, Any]]
    picture: Image.Image

    def is_empty(self, page: tuple[str, int], box: dict[str, float]) -> bool:
        """Whether a box of a page, whose edges are in pixels of that page, has only one colour or no area."""
        x, y = self.pages[page]["left"], self.pages[page]["top"]
        edges = (max(0, box["left"]) + x, box["top"] + y, min(page[1], box["right"]) + x, box["bottom"] + y)
        left, upper, right, lower = map(round, edges)
        if right <= left or lower <= upper:
            return True
        return all(low == high for low, high in self.picture.crop((left, upper, right, lower)).getextrema())


def find_browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


def look(
    browser: str, pages: dict[str, str], folder: Path, *, widths: tuple[int, ...], dark: bool, select: int
) -> Seen:
    """Open pages in frames, as they are, and point and click in them.

    A frame can be as narrow as a phone, a window cannot.

    Args:
        browser: path of the program.
        pages: the texts of the pages, by name.
        folder: where the files go.
        widths: of the frames of each page, in pixels.
        dark: whether the reader prefers dark pages.
        select: number of the candidate that is selected for a while.
    """
    frames = "".join(
        f'<iframe name="{name} {width}" width="{width}" data-select="{select}" srcdoc="{html.escape(page)}"></iframe>'
        for width in widths
        for name, page in pages.items()
    )
    script = (Path(__file__).parent / "browser.js").read_text(encoding="utf-8")
    style = (
        "body { margin: 0; display: flex; align-items: start } iframe { flex: none; border: 0 } "
        "#findings { display: none }"
    )
    (folder / "pages.html").write_text(
        f'<!doctype html><html><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<style>{style}</style></head><body>{frames}<pre id="findings"></pre><script>{script}</script></body></html>',
        encoding="utf-8",
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={len(pages) * sum(widths)},{TALL}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000"]
    command += ["--dump-dom", f"--screenshot={folder / 'pages.png'}", (folder / "pages.html").as_uri()]
    ran = subprocess.run(
        command, cwd=folder, capture_output=True, timeout=120, check=False, env=os.environ | {"HOME": str(folder)}
    )
    found = re.search(r'<pre id="findings">(.+?)</pre>', ran.stdout.decode("utf-8"), re.DOTALL)
    assert found is not None, ran.stderr.decode("utf-8", "replace")[-2000:]
    findings = json.loads(html.unescape(found[1]))
    assert findings["tall"] <= TALL, findings["tall"]
    with Image.open(folder / "pages.png") as picture:
        measured = {(name, width): findings["pages"][f"{name} {width}"] for name in pages for width in widths}
        return Seen(measured, picture.convert("RGB"))
