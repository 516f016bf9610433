"""A copy of this checkout in a temporary directory, with its own git history and a study that takes seconds."""

import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

STUDY = """\
# @package _global_
study: {name}
question: Does a larger learning rate help?
baseline: base
metric: test_loss
seeds: [1]
runs:
  base: {{}}
{more}dataset: text
data_dir: {data}
layers: 1
heads: 1
width: 16
context: 16
steps: 4
batch_size: 4
lr: 0.01
eval_interval: 4
log_interval: 2
"""


def prose(first: int, words: int = 2000) -> str:
    """Deterministic text, different for every `first`."""
    return "\n".join(
        " ".join(str((first + 7 * i + j * j) % 977) for j in range(10)) for i in range(words // 10)
    )


@dataclass
class Sandbox:
    """A repository to run commands in."""

    path: Path

    def environment(self) -> dict[str, str]:
        """The environment of a command run here: this Python first, checkpoints inside, no DVC statistics."""
        bin_directory = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
            "PLUMBLINE_CHECKPOINTS": str(self.path / ".checkpoints"),
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",  # of models this small more threads only cost time
            "COLUMNS": "200",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment.pop("PYTHONPATH", None)
        return environment

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command; return stdout and stderr together; fail the test on another exit status."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == status, f"{' '.join(command)} → {done.returncode}\n{done.stdout}"
        return done.stdout

    def experiment(self, *overrides: str, status: int = 0) -> str:
        """`dvc exp run` with -S overrides."""
        return self.run("dvc", "exp", "run", *[x for o in overrides for x in ("-S", o)], status=status)

    def steps(self, run: str) -> list[dict]:
        """The rows of a run's steps.csv in study tiny."""
        with (self.path / "results/tiny" / run / "steps.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text, encoding="utf-8")


def ran(output: str) -> set[str]:
    """The stages that DVC says it ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def build(path: Path) -> Sandbox:
    """A sandbox in the empty directory `path`, with one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, listed):
        if not name.startswith(("tests/", "docs/", "records/", "results/", "reports/", "dvc.lock")):
            source = ROOT / name
            if source.exists():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path / name)
    box = Sandbox(path)
    for split, first in (("train", 1), ("valid", 300), ("test", 600)):
        box.write(f".text/{split}.txt", prose(first))
    for name, more in (("tiny", "  own_lr: {lr: 0.02}\n"), ("other", "")):
        box.write(f"conf/study/{name}.yaml", STUDY.format(name=name, data=path / ".text", more=more))
    for command in (
        ["init", "-q"],
        ["config", "user.name", "A. User"],
        ["config", "user.email", "user@localhost"],
        ["add", "-A"],
        ["commit", "-qm", "start"],
    ):
        box.run("git", *command)
    return box
