"""What the keys of a study as an experiment must be: hypothesis, falsified_by, budget, margin, grid, chosen_from.

Every function gives problems in words, none where all is well. Must not read or write files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from metrics import grids
from metrics.measures import AXES, CONDITION_KEYS, DECIDED, METRICS
from stages.study import bound_problems, key_problems, one_of

EXPERIMENT = {"hypothesis": "", "falsified_by": {}, "budget": 0, "margin": 0, "grid": {}, "chosen_from": {}}
LARGEST_GRID = 200  # runs: each is a stage a seed, and DVC looks at every one


def experiment_problems(study: dict) -> list[str]:
    """Problems with the keys of EXPERIMENT in a study whose runs are a mapping."""
    return [
        *_hypothesis_problems(study),
        *_margin_problems(study["margin"]),
        *_grid_problems(study["grid"], study["runs"]),
        *_chosen_problems(study["chosen_from"], study["seeds"]),
    ]


def budget_problems(study: dict, amount: int) -> Iterator[str]:
    """`amount`: what the baseline's settings come to on the axis; 0 where only the run can tell."""
    wanted, unit = study["budget"], AXES[study["axis"]].unit
    if type(wanted) is not int or wanted < 0:
        yield f"budget = {wanted!r}: must be a whole number of {unit}, what each run has of the axis; 0: not said"
    elif wanted and amount and wanted != amount:
        yield (
            f"budget = {wanted:,}: the baseline {study['baseline']} is given {amount:,} {unit}; change its steps, or "
            "the budget (0: not said)"
        )


def _margin_problems(margin: object) -> Iterator[str]:
    if type(margin) not in (int, float) or not 0 <= margin < math.inf:
        yield (
            f"margin = {margin!r}: must be a number ≥ 0, the difference in the metric below which no choice would "
            "change (nats a token of a loss, a share from 0 to 1 of an accuracy); 0: not said"
        )


def _hypothesis_problems(study: dict) -> Iterator[str]:
    said, against = study["hypothesis"], study["falsified_by"]
    if not isinstance(said, str):
        yield f"hypothesis = {said!r}: must be text"
    if bool(said) != bool(against):
        absent = "falsified_by" if said else "hypothesis"
        yield f"{absent}: is missing; a hypothesis and what would falsify it belong together"
    if not against or isinstance(against, str):
        return
    if not isinstance(against, dict):
        yield f"falsified_by = {against!r}: must be text, or a mapping with says and when"
        return
    yield from key_problems("falsified_by", against, ("says", "when"), ("says", "when"))
    if "says" in against and not (isinstance(against["says"], str) and against["says"]):
        yield f"falsified_by.says = {against['says']!r}: must be text"
    when = against.get("when", [{}])
    if not isinstance(when, list) or not when:
        yield f"falsified_by.when = {when!r}: must be a list of conditions, of which one is enough"
        return
    for place, one in enumerate(when if "when" in against else []):
        yield from _condition_problems(f"falsified_by.when[{place}]", one, study["runs"])


def _condition_problems(where: str, one: object, runs: Iterable[str]) -> Iterator[str]:
    """A condition: a run's verdict; or a measure of it, or its ratio to another run's, within bounds."""
    if not isinstance(one, dict):
        yield f"{where} = {one!r}: must be a mapping with run, and verdict or measure"
        return
    yield from key_problems(where, one, CONDITION_KEYS, ("run",))
    for key in ("run", "against"):
        if key in one:
            yield from one_of(f"{where}.{key}", one[key], runs, "one of the runs")
    if ("verdict" in one) == ("measure" in one):
        yield f"{where}: must have either verdict or measure"
        return
    if "verdict" in one:
        verdicts = one["verdict"] if isinstance(one["verdict"], list) else [one["verdict"]]
        for verdict in verdicts:
            yield from one_of(f"{where}.verdict", verdict, DECIDED)
        for key in one.keys() & {"against", "at_least", "at_most"}:
            yield f"{where}.{key}: goes with measure, not with verdict, which is against the baseline"
        return
    yield from one_of(f"{where}.measure", one["measure"], METRICS)
    yield from bound_problems(where, one, is_ratio="against" in one)


def _grid_problems(grid: object, runs: dict) -> Iterator[str]:
    """The form of the key `grid`, and that `runs` are what it stands for."""
    if not isinstance(grid, dict):
        yield f"grid = {grid!r}: must be a mapping of grids, each with over"
        return
    problems = [problem for name, one in grid.items() for problem in _one_grid(f"grid.{name}", one)]
    yield from problems
    if not grid or problems:
        return
    found = list(grids.points(grid))
    names = [point.run for point in found]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"grid: two of its runs would be called {name}; rename a label"
    if len(names) > LARGEST_GRID:
        yield f"grid: stands for {len(names)} runs; a study has at most {LARGEST_GRID}: make two of it"
    if runs != grids.runs(grid):
        yield "runs: are not what the grid stands for; a study with a grid has runs: ${grid_runs:}"


def _one_grid(where: str, one: object) -> Iterator[str]:
    if not isinstance(one, dict):
        yield f"{where} = {one!r}: must be a mapping with over"
        return
    yield from key_problems(where, one, grids.KEYS, ("over",))
    if not isinstance(one.get("sets", {}), dict):
        yield f"{where}.sets = {one['sets']!r}: must be a mapping of settings"
    over = one.get("over", {"": [0]})
    if not isinstance(over, dict) or not over:
        yield f"{where}.over = {over!r}: must be a mapping of axes, each to its values"
        return
    for axis, values in over.items():
        if isinstance(values, dict):
            good = bool(values) and all(isinstance(v, dict) and v for v in values.values())
        else:
            good = (
                isinstance(values, list)
                and bool(values)
                and not any(isinstance(v, dict | list) for v in values)
            )
        if not good:
            yield (
                f"{where}.over.{axis} = {values!r}: must be a list of values of the setting {axis}, or a mapping "
                "from labels to settings"
            )
        elif len({shown for shown, _, _ in grids.places(axis, values)}) < len(values):
            yield f"{where}.over.{axis} = {values!r}: names a value twice"


def _chosen_problems(chosen: object, seeds: list) -> Iterator[str]:
    """Runs that another study chose must be compared on other seeds than they were chosen on."""
    if not chosen:
        return
    if not isinstance(chosen, dict):
        yield f"chosen_from = {chosen!r}: must be a mapping, which stages.choose writes"
        return
    keys = ("study", "metric", "seeds")
    yield from key_problems("chosen_from", chosen, keys, keys)
    its = chosen.get("seeds", [])
    if not isinstance(its, list):
        yield f"chosen_from.seeds = {its!r}: must be a list"
    elif shared := [seed for seed in seeds if seed in its]:
        yield (
            f"seeds = {seeds!r}: the runs were chosen by {chosen.get('study')} on seed {shared[0]} too, which "
            "favours them; set others"
        )
