"""Who may import whom: every import statement in the tree, and what a settings check really loads.

ruff says the same with each room's reasons (`banned-api`); this test needs no ruff, and sees the directions
as a whole.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import REPOSITORY
from ruamel.yaml import YAML

ROOMS = {  # room: the rooms it may import
    "stages": {"engine", "metrics", "plots"},
    "engine": set(),
    "metrics": set(),
    "plots": {"metrics"},
    "benchmarks": {"engine"},
}
FOREIGN = {  # library: the only places that may import it, by path from the repository
    "torch": ["engine/", "benchmarks/"],
    "torchtitan": ["engine/titan.py", "benchmarks/peers/titan.py"],
    "transformers": ["benchmarks/peers/hf.py"],
    "torch.distributed": [
        "engine/memory.py",  # its wrapper for activation checkpointing
        "engine/parallel.py",
        "engine/tensor_parallel.py",
        "engine/titan.py",
        "engine/checkpoint.py",
        "engine/outcome.py",
        "engine/preflight.py",
        "engine/split.py",
    ],
    "torch.testing": ["engine/titan.py"],
    "dvc": [],
    "hydra": [],
    "altair": ["plots/"],
    "vl_convert": ["plots/"],
    "scipy": ["metrics/"],
    "polars": ["metrics/", "plots/"],
    "rich": ["stages/"],
    "ruamel": ["stages/"],
    "datasets": ["engine/data/", "benchmarks/peers/titan.py"],
    "pyarrow": ["engine/data/parquet.py"],
    "tokenizers": ["engine/data/"],
    "safetensors": ["engine/"],
}
FILES = sorted(path.relative_to(REPOSITORY) for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module that a file imports, wherever in it, with its full name; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its room"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_the_rooms_are_where_they_are_looked_for():
    assert {path.parts[0] for path in FILES} == set(ROOMS) and len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_room_may(path):
    own = path.parts[0]
    for name in imports(path):
        room = name.split(".")[0]
        assert room == own or room not in ROOMS or room in ROOMS[own], f"{own} must not import {name}"
        for library, allowed in FOREIGN.items():
            if name == library or name.startswith(library + "."):
                assert path.as_posix().startswith(tuple(allowed)), f"{path} must not import {name}"


def test_the_check_sees_imports_inside_functions_and_of_parts(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import torch.nn as nn\ndef f():\n    from torch import distributed\n    import polars\n")
    assert imports(path) == ["torch.nn", "torch.distributed", "polars"]


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import engine.config", {"torch", "torchtitan", "numpy", "polars", "tokenizers"}),
        ("import engine.launch", {"torch", "torchtitan", "tokenizers", "datasets"}),
        ("import stages.plan", {"torch", "torchtitan", "numpy", "polars", "altair", "dvc"}),
        ("import stages.train", {"torch", "torchtitan", "polars", "altair", "dvc"}),
        ("import stages.summarize", {"torch", "torchtitan", "dvc"}),
        ("import metrics.statistics, metrics.summary", {"torch", "altair", "engine", "stages"}),
        ("import plots.report", {"torch", "engine", "stages"}),
    ],
)
def test_a_module_loads_no_library_that_it_does_not_need(statement, absent):
    assert not loaded_by(statement) & absent


def test_dvc_plans_again_when_a_file_changes_that_settings_depend_on():
    code = (
        "import stages.plan, sys; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith(('engine.', 'metrics.', 'stages.'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = {Path(file).relative_to(REPOSITORY).as_posix() for file in done.stdout.split()}
    stages = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert set(stages["plan"]["deps"]) == loaded | {"conf/preset"}  # which it reads


def test_the_defaults_that_people_override_are_the_declared_ones():
    """`-S NAME=VALUE` works only for keys in that file. Regenerate it: python -m stages.plan --defaults"""
    from stages.plan import defaults_yaml

    assert (REPOSITORY / "conf/defaults.yaml").read_text(encoding="utf-8") == defaults_yaml()


def test_no_two_test_files_have_one_name():
    """`pytest` in one process, as in `make check`, can collect only one of them."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
