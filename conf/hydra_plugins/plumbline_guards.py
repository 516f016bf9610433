"""What `dvc exp run` would lose in silence, kept: hand edits of params.yaml, and the results of other studies.

DVC loads this file before it composes conf/ into params.yaml. It stamps the composed values with a fingerprint, in
the file's first key, and refuses to compose over a params.yaml whose values no longer match their stamp. It also
keeps DVC from clearing away results of studies that are not the current one. A misspelt override, which DVC would
refuse in words of its own, is refused with the nearest name. A new study is begun without a warning for each of its
outputs. It must not change any value.

It also writes out the runs that a study's grid stands for, `runs: ${grid_runs:}`, and those that `only` chooses,
`selected: ${selected_runs:}`.
"""

import hashlib
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import Container, ListConfig, OmegaConf

KEY = "_composed_"
NOTE = "by DVC from conf/, see README"


def stamp(values: dict) -> str:
    """The note with a fingerprint of all other values."""
    rest = {k: v for k, v in values.items() if k != KEY}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]
    return f"{NOTE} ({digest})"


def _stamp_root(*, _root_: Container) -> str:
    values = {k: _root_[k] for k in _root_ if k != KEY}
    return stamp(
        {
            k: OmegaConf.to_container(v, resolve=True) if isinstance(v, Container) else v
            for k, v in values.items()
        }
    )


def _of_metrics(name: str):
    """The module metrics/NAME.py, which needs nothing else of this repository."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location(f"plumbline_{name}", root / "metrics" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _grid_runs(*, _root_: Container) -> Container:
    """The runs that the study's key `grid` stands for."""
    grids = _of_metrics("grids")
    try:
        grid = OmegaConf.to_container(_root_.grid, resolve=True)
        return OmegaConf.create(grids.runs(grid))
    except (AttributeError, KeyError, TypeError, ValueError):
        return OmegaConf.create({"the_grid_is_not_one": {}})  # the plan says what is wrong with it


def _selected_runs(*, _root_: Container) -> Container:
    """The names of the study's runs that the patterns in `only` match; all where they match none or are not patterns.

    The plan says what is wrong with them.
    """
    runs, only = list(_root_.runs), _root_.get("only")
    patterns = [str(one) for one in only] if isinstance(only, ListConfig) else []
    return OmegaConf.create(_of_metrics("selection").chosen(runs, patterns) or runs)


def refuse_edited(path: Path) -> None:
    """Raise ValueError if `path` was edited since it was composed."""
    from ruamel.yaml import YAML

    if not path.exists():
        return
    values = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    if values.get(KEY) != stamp(values):
        raise ValueError(
            "params.yaml was edited by hand, and composing conf/ would lose the edit. Nothing was run or changed. "
            "To keep it: put it in conf/, or pass it with -S NAME=VALUE; to run exactly this file: dvc repro. "
            "Then, to let DVC write the file again: git checkout params.yaml"
        )


def refuse_busy(root: Path, arguments: list[str]) -> None:
    """Raise ValueError if another DVC runs a stage here: to begin, this one would clear away what that one writes.

    Not where nothing runs here: --queue only notes down an experiment, --temp copies the repository.
    """
    if {"--queue", "--temp"} & set(arguments):
        return
    try:
        locks = json.loads((root / ".dvc/tmp/rwlock").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    readers = [one for several in locks.get("read", {}).values() for one in several]
    holders = [*locks.get("write", {}).values(), *readers]
    for holder in holders:
        if holder["pid"] != os.getpid() and _lives(holder["pid"]):
            raise ValueError(
                f"process {holder['pid']} ({holder['cmd']}) runs stages in this directory, and a second one would "
                "remove what it has not finished. Nothing was run or changed. Wait for it; or note the experiment "
                "down for later: dvc exp run --queue"
            )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def refuse_unknown(root: Path, arguments: list[str]) -> None:
    """Raise ValueError if an override (`-S NAME=VALUE`) is of what conf/ has not: a setting, study, preset or key."""
    sys.path.insert(0, str(root))
    try:
        overrides = importlib.import_module("stages.overrides")  # which imports no torch
    finally:
        sys.path.remove(str(root))
    if said := overrides.refusal(root / "conf", arguments):
        raise ValueError(said)


def keep_other_studies(root: Path) -> None:
    """Give every stored result a new modification time, without changing it.

    `dvc exp run` deletes what it once restored from its cache and the current parameters do not mention: another
    study's results. It spares what was modified since it was restored.
    """
    for pattern in ("tokens/*", "results/*/*", "results/*/test/*"):
        for path in root.glob(pattern):
            files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
            for file in files[:1]:
                os.utime(file)


def _is_news(record: logging.LogRecord) -> bool:
    """False for DVC's warning that an output was never made: of a new study that is all of them, and no news."""
    return not str(record.msg).startswith("No file hash info found for")


class GuardResults(SearchPathPlugin):
    """Hydra calls this at the start of each composition."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from dvc.exceptions import DvcException  # which DVC reports as it is, with exit status 255

        root = Path(__file__).resolve().parents[2]
        try:
            refuse_busy(root, sys.argv)
            refuse_unknown(root, sys.argv)
            refuse_edited(root / "params.yaml")
        except ValueError as error:
            raise DvcException(str(error)) from None
        keep_other_studies(root)
        logging.getLogger("dvc_data.index.checkout").addFilter(_is_news)  # the same filter is added once


OmegaConf.register_new_resolver("grid_runs", _grid_runs, replace=True)
OmegaConf.register_new_resolver("selected_runs", _selected_runs, replace=True)
OmegaConf.register_new_resolver("stamp", _stamp_root, replace=True)
