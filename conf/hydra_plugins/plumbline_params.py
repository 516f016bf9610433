"""Keeps a hand edit of params.yaml from being lost when DVC composes conf/ over it.

DVC loads this file before it composes. It stamps the composed values with a fingerprint, in the file's first key,
and refuses to compose over a params.yaml whose values no longer match their stamp. It must not change any value.
"""

import hashlib
import json
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import Container, OmegaConf

KEY = "_composed_"
NOTE = "by DVC from conf/; hand edits are refused, see README"


def stamp(values: dict) -> str:
    """The note with a fingerprint of all other values."""
    rest = {k: v for k, v in values.items() if k != KEY}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:12]
    return f"{NOTE} ({digest})"


def _stamp_root(*, _root_: Container) -> str:
    values = {k: _root_[k] for k in _root_ if k != KEY}
    return stamp({k: OmegaConf.to_container(v, resolve=True) if isinstance(v, Container) else v
                  for k, v in values.items()})


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
            "Then, to let DVC write the file again: git checkout params.yaml")


class GuardParams(SearchPathPlugin):
    """Hydra calls this at the start of each composition."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        refuse_edited(Path(__file__).resolve().parents[2] / "params.yaml")


OmegaConf.register_new_resolver("stamp", _stamp_root, replace=True)
