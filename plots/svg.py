"""A chart as an SVG element inside a page. Must not change what is drawn."""

from __future__ import annotations

import io
import re
from html import escape
from itertools import pairwise

import altair as alt

LONG_DECIMAL = re.compile(r"(\.\d)\d+")
GRADIENT = re.compile(r"\bgradient_\d+\b")
PATH = re.compile(r'\bd="([^"]*)"')
NUMBER = r"-?\d+(?:\.\d)?(?![\d.e])"
LINES = re.compile(rf"L{NUMBER},{NUMBER}(?:L{NUMBER},{NUMBER})+")  # of a path, one after another
POINT = re.compile(rf"L({NUMBER}),({NUMBER})")


def svg(chart: alt.Chart | alt.LayerChart, prefix: str, description: str) -> str:
    """The chart as an `<svg>` that a screen reader names.

    Args:
        chart: what to draw.
        prefix: keeps its ids apart from those of other charts on a page.
        description: what it shows, in words.
    """
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    text = re.sub(r"^<\?xml[^>]*>\s*", "", buffer.getvalue())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", _numbered_anew(text))
    text = PATH.sub(_rounded, text)
    words = escape(description)
    start = text.index("<svg") + len("<svg")
    end = text.index(">", start) + 1
    named = f'<svg role="img" aria-label="{words}"{text[start:end]}<title>{words}</title>'
    return text[: start - len("<svg")] + named + text[end:]


def _numbered_anew(text: str) -> str:
    """Ids of colour gradients from 0: the renderer counts on from one chart of a process to the next."""
    ids = {found: f"gradient_{i}" for i, found in enumerate(dict.fromkeys(GRADIENT.findall(text)))}
    return GRADIENT.sub(lambda found: ids[found[0]], text)


def _rounded(path: re.Match[str]) -> str:
    """A path to a tenth of a pixel, and its lines from point to point: a fifth of its length."""
    text = LONG_DECIMAL.sub(r"\1", path[1])
    return f'd="{LINES.sub(_from_point_to_point, text)}"'


def _from_point_to_point(lines: re.Match[str]) -> str:
    """Absolute lines as relative ones, after the first. In whole tenths, so that no rounding adds up."""
    first, *_ = points = [(round(10 * float(x)), round(10 * float(y))) for x, y in POINT.findall(lines[0])]
    steps = [(x - left, y - top) for (left, top), (x, y) in pairwise(points)]
    return f"L{_tenths(first[0])},{_tenths(first[1])}l" + " ".join(
        f"{_tenths(x)},{_tenths(y)}" for x, y in steps
    )


def _tenths(count: int) -> str:
    """12 → 1.2, 5 → .5, 20 → 2."""
    whole, rest = divmod(abs(count), 10)
    return "-" * (count < 0) + (f"{whole or ''}.{rest}" if rest else str(whole))
