"""What `-S NAME=VALUE` asks of conf/, before DVC composes it: names that are not there, told with the nearest one.

conf/hydra_plugins/plumbline_guards.py asks, because Hydra's own words are of its insides. A name with a `+` or a `~`
before it, and one of another file, are left to Hydra and the plan. It must not change a value, nor refuse what Hydra
would take.
"""

import difflib
import re
from pathlib import Path

from ruamel.yaml import YAML

from engine.config import SETTINGS, nearest

GROUPS = ("study", "preset")  # directories of conf/ of which one file is chosen
SEVERAL = re.compile(r"(?:choice\()?\s*([\w-]+(?:\s*,\s*[\w-]+)*)\s*\)?")  # a name, or a sweep over names
NEAR = 0.6  # of SequenceMatcher; less is another word
LISTING = (
    "`python -m engine.config` lists every setting; what else a study may have is in docs/experiments.md, and -S "
    "+NAME=VALUE adds it to one that has it not"
)


def refusal(conf: Path, arguments: list[str]) -> str:
    """What is wrong with the overrides among a command's `arguments`, and what to do; empty where nothing is."""
    asked = _overrides(arguments)
    unknown = _unknown(conf, [path.split(".")[0] for path, _ in asked])
    problems = [*unknown, *_files(conf, dict(asked))]
    if not problems:
        problems += _keys(conf, asked, arguments)
    if not problems:
        return ""
    return f"{'; '.join(problems)}. Nothing was run or changed." + (f" {LISTING}" if unknown else "")


def _texts(arguments: list[str]) -> list[str]:
    """What follows -S and --set-param, in each of their forms."""
    texts = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("-S", "--set-param"):
            texts.append(following)
        elif found := re.match(r"(?:-S|--set-param=)(.+)", argument, re.DOTALL):
            texts.append(found[1])
    return texts


def _overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """(dotted name, value) of each override of a name that should be there."""
    found = (re.match(r"(\w+(?:\.[^=:]*)?)=(.*)", text, re.DOTALL) for text in _texts(arguments))
    return [(one[1], one[2]) for one in found if one]


def _unknown(conf: Path, names: list[str]) -> list[str]:
    known = set(SETTINGS) | {path.name for path in conf.iterdir()}  # and its groups of files
    if not set(names) <= known:
        known |= _top_level_keys(conf)  # a study's
    return [f"{name}: unknown setting{nearest(name)}" for name in names if name not in known]


def _top_level_keys(conf: Path) -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in (*conf.glob("*.yaml"), *conf.glob("*/*.yaml"))]
    return {key for text in texts for key in re.findall(r"(?m)^(\w+):", text)}


def _chosen(conf: Path, group: str, asked: dict[str, str]) -> list[str]:
    """The files of a group that are asked for, or the one that conf/config.yaml has; none that cannot be told."""
    if group in asked:
        several = SEVERAL.fullmatch(asked[group].strip("'\""))
        return re.findall(r"[\w-]+", several[1]) if several else []
    defaults = _read(conf / "config.yaml").get("defaults", [])
    return [one[group] for one in defaults if isinstance(one, dict) and group in one]


def _files(conf: Path, asked: dict[str, str]) -> list[str]:
    """Studies and presets that are not there, and what they are made of that is not."""
    problems = []
    for group in GROUPS:
        for name in _chosen(conf, group, asked):
            if not (conf / group / f"{name}.yaml").is_file():
                known = sorted(path.stem for path in (conf / group).glob("*.yaml"))
                problems.append(f"{group}={name}: no such {group} ({_nearest(name, known, 'there are')})")
            elif group == "study":
                problems += _unmade(conf, name)
    return problems


def _unmade(conf: Path, study: str) -> list[str]:
    """Files of conf/chosen that a study takes its runs from, and that have not been made."""
    built_on = _built_on(_read(conf / "study" / f"{study}.yaml"))
    names = [one.removeprefix("/chosen/") for one in built_on if one.startswith("/chosen/")]
    return [
        f"study={study}: takes its runs from conf/chosen/{name}.yaml, which is not there: run "
        f"`python -m stages.choose {name}` first, when the study {name} is done"
        for name in names
        if not (conf / "chosen" / f"{name}.yaml").is_file()
    ]


def _keys(conf: Path, asked: list[tuple[str, str]], arguments: list[str]) -> list[str]:
    """Dotted names of which a part is not there."""
    whole = [re.split("=", text.lstrip("+~"), maxsplit=1)[0] for text in _texts(arguments)]
    problems, of_presets = [], {}
    for preset in (conf / "preset").glob("*.yaml"):
        of_presets = _joined(of_presets, _read(preset))
    for study in _chosen(conf, "study", dict(asked)):
        values = _joined(of_presets, _composed(conf, "study", study))
        for path, value in asked:
            made = [name for name in whole if name != path and path.startswith(f"{name}.")]
            if not made and (problem := _absent(values, path, value)):
                problems.append(problem)
    return list(dict.fromkeys(problems))


def _absent(values: dict, path: str, value: str) -> str:
    """Which part of a dotted name a study lacks, and what would do."""
    *parents, last = path.split(".")
    at: object = values
    for depth, name in enumerate(parents):
        if not isinstance(at, dict) or (depth == 0 and name not in at):
            return ""  # of a list, or of what is made when DVC composes
        if name not in at:
            where, known = ".".join(parents[:depth]), [str(one) for one in at]
            return f"{path}: {where} has no {name} ({_nearest(name, known, 'it has')})"
        at = at[name]
    if not parents or not isinstance(at, dict) or last in at:
        return ""
    where = ".".join(parents)
    if parents[0] == "runs" and len(parents) > 1 and last not in SETTINGS:
        return f"{path}: unknown setting{nearest(last)}"
    return f"{path}: {where} has no {last} of its own yet, and a + adds it: -S +{path}={value}"


def _nearest(name: str, known: list[str], otherwise: str) -> str:
    """`nearest: …`, several where they are equally near; all that are `known` where none is."""
    near = {one: difflib.SequenceMatcher(None, name, one).ratio() for one in known}
    best = max(near.values(), default=0)
    if best < NEAR:
        return f"{otherwise} {', '.join(known)}"
    return f"nearest: {', '.join(one for one in known if near[one] == best)}"


def _composed(conf: Path, group: str, name: str) -> dict:
    """The keys of a file with those that it is built on; mappings of the same name are joined."""
    path = conf / group / f"{name}.yaml"
    own = _read(path)
    values: dict = {}
    for one in _built_on(own):
        below, _, stem = one.lstrip("/").rpartition("/")
        values = _joined(values, _composed(conf, below or group, stem))
    return _joined(values, own)


def _built_on(values: dict) -> list[str]:
    return [one for one in values.get("defaults", []) if isinstance(one, str) and one != "_self_"]


def _joined(below: dict, above: dict) -> dict:
    both = {
        key: _joined(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both


def _read(path: Path) -> dict:
    return (YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
