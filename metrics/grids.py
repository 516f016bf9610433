"""Named grids of a study: which runs they stand for, and where each run is in its grid.

A grid has axes: of one setting, a list of values; or of several that go together, a mapping from a label to settings.

    grid:
      adamw:                                  name of the grid, and how its runs' names begin
        sets: {optimizer: adamw}              settings of all its runs; may be left out
        over:
          lr: [0.0003, 0.001]
          batch: {b16: {batch_size: 16, steps: 400}, b32: {batch_size: 32, steps: 200}}

stands for adamw_lr_0p0003_b16, adamw_lr_0p0003_b32, adamw_lr_0p001_b16 and adamw_lr_0p001_b32. Must import no
library: DVC's composition loads this file by its path, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

KEYS = ("sets", "over")  # of a grid


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    grid: str
    run: str
    labels: tuple[str, ...]  # on each axis, as the grid has them
    settings: dict[str, Any]


def label(value: Any) -> str:
    """A value as a part of a run's name, which has letters, digits and _ only: 0.001 is 0p001, 1e-05 is 1em05."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, int | float) else str(value)
    return "".join({".": "p", "-": "m", "+": ""}.get(c, c if c.isalnum() else "_") for c in text)


def places(axis: str, values: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, part of a run's name, settings) of each place on an axis."""
    if isinstance(values, Mapping):
        return [(str(name), label(name), dict(settings)) for name, settings in values.items()]
    return [
        (f"{v:g}" if type(v) in (int, float) else str(v), f"{axis}_{label(v)}", {axis: v}) for v in values
    ]


def points(grid: Mapping[str, Any]) -> Iterator[Point]:
    """Every run of all grids, the last axis fastest."""
    for name, one in grid.items():
        axes = [places(axis, values) for axis, values in one["over"].items()]
        for corner in product(*axes):
            settings = dict(one.get("sets") or {})
            for _, _, more in corner:
                settings |= more
            run = "_".join([name, *(part for _, part, _ in corner)])
            yield Point(name, run, tuple(shown for shown, _, _ in corner), settings)


def runs(grid: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `runs` of the study are: each with what it sets."""
    return {point.run: point.settings for point in points(grid)}
