"""PLAN: params.yaml → one complete, valid TOML per run and seed, and study.json.

    python -m stages.plan               writes results/<study>/configs/
    python -m stages.plan --defaults    writes conf/defaults.yaml from the declarations in engine/config.py

Resolves defaults ← study ← run. Every problem of every run is reported at once, before anything is written.
"""

import argparse
import json
import sys
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from engine.config import SETTINGS, effect_problems, is_effective, nearest, resolve, value_problems
from engine.errors import ConfigError, command
from engine.rundir import toml, write_json
from metrics.measures import AXES, STUDY_METRICS

PARAMS, DEFAULTS = Path("params.yaml"), Path("conf/defaults.yaml")
STUDY_KEYS = {"study": str, "question": str, "baseline": str, "metric": str, "seeds": list, "runs": dict}
FAIRNESS = {"axis": "tokens", "frozen": []}  # study keys that may be left out, with their defaults
PLANNED = ("study", "run", "seed")  # settings that the plan fills in
STAMP = "_composed_"


def read_params(path: Path) -> dict:
    """The composed parameters. DVC's own YAML reader: others read 6e-4 as text."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError("no such file; `dvc exp run` composes it from conf/", str(path)) from None
    except YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", str(path)) from None


def study_problems(study: dict) -> list[str]:
    """Problems with the study's own keys, apart from its settings."""
    problems = []
    for key, kind in STUDY_KEYS.items():
        if not isinstance(study.get(key), kind) or not study[key]:
            problems.append(f"{key} = {study.get(key)!r}: must be a non-empty {kind.__name__}")
    if problems:
        return problems
    runs, seeds = study["runs"], study["seeds"]
    if study["baseline"] not in runs:
        problems.append(f"baseline = {study['baseline']!r}: must be one of the runs {', '.join(runs)}")
    if study["metric"] not in STUDY_METRICS:
        problems.append(f"metric = {study['metric']!r}: must be one of {', '.join(STUDY_METRICS)}")
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
    return problems


def run_problems(name: str, own: dict) -> list[str]:
    """Problems with what a run sets for itself."""
    problems = [f"runs.{name}.{p}" for p in value_problems(own)]
    problems += [
        f"runs.{name}.{key}: is the study's, not a run's"
        for key in own
        if key in PLANNED or (key in SETTINGS and SETTINGS[key].section == "data")
    ]
    return problems


def fairness_problems(study: dict, base: dict) -> list[str]:
    """Runs whose settings already say that they could not be compared: a frozen one changed, another budget."""
    shared = {s.name: s.default for s in SETTINGS.values()} | base
    baseline = shared | study["runs"][study["baseline"]]
    problems = []
    for name, own in study["runs"].items():
        problems += [
            f"runs.{name}.{key} = {own[key]!r}: {key} is frozen by the study, which has {shared[key]!r}"
            for key in study["frozen"]
            if key in own and SETTINGS[key].typed(own[key]) != SETTINGS[key].typed(shared[key])
        ]
        mine, theirs = (_budget(study["axis"], one) for one in (shared | own, baseline))
        if mine != theirs:
            problems.append(
                f"runs.{name}: is given {mine:,} {study['axis']}, the baseline {study['baseline']} {theirs:,}, and "
                f"the study compares at {AXES[study['axis']].words} (axis = {study['axis']!r}); change its steps, or "
                "the axis"
            )
    return problems


def _budget(axis: str, values: dict) -> int:
    """How much of the axis these settings ask for; 0 where only the run itself can tell."""
    tokens = values["steps"] * values["batch_size"] * values["context"]
    return {"tokens": tokens, "steps": values["steps"]}.get(axis, 0)


def resolve_study(params: dict) -> tuple[dict, dict[str, object]]:
    """(study keys and settings, {"<run>-<seed>": Config}). Raises ConfigError with all problems."""
    keys = STUDY_KEYS | FAIRNESS
    study = FAIRNESS | {k: v for k, v in params.items() if k in keys}
    base = {k: v for k, v in params.items() if k not in keys and k != STAMP}
    problems = study_problems(study) + [f"{k}: is filled in by the plan" for k in PLANNED[1:] if k in base]
    problems += value_problems({k: v for k, v in base.items() if k not in PLANNED})
    if problems:
        raise ConfigError(problems, str(PARAMS))
    problems = [p for name, own in study["runs"].items() for p in run_problems(name, own)]
    if problems:
        raise ConfigError(problems, str(PARAMS))
    problems = [*fairness_problems(study, base), *_unused_everywhere(base, study["runs"])]
    configs = {}
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
                problems += [f"runs.{name}: {p}" for p in error.problems]
                break  # another seed has the same problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(PARAMS))
    return {**study, "settings": base}, configs


def _unused_everywhere(base: dict, runs: dict) -> list[str]:
    """Study-wide settings that differ from their default and would do nothing in any run."""
    every = [effect_problems({**base, **own}) for own in runs.values()]
    return [every[0][key] for key in every[0] if key in base and all(key in problems for problems in every)]


def defaults_yaml() -> str:
    """conf/defaults.yaml: every setting with its default, so that `-S NAME=VALUE` works for all of them."""
    lines = [
        "# Generated from engine/config.py by `python -m stages.plan --defaults`. Change settings in a study",
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
    study, configs = resolve_study(read_params(PARAMS))
    directory = Path("results") / study["study"] / "configs"
    directory.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        (directory / f"{name}.toml").write_text(toml(config), encoding="utf-8")
    (directory / "data.toml").write_text(toml(next(iter(configs.values())), only=("data",)), encoding="utf-8")
    base = study.pop("settings")
    changed = {
        k: v for k, v in base.items() if (tuple(v) if isinstance(v, list) else v) != SETTINGS[k].default
    }
    write_json(directory / "study.json", {**study, "dataset": base["dataset"], "base": changed})
    print(
        f"plan: study {study['study']}, {len(study['runs'])} runs × {len(study['seeds'])} seeds",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
