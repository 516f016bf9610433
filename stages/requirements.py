"""What a study asks of its runs beyond settings, the keys of REQUIREMENTS: budgets, expectations, data, a selection.

Every function gives problems in words, none where all is well. Must not read or write files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatch

from engine.data import DIALOGUES, LABELLED, TEXTS
from metrics.selection import NOT, chosen
from stages import checklist
from stages.study import one_of

REQUIREMENTS = {
    "own_budget": [],  # runs that are given another amount of the axis, and are shown apart
    "expects": {},  # of stages.checklist
    "refused_datasets": {},  # name → why
    "perplexity_at": [],  # steps
    "targets": [],  # validation losses, the time to which is told
    "preset": "",  # of conf/preset
    "repeats": [],  # runs that are meant to have the settings of another
    "only": [],  # of the runs those to train now, by name or pattern
    "selected": [],  # what `only` stands for
}


def requirement_problems(study: dict, dataset: object) -> list[str]:
    """Problems with the keys of REQUIREMENTS in a study whose runs are a mapping."""
    return [
        *_own_budget(study["own_budget"], study["runs"], study["baseline"]),
        *checklist.problems(study["expects"]),
        *_refused(study["refused_datasets"], dataset),
        *_numbers("perplexity_at", study["perplexity_at"], "steps", whole=True),
        *_numbers("targets", study["targets"], "validation losses"),
        *_repeats(study["repeats"], study["runs"]),
        *_only(study["only"], study["runs"], study["baseline"]),
    ]


def _own_budget(value: object, runs: Iterable[str], baseline: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"own_budget = {value!r}: must be a list of runs"
        return
    for name in value:
        yield from one_of("own_budget", name, runs, "runs:")
        if name == baseline:
            yield f"own_budget: {name} is the baseline, whose budget is the study's"


def _refused(value: object, dataset: object) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"refused_datasets = {value!r}: must be a mapping from a data set to the reason"
        return
    for name, why in value.items():
        yield from one_of("refused_datasets", name, TEXTS | LABELLED | DIALOGUES)
        if not isinstance(why, str) or not why:
            yield f"refused_datasets.{name} = {why!r}: must say why"
    if isinstance(dataset, str) and dataset in value:
        yield f"dataset = {dataset!r}: is refused by the study: {value[dataset]}"


def _numbers(name: str, value: object, what: str, whole: bool = False) -> Iterator[str]:
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, list) and all(type(v) in kinds and 0 < v < math.inf for v in value)
    if not good or len(set(value)) < len(value):
        yield f"{name} = {value!r}: must be a list of distinct {what} above 0"


def _repeats(value: object, runs: Iterable[str]) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"repeats = {value!r}: must be a list of runs"
        return
    for name in value:
        yield from one_of("repeats", name, runs, "runs:")


def equal_runs(study: dict, configs: dict[str, object]) -> Iterator[str]:
    """Runs that would be another once more, by all their settings but the name, and are not said to repeat it.

    configs: {"<run>-<seed>": Config} of every run.
    """
    same: dict[object, str] = {}
    for name in study["runs"]:
        settings = replace(configs[f"{name}-{study['seeds'][0]}"], run=None)
        first = same.setdefault(settings, name)
        if first != name and name not in study["repeats"]:
            spared = first if name == study["baseline"] else name
            yield (
                f"runs.{first}, {name}: all settings are equal, so {name} would be {first} trained twice; leave one "
                f"out ({without([spared])}), or list it in repeats if that is meant"
            )


def _only(value: object, runs: Iterable[str], baseline: str) -> Iterator[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        yield f"only = {value!r}: must be a list of runs or patterns such as mla_*"
        return
    for pattern in value:
        if not any(fnmatch(name, pattern.removeprefix(NOT)) for name in runs):
            yield from one_of(
                "only", pattern, runs, "runs or patterns of them, with a ! before those left out:"
            )
    if value and baseline not in chosen(runs, value):
        yield f"only = {value!r}: leaves out the baseline {baseline}, which all are compared with; add it"


def selection_problem(params: dict) -> str | None:
    """Why DVC would not train the runs that are planned: a params.yaml edited by hand."""
    runs, selected = list(params["runs"]), params.get("selected")
    if selected is None or params.get("only") or selected == runs:
        return None
    return f"selected = {selected!r}: DVC trains these, and the runs are {runs!r}; give both the same names"


def without(names: Iterable[str]) -> str:
    """How to train all runs but these."""
    patterns = ",".join(f'"{NOT}{name}"' for name in names)
    return f"-S 'only=[{patterns}]'"


def restricted(study: dict) -> tuple[dict, list[str]]:
    """The study with the runs that are selected, and what else is left out with the others, in words."""
    selected, said = study["selected"], []
    absent = [name for name in study["runs"] if name not in selected] if study["only"] else []
    if not absent:
        return study, []
    kept = study | {"runs": {name: study["runs"][name] for name in study["runs"] if name in selected}}
    kept["left_out"] = absent
    said.append(f"only {len(kept['runs'])} of {len(study['runs'])} runs: without {', '.join(absent)}")
    for key in ("own_budget", "repeats"):
        kept[key] = [name for name in study[key] if name in selected]
    kept["scaling"] = {
        run: one for run, one in study["scaling"].items() if run in selected and one["reference"] in selected
    }
    kept["criteria"] = [
        one
        for one in study["criteria"]
        if one["run"] in selected
        and one.get("against", one["run"]) in selected
        and (one["measure"] not in ("speedup", "efficiency") or one["run"] in kept["scaling"])
    ]
    if lost := len(study["criteria"]) - len(kept["criteria"]):
        of_runs = "1 criterion is of a run" if lost == 1 else f"{lost} criteria are of runs"
        said.append(f"{of_runs} left out, and not looked at")
    if study["hypothesis"] and _names(study["falsified_by"]) & set(absent):
        kept |= {"hypothesis": "", "falsified_by": {}}
        said.append("the hypothesis is about runs left out, and not decided")
    if study["grid"]:
        kept["grid"] = {}
        said.append("the grid is not whole, and not drawn")
    return kept, said


def _names(falsified_by: object) -> set[str]:
    """The runs that conditions name."""
    conditions = falsified_by.get("when", []) if isinstance(falsified_by, dict) else []
    return {one[key] for one in conditions for key in ("run", "against") if key in one}
