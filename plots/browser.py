"""Chromium without a window and without a network: what a page looks like and what it contains once drawn.

Only for looking at pages that exist already; nothing that the tables or the report say comes from here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SECONDS = 60
# No sandbox: it needs privileges that containers lack, and the pages are our own.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=10000",
)
# A window is never narrower than 500 pixels; a frame is as narrow as a phone. The answer replaces the page.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => setTimeout(() => {{
  const frame = document.getElementById("frame"), page = frame.contentDocument, view = frame.contentWindow;
  const answer = JSON.stringify({expression});
  document.body.textContent = "ANSWER" + encodeURIComponent(answer) + "END";
}}, {milliseconds}));
</script>"""


class BrowserError(Exception):
    """There is no browser, or it did not draw; the message says which."""


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _run(*arguments: str) -> str:
    browser = find()
    if browser is None:
        raise BrowserError(
            f"no Chromium found; install one of {', '.join(NAMES)} (Debian: apt-get install chromium)"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise BrowserError(f"{browser} did not end within {SECONDS} seconds") from None
    if done.returncode:
        raise BrowserError(f"{browser} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


@contextmanager
def _file(text: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(text, encoding="utf-8")
        yield path.as_uri()


def ask(page: str, expression: str, width: int = 1200, height: int = 800, milliseconds: int = 0) -> Any:
    """The value of a JavaScript expression in a drawn page.

    Args:
        page: the HTML.
        expression: may use `page` (the document) and `view` (its window); its value must be JSON.
        width: of the frame that the page is drawn in, CSS pixels.
        height: of that frame.
        milliseconds: to wait after the page has loaded.

    Raises:
        BrowserError: no Chromium, or no answer.
    """
    frame = FRAME.format(
        page=escape(page), expression=expression, width=width, height=height, milliseconds=milliseconds
    )
    with _file(frame) as address:
        shown = _run("--window-size=1300,900", "--dump-dom", address)
    answer = re.search(r"ANSWER([^<]*)END", shown)
    if answer is None or "encodeURIComponent" in answer[1]:
        raise BrowserError(f"the page gave no answer to {expression}")
    return json.loads(unquote(unescape(answer[1])))


def picture(page: str, path: Path, width: int = 1200, height: int = 800) -> None:
    """A PNG of the page's top, width × height pixels.

    Raises:
        BrowserError: no Chromium, or no picture.
    """
    path.unlink(missing_ok=True)  # an old one must not pass for this
    with _file(page) as address:
        _run(f"--window-size={width},{height}", f"--screenshot={path.resolve()}", address)
    if not path.is_file():
        raise BrowserError(f"{path} was not written")


def pdf(page: str, path: Path) -> None:
    """The page as it is printed.

    Raises:
        BrowserError: no Chromium, or no file.
    """
    path.unlink(missing_ok=True)
    with _file(page) as address:
        _run("--no-pdf-header-footer", f"--print-to-pdf={path.resolve()}", address)
    if not path.is_file():
        raise BrowserError(f"{path} was not written")
