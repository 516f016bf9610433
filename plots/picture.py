"""A picture of a report: `python -m plots.picture reports/<study>/report.html PICTURE.png`.

From the title to the end of the comparison's charts, drawn by Chromium without a network, as the README shows it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from plots import browser

WIDTH = 1200
BOTTOM = "Math.ceil(page.getElementById('comparison').getBoundingClientRect().bottom) + 16"


def main(arguments: list[str]) -> int:
    """Write the picture; 0, or 2 with one message."""
    if len(arguments) != 2:  # noqa: PLR2004
        print("usage: python -m plots.picture reports/<study>/report.html PICTURE.png", file=sys.stderr)
        return 2
    report, picture = map(Path, arguments)
    try:
        page = report.read_text(encoding="utf-8")
        picture.parent.mkdir(parents=True, exist_ok=True)
        browser.picture(page, picture, WIDTH, browser.ask(page, BOTTOM, WIDTH))
    except FileNotFoundError:
        print(f"picture: {report} is missing: run `dvc repro` first", file=sys.stderr)
        return 2
    except browser.BrowserError as error:
        print(f"picture: {error}", file=sys.stderr)
        return 2
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
