"""What a study's own keys must be, and what they must not be together: question, runs, axis, scaling, criteria.

Every function gives problems in words, none where all is well. Must not read or write files.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator

from engine.config import SETTINGS, is_effective, nearest
from engine.data import BY_POSITION, DIALOGUES, DOCUMENTS, LABELLED
from metrics.measures import (
    AXES,
    KINDS,
    LABELLED_METRICS,
    METRICS,
    SCALED,
    SCALING_MEASURES,
    STEADY,
    STUDY_METRICS,
    TO_TARGET,
    measured,
)

STUDY_KEYS = {"study": str, "question": str, "baseline": str, "metric": str, "seeds": list, "runs": dict}
# Study keys that may be left out, with their defaults.
OPTIONAL = {"axis": "tokens", "frozen": [], "scaling": {}, "criteria": [], "to_beat": {}}
PLANNED = ("study", "run", "seed")  # settings that the plan fills in
BY_LENGTH = ("tokens", "samples", "steps")  # axes of which a run's length says how much it has
BOUNDS = ("at_least", "at_most")
TO_BEAT = ("measure", "value", "says")  # and not_comparable, which says why
IMAGINABLE = 2  # efficiency that no run has, whatever its caches hold; a bound beyond it decides nothing


def study_problems(study: dict, dataset: object) -> list[str]:
    """Problems with the study's own keys, apart from its settings but for what `dataset` it is of."""
    problems = []
    for key, kind in STUDY_KEYS.items():
        if not isinstance(study.get(key), kind) or not study[key]:
            problems.append(f"{key} = {study.get(key)!r}: must be a non-empty {kind.__name__}")
    if problems:
        return problems
    runs, seeds = study["runs"], study["seeds"]
    if unnamed := [name for name in runs if not isinstance(name, str)]:
        return [f"runs: the name {name!r} must be text: write it in quotes, '{name}'" for name in unnamed]
    if study["baseline"] not in runs:
        problems.append(f"baseline = {study['baseline']!r}: must be one of the runs {', '.join(runs)}")
    problems += _metric_problems(study["metric"], dataset)
    if study["axis"] not in list(AXES):
        problems.append(f"axis = {study['axis']!r}: must be one of {', '.join(AXES)}")
    if isinstance(study["frozen"], list):
        problems += [
            f"frozen: {name!r} is an unknown setting{nearest(str(name))}"
            for name in study["frozen"]
            if name not in list(SETTINGS)
        ]
    else:
        problems.append(f"frozen = {study['frozen']!r}: must be a list of settings")
    if not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        problems.append(f"seeds = {seeds!r}: must be distinct whole numbers ≥ 0")
    problems += [
        f"runs.{name}: must be a mapping of settings, or {{}}"
        for name, own in runs.items()
        if not isinstance(own, dict)
    ]
    scaled = list(_scaling_key_problems(study["scaling"], runs))
    return [
        *problems,
        *scaled,
        *_criteria_problems(study["criteria"], runs, () if scaled else study["scaling"], _labelled(dataset)),
        *_to_beat_problems(study["to_beat"], _labelled(dataset)),
    ]


def _labelled(dataset: object) -> bool:
    return isinstance(dataset, str) and dataset in LABELLED | DIALOGUES


def _metric_problems(metric: str, dataset: object) -> Iterator[str]:
    allowed = LABELLED_METRICS if _labelled(dataset) else STUDY_METRICS
    if metric not in allowed:
        of_rows = metric in LABELLED_METRICS
        also = f"; of labelled data only (dataset = {dataset!r} is text)" if of_rows else ""
        yield f"metric = {metric!r}: must be one of {', '.join(allowed)}{also}"


def run_problems(name: str, own: dict, problems: Iterable[str]) -> list[str]:
    """Problems with what a run sets for itself: `problems` with the values, and settings that are not a run's."""
    return [f"runs.{name}.{p}" for p in problems] + [
        f"runs.{name}.{key}: is the study's, not a run's"
        for key in own
        if key in PLANNED or (key in SETTINGS and SETTINGS[key].section == "data")
    ]


def fairness_problems(study: dict, base: dict) -> list[str]:
    """Runs whose settings already say that they could not be compared: a frozen one changed, another budget."""
    shared = {s.name: s.default for s in SETTINGS.values()} | base
    baseline = shared | study["runs"][study["baseline"]]
    problems = []
    if (
        study["metric"].startswith("test_")
        and shared["dataset"] in (*BY_POSITION, *DOCUMENTS)
        and not shared["test_percent"]
    ):
        problems.append(
            f"metric = {study['metric']!r}: there is no test with test_percent = 0; set metric = 'val_loss'"
        )
    if study.get("budget") and study["axis"] in BY_LENGTH and baseline["epochs"]:
        problems.append(
            f"budget = {study['budget']!r}: only the token files tell how many {study['axis']} epochs = "
            f"{baseline['epochs']:g} are; say it in steps, or set budget = 0 (not said)"
        )
    for name, own in study["runs"].items():
        problems += [
            f"runs.{name}.{key} = {own[key]!r}: {key} is frozen by the study, which has {shared[key]!r}"
            for key in study["frozen"]
            if key in own and SETTINGS[key].typed(own[key]) != SETTINGS[key].typed(shared[key])
        ]
        mine, theirs, unit = _amounts(study["axis"], shared | own, baseline)
        if name in study["own_budget"]:
            if mine and mine == theirs:
                problems.append(f"own_budget: runs.{name} is given the {mine:,} {unit} of the baseline")
        elif mine != theirs:
            problems.append(
                f"runs.{name}: is given {mine:,} {unit}, the baseline {study['baseline']} {theirs:,}, and "
                f"the study compares at {AXES[study['axis']].words} (axis = {study['axis']!r}); change its "
                f"{'epochs' if unit == 'epochs' else 'steps'}, or the axis, or list it in own_budget, which shows it "
                "apart"
            )
    return problems


def _amounts(axis: str, one: dict, other: dict) -> tuple[float, float, str]:
    """How much of the axis two runs ask for, and in what; 0 and 0 where only the runs themselves can tell."""
    mine, theirs = budget(axis, one), budget(axis, other)
    if mine and theirs:
        return mine, theirs, axis
    alike = all(one[key] == other[key] for key in ("batch_size", "context"))
    if axis in BY_LENGTH and alike and one["epochs"] and other["epochs"]:
        return one["epochs"], other["epochs"], "epochs"
    return 0, 0, axis


def budget(axis: str, values: dict) -> int:
    """How much of the axis these settings ask for; 0 where only the run itself can tell."""
    if values["epochs"]:  # how many steps they are, the token files tell
        return 0
    samples = values["steps"] * values["batch_size"]
    amounts = {"tokens": samples * values["context"], "samples": samples, "steps": values["steps"]}
    return amounts.get(axis, 0)


def one_of(where: str, value: object, allowed: Iterable[str], what: str = "one of") -> Iterator[str]:
    """A problem, with the nearest name, unless `value` is one of those allowed."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        close = difflib.get_close_matches(str(value), names, n=1)
        near = f" (nearest: {close[0]})" if close else ""
        yield f"{where} = {value!r}: must be {what} {', '.join(names)}{near}"


def key_problems(where: str, value: dict, allowed: tuple[str, ...], needed: tuple[str, ...]) -> Iterator[str]:
    """Unknown and missing keys of a mapping."""
    for key in value:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            near = f" (nearest: {close[0]})" if close else f"; allowed: {', '.join(allowed)}"
            yield f"{where}.{key}: unknown key{near}"
    if absent := [key for key in needed if key not in value]:
        yield f"{where}: lacks {', '.join(absent)}"


def _scaling_key_problems(scaling: object, runs: dict) -> Iterator[str]:
    """Problems with the form of the key `scaling`."""
    if not isinstance(scaling, dict):
        yield f"scaling = {scaling!r}: must be a mapping of runs, each to its reference and kind"
        return
    for run, declared in scaling.items():
        where = f"scaling.{run}"
        if run not in runs:
            yield from one_of(where.replace(f".{run}", ""), run, runs, "one of the runs")
        if not isinstance(declared, dict):
            yield f"{where} = {declared!r}: must be a mapping with reference and kind"
            continue
        yield from key_problems(where, declared, ("reference", "kind"), ("reference", "kind"))
        if "reference" in declared:
            yield from one_of(f"{where}.reference", declared["reference"], runs, "one of the runs")
            if declared["reference"] == run:
                yield f"{where}.reference = {run!r}: is the run itself"
        if "kind" in declared:
            yield from one_of(f"{where}.kind", declared["kind"], KINDS)


def _criteria_problems(criteria: object, runs: dict, scaling: Iterable[str], labelled: bool) -> Iterator[str]:
    """Problems with the key `criteria`; `scaling` has the runs whose speedup will be measured."""
    if not isinstance(criteria, list):
        yield f"criteria = {criteria!r}: must be a list, each with run, measure, at_least or at_most"
        return
    first: dict[str, int] = {}  # a run and a measure, in words: neither need be one yet
    for place, one in enumerate(criteria):
        where = f"criteria[{place}]"
        if not isinstance(one, dict):
            yield f"{where} = {one!r}: must be a mapping with run, measure, at_least or at_most"
            continue
        keys = ("run", "measure", "against", "target", *BOUNDS)
        yield from key_problems(where, one, keys, ("run", "measure"))
        for key in ("run", "against"):
            if key in one:
                yield from one_of(f"{where}.{key}", one[key], runs, "one of the runs")
        yield from _ratio_and_target_problems(where, one)
        if "measure" in one and one["measure"] != TO_TARGET:
            more = (STEADY, *SCALING_MEASURES)
            yield from _measure_problems(f"{where}.measure", one["measure"], labelled, more)
            if one["measure"] in SCALING_MEASURES and one.get("run") not in list(scaling):
                yield f"{where}.measure = {one['measure']!r}: scaling does not declare {one.get('run')!r}"
        more = "".join(f", {key} {one[key]}" for key in ("against", "target") if key in one)
        before = first.setdefault(f"{one.get('measure')} of {one.get('run')}{more}", place)
        if before < place and {"run", "measure"} <= one.keys():
            yield f"{where}: {one['measure']} of {one['run']} is criteria[{before}]'s: put both bounds there"
        yield from bound_problems(where, one, is_ratio="against" in one)


def _ratio_and_target_problems(where: str, one: dict) -> Iterator[str]:
    """A criterion that is a ratio to another run's, and one on the time to a loss."""
    name, target = one.get("measure"), one.get("target")
    if "against" in one and one["against"] == one.get("run"):
        yield f"{where}.against = {one['against']!r}: is the run itself"
    if "against" in one and name in SCALING_MEASURES:
        yield f"{where}.against: {name} is a ratio already"
    if name == TO_TARGET:
        if type(target) not in (int, float) or not 0 < target < math.inf:
            yield f"{where}.target = {target!r}: must be a validation loss above 0"
    elif "target" in one:
        yield f"{where}.target: goes with measure = {TO_TARGET!r}"


def _measure_problems(where: str, name: object, labelled: bool, more: tuple[str, ...] = ()) -> Iterator[str]:
    """Unless it is what the runs of the study's data set have, or one of `more`."""
    known = (*measured(labelled), *more)
    if isinstance(name, str) and name in METRICS and name not in measured(labelled):
        runs = "classifiers have none" if labelled else "runs on text have none"
        yield f"{where} = {name!r}: {runs}; must be one of {', '.join(known)}"
    else:
        yield from one_of(where, name, known)


def _to_beat_problems(declared: object, labelled: bool) -> Iterator[str]:
    """Problems with the key `to_beat`: a figure from outside, whose it is, and why no run is held to it."""
    if not isinstance(declared, dict):
        yield f"to_beat = {declared!r}: must be a mapping with {', '.join(TO_BEAT)}"
        return
    if not declared:
        return
    yield from key_problems("to_beat", declared, (*TO_BEAT, "not_comparable"), TO_BEAT)
    for key, what in (("says", "whose figure it is, and of what"), ("not_comparable", "why it is not")):
        if key in declared and not (isinstance(declared[key], str) and declared[key].strip()):
            yield f"to_beat.{key} = {declared[key]!r}: must be text that says {what}"
    name, value = declared.get("measure"), declared.get("value")
    if "measure" in declared:
        yield from _measure_problems("to_beat.measure", name, labelled)
    if "value" not in declared:
        return
    if type(value) not in (int, float) or not 0 < value < math.inf:
        yield f"to_beat.value = {value!r}: must be a number above 0"
    elif isinstance(name, str) and name in METRICS and METRICS[name].unit == "%" and value > 1:
        yield f"to_beat.value = {value!r}: must be a share from 0 to 1 ({value / 100:g} for {value:g} %)"


def bound_problems(where: str, one: dict, is_ratio: bool = False) -> Iterator[str]:
    """Problems with at_least and at_most of a criterion or a condition, of a measure or of a ratio of two."""
    bounds = {key: one[key] for key in BOUNDS if key in one}
    if not bounds:
        yield f"{where}: lacks at_least or at_most"
    bad = {k: v for k, v in bounds.items() if type(v) not in (int, float) or not math.isfinite(v)}
    for key, value in bad.items():
        yield f"{where}.{key} = {value!r}: must be a finite number"
    if bad:
        return
    if len(bounds) == len(BOUNDS) and bounds["at_least"] > bounds["at_most"]:
        yield f"{where}: at_least = {bounds['at_least']} is above at_most = {bounds['at_most']}"
    name = str(one.get("measure"))
    share = not is_ratio and (name == "efficiency" or (name in METRICS and METRICS[name].unit == "%"))
    for key, value in bounds.items():
        # Caches can make an efficiency more than 1: to ask for that is a mistake, to rule it out is none.
        most = IMAGINABLE if (name, key) == ("efficiency", "at_most") else 1
        if share and not 0 <= value <= most:
            yield f"{where}.{key} = {value!r}: must be a share from 0 to {most} ({value / 100:g} for {value:g} %)"
        elif not share and value <= 0 and (name in METRICS or name in (*SCALING_MEASURES, STEADY, TO_TARGET)):
            yield f"{where}.{key} = {value!r}: must be above 0, as every {name} is"


def scaling_problems(study: dict, base: dict) -> list[str]:
    """Declared pairs that are not what they are said to be, by the settings of both runs; speedups that cannot be."""
    shared = {s.name: s.default for s in SETTINGS.values()} | base
    problems = []
    for place, one in enumerate(study["criteria"]):
        processes = (shared | study["runs"][one["run"]])["processes"]
        if one["measure"] == "speedup" and processes:
            problems += _speedup_problems(f"criteria[{place}]", one, processes)
    for run, declared in study["scaling"].items():
        own, its = (shared | study["runs"][name] for name in (run, declared["reference"]))
        problems += _pair_problems(run, declared["reference"], declared["kind"], own, its)
    return problems


def _speedup_problems(where: str, one: dict, processes: int) -> Iterator[str]:
    """Bounds that no run in so many processes gets near."""
    for key in BOUNDS:
        if one.get(key, 0) > (most := IMAGINABLE * processes):
            yield (
                f"{where}.{key} = {one[key]!r}: must be at most {most}, twice the processes of runs.{one['run']}: no "
                "run is so much faster than one process"
            )


def _pair_problems(run: str, reference: str, kind: str, own: dict, its: dict) -> Iterator[str]:
    where, processes = f"scaling.{run}", max(own["processes"], 1)
    if processes == 1:
        yield f"{where}: runs.{run}.processes = {own['processes']}: must be 2 or more, to be faster than one"
    if its["processes"] > 1:
        yield f"{where}.reference: runs.{reference}.processes = {its['processes']}: must be 1"
    for name, values in ((run, own), (reference, its)):
        if not values["scaling_probe_steps"]:
            yield f"{where}: runs.{name}.scaling_probe_steps = 0: must be 1 or more, for its steps to be timed"
    wanted = its["batch_size"] * (processes if kind == "weak" else 1)
    if own["batch_size"] != wanted:
        yield (
            f"{where}.kind = {kind!r}: is {KINDS[kind]}, which would be batch_size = {wanted} with the "
            f"{its['batch_size']} of {reference}; runs.{run} has {own['batch_size']}"
        )
    for key in own:
        mine, theirs = (v[key] if is_effective(key, v) else SETTINGS[key].default for v in (own, its))
        if key not in SCALED and SETTINGS[key].typed(mine) != SETTINGS[key].typed(theirs):
            yield (
                f"{where}: runs.{run} has {key} = {mine!r}, {reference} {theirs!r}; between them only spreading, "
                "batch, steps and lr may differ"
            )
