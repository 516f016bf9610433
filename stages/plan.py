"""PLAN: params.yaml → one complete, valid TOML per run and seed, and study.json.

    python -m stages.plan               writes results/<study>/configs/
    python -m stages.plan --defaults    writes conf/defaults.yaml from the declarations in engine/settings

Resolves defaults ← study ← run. Every problem of every run is reported at once, before anything is written.
"""

import argparse
import json
import sys
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from engine.config import SETTINGS, effect_problems, is_effective, resolve, value_problems
from engine.errors import ConfigError, command
from engine.rundir import toml, write_json
from metrics.measures import amount
from stages import checklist, presets, progress
from stages.experiment import EXPERIMENT, budget_problems, experiment_problems
from stages.inputs import input_problems
from stages.requirements import (
    REQUIREMENTS,
    equal_runs,
    requirement_problems,
    restricted,
    selection_problem,
    without,
)
from stages.study import (
    OPTIONAL,
    PLANNED,
    STUDY_KEYS,
    budget,
    fairness_problems,
    run_problems,
    scaling_problems,
    study_problems,
)

PARAMS, DEFAULTS = Path("params.yaml"), Path("conf/defaults.yaml")
STAMP = "_composed_"


def read_params(path: Path) -> dict:
    """The composed parameters. DVC's own YAML reader: others read 6e-4 as text."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError("no such file; `dvc exp run` composes it from conf/", str(path)) from None
    except YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", str(path)) from None


def resolve_study(params: dict) -> tuple[dict, dict[str, object]]:
    """(study keys and settings, {"<run>-<seed>": Config}). Raises ConfigError with all problems."""
    optional = OPTIONAL | EXPERIMENT | REQUIREMENTS
    keys = STUDY_KEYS | optional
    study = optional | {k: v for k, v in params.items() if k in keys}
    base = {k: v for k, v in params.items() if k not in keys and k != STAMP}
    dataset = base.get("dataset", SETTINGS["dataset"].default)
    problems = study_problems(study, dataset)
    problems += experiment_problems(study) + requirement_problems(study, dataset) if not problems else []
    problems += [f"{k}: is filled in by the plan" for k in PLANNED[1:] if k in base]
    problems += value_problems({k: v for k, v in base.items() if k not in PLANNED})
    if problems:
        raise ConfigError(problems, str(PARAMS))
    problems = [
        p for name, own in study["runs"].items() for p in run_problems(name, own, value_problems(own))
    ]
    if problems:
        raise ConfigError(problems, str(PARAMS))
    unused = _unused_everywhere(base, study["runs"])
    study, said = restricted(study)
    problems = [
        *fairness_problems(study, base),
        *scaling_problems(study, base),
        *_budget_problems(study, base),
        *unused,
    ]
    configs, of_runs = {}, {}
    for name, own in study["runs"].items():
        merged = {**base, **own}
        # What the run says itself must have an effect; what it inherits need not, and is left out if it has none.
        problems += [f"runs.{name}.{p}" for key, p in effect_problems(merged).items() if key in own]
        effective = {k: v for k, v in merged.items() if is_effective(k, merged)}
        for seed in study["seeds"]:
            try:
                configs[f"{name}-{seed}"] = resolve(
                    {**effective, "study": study["study"], "run": name, "seed": seed}, f"runs.{name}"
                )
            except ConfigError as error:
                for problem in error.problems:
                    of_runs.setdefault(problem, []).append(name)
                break  # another seed has the same problems
    # A preset that a run cannot have need not be changed for it.
    problems += _by_runs(of_runs, len(study["runs"]), study["baseline"] if study["preset"] else "")
    problems = problems or [*_unexpected(study, configs), *equal_runs(study, configs)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(PARAMS))
    return {**study, "settings": base, "said": said}, configs


def _unexpected(study: dict, configs: dict[str, object]) -> list[str]:
    """What the checklist finds in the settings of the runs; and steps of the tables that are not evaluated."""
    found: dict[str, list[str]] = {}
    for name in study["runs"]:
        config = configs[f"{name}-{study['seeds'][0]}"]
        checks = checklist.of_settings(study["expects"], config, study["own_budget"])
        said = [
            f"{words} (expects: if it is meant, change that too)"
            for words in checklist.words(c for c in checks if not c.passed)
        ]
        every = config.evaluation.eval_interval
        said += [
            f"perplexity_at: {step} steps are not evaluated with eval_interval = {every}"
            for step in study["perplexity_at"]
            if step % every and (config.training.epochs or step != config.training.steps)
        ]
        for words in said:
            found.setdefault(words, []).append(name)
    return _by_runs(found, len(study["runs"]))


def _by_runs(found: dict[str, list[str]], whole: int, baseline: str = "") -> list[str]:
    """Each problem once, with the runs that have it, of `whole` in all.

    baseline: where it is none of these, how to do without them is said too.
    """
    problems = []
    for words, names in found.items():
        said = f"{'all runs' if len(names) == whole > 1 else 'runs.' + ', '.join(names)}: {words}"
        if baseline and baseline not in names:
            said += f"; or leave {'it' if len(names) == 1 else 'them'} out: {without(names)}"
        problems.append(said)
    return problems


def _budget_problems(study: dict, base: dict) -> list[str]:
    """What the study says that its runs are given of the axis, against what the baseline's settings come to."""
    baseline = {s.name: s.default for s in SETTINGS.values()} | base | study["runs"][study["baseline"]]
    return list(budget_problems(study, budget(study["axis"], baseline)))


def _unused_everywhere(base: dict, runs: dict) -> list[str]:
    """Study-wide settings that differ from their default and would do nothing in any run."""
    every = [effect_problems({**base, **own}) for own in runs.values()]
    return [every[0][key] for key in every[0] if key in base and all(key in problems for problems in every)]


def defaults_yaml() -> str:
    """conf/defaults.yaml: every setting with its default, so that `-S NAME=VALUE` works for all of them."""
    lines = [
        "# Generated from engine/settings by `python -m stages.plan --defaults`. Change settings in a study",
        "# under conf/study/ or with -S, not here.",
        f"{STAMP}: ${{stamp:}}",
    ]
    section = ""
    for s in SETTINGS.values():
        if s.name not in PLANNED:
            if s.section != section:
                section = s.section
                lines += ["", f"# {section}"]
            default = list(s.default) if isinstance(s.default, tuple) else s.default
            comment = f"{s.meaning}; {s.allowed}" + (f" [{s.unit}]" if s.unit else "")
            lines.append(f"{s.name}: {json.dumps(default)}  # {comment}")
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--defaults", action="store_true", help="write conf/defaults.yaml and stop")
    if parser.parse_args().defaults:
        DEFAULTS.write_text(defaults_yaml(), encoding="utf-8")
        return
    params = read_params(PARAMS)
    study, configs = resolve_study(params)
    if problem := selection_problem(params):
        raise ConfigError(problem, str(PARAMS))
    if problems := input_problems(configs):
        raise ConfigError(problems, str(PARAMS))
    directory = Path("results") / study["study"] / "configs"
    directory.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        (directory / f"{name}.toml").write_text(toml(config), encoding="utf-8")
    (directory / "data.toml").write_text(toml(next(iter(configs.values())), only=("data",)), encoding="utf-8")
    base, said = study.pop("settings"), study.pop("said")
    changed = {
        k: v for k, v in base.items() if (tuple(v) if isinstance(v, list) else v) != SETTINGS[k].default
    }
    planned = {k: v for k, v in study.items() if k not in ("only", "selected", "repeats")}
    write_json(directory / "study.json", {**planned, "dataset": base["dataset"], "base": changed})
    defaults = {s.name: s.default for s in SETTINGS.values()}
    if study["preset"]:
        aside = {s.name for s in SETTINGS.values() if s.section in ("data", "logging")}
        said = [*presets.lines(study["preset"], study["study"], base, defaults, aside), *said]
    runs, seeds = amount(len(study["runs"]), "run"), amount(len(study["seeds"]), "seed")
    said.append(f"study {study['study']}, {runs} × {seeds}")
    if study["expects"]:
        said[-1] += f"; {amount(len(study['expects']), 'expectation')}, the runs' settings meet theirs"
    so_far = progress.of_study(directory)
    said.append(f"{so_far}; to train: {', '.join(so_far.left) or 'nothing'}")
    print("\n".join(f"plan: {line}" for line in said), file=sys.stderr)


if __name__ == "__main__":
    main()
