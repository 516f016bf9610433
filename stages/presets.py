"""Presets, conf/preset/NAME.yaml: named settings that a study is built on, each the same as another except for some.

A preset is composed by DVC before the study, whose own settings win. Here is read only what it is said to differ in
from the one that it builds on, for the plan to print. Must not compose or change a setting.
"""

from collections.abc import Container
from pathlib import Path

from ruamel.yaml import YAML

from engine.errors import ConfigError

DIRECTORY = Path("conf/preset")
NOT_SETTINGS = ("defaults", "preset", "expects")


def parents(name: str) -> list[str]:
    """The preset and those that it builds on, itself first. Raises ConfigError for one that is not there."""
    chain = [name]
    while below := [one for one in _read(chain[-1]).get("defaults", []) if one != "_self_"]:
        if below[0] in chain:
            raise ConfigError(f"preset {name}: builds on itself, through {', '.join(chain)}", str(DIRECTORY))
        chain.append(below[0])
    return chain


def settings(name: str) -> dict:
    """What a preset sets, with those that it builds on."""
    values: dict = {}
    for one in reversed(parents(name)):
        values |= {key: value for key, value in _read(one).items() if key not in NOT_SETTINGS}
    return values


def _read(name: str) -> dict:
    path = DIRECTORY / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in DIRECTORY.glob("*.yaml")))
        raise ConfigError(f"preset {name!r}: no such file; there are {known}", str(DIRECTORY))
    return YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}


def differences(mine: dict, theirs: dict, defaults: dict) -> str:
    """`compile = none (there model), …`; what neither says is at its default."""
    found = []
    for key in dict.fromkeys([*theirs, *mine]):
        own, other = (_plain(values.get(key, defaults.get(key))) for values in (mine, theirs))
        if own != other:
            found.append(f"{key} = {own} (there {other})")
    return ", ".join(found)


def _plain(value: object) -> object:
    """A tuple of the declarations as the list that YAML has."""
    return list(value) if isinstance(value, tuple) else value


def lines(name: str, study: str, base: dict, defaults: dict, aside: Container[str] = ()) -> list[str]:
    """What a study's preset is the same as and except what, down to its ground; and the study's own differences.

    base: the study's settings as composed. defaults: of every setting. aside: settings of the study that are no
    preset's business unless it sets them, such as where the data lie.
    """
    chain = parents(name)
    said = []
    for one, below in zip(chain, chain[1:], strict=False):
        other = differences(settings(one), settings(below), defaults)
        said.append(f"preset {one}: same as {below}, except {other or 'nothing'}")
    of_preset = settings(name)
    own = {k: v for k, v in base.items() if k in of_preset or not (k in NOT_SETTINGS or k in aside)}
    said.append(
        f"study {study}: same as preset {name}, except {differences(own, of_preset, defaults) or 'nothing'}"
    )
    return said
