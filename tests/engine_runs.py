"""Helpers that run the engine on a small text, in this process or as a user would start it.

They must not know what a run should come out with: the expectations are in the tests.
"""

import csv
import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import tomli_w

from engine.config import SETTINGS, Config, resolve

REPOSITORY = Path(__file__).resolve().parents[1]
TIMINGS = (
    "step_seconds",
    "tokens_per_second",
    "samples_per_second",
    "data_wait_seconds",
    "peak_memory_gib",
)  # of two equal runs
SMALL = {
    "device": "cpu",
    "dataset": "text",
    "data_dir": "text",
    "layers": 2,
    "heads": 2,
    "width": 32,
    "context": 16,
    "steps": 6,
    "batch_size": 4,
    "eval_batch_size": 8,
}
# A model of dialogues, with what its data needs; the directory is write_dialogues'.
TALKING = {
    "study": "talking",
    "model": "double_heads",
    "dataset": "dialogues",
    "data_dir": "dialogues",
    "candidates": 4,
    "max_reply_tokens": 32,
    "length_percentile": 100.0,
    "context": 176,
}
# Settings that an optimizer cannot be without.
NEEDS = {"adamwprune": {"pruning": "state", "pruning_interval": 1}}
WORDS = """a and are as at bear bird by cold day fish for from green hill in is it lake long moss night
not of on or owl rain red river run see sky snow stone sun that the tree was water wind with wolf wood"""


def prose(seed: int, words: int) -> str:
    """Sentences of random words, one a line, always the same for the same seed."""
    draw = random.Random(seed)
    vocabulary, lines, left = WORDS.split(), [], words
    while left > 0:
        sentence = [draw.choice(vocabulary) for _ in range(min(left, draw.randint(4, 11)))]
        lines.append(" ".join(sentence).capitalize() + ".\n")
        left -= len(sentence)
    return "".join(lines)


def write_text(directory: Path) -> Path:
    """A data set directory for dataset = "text"; its validation text fills no whole number of windows."""
    directory.mkdir()
    for seed, (name, words) in enumerate({"train": 3000, "valid": 150, "test": 120}.items()):
        (directory / f"{name}.txt").write_text(prose(seed, words), encoding="utf-8")
    return directory


def dialogues(seed: int, count: int, replies: int = 3) -> list[dict]:
    """Dialogues in which the second speaker says what its persona has; always the same for the same seed."""
    draw, vocabulary, found = random.Random(seed), WORDS.split(), []
    for _ in range(count):
        own = draw.sample(vocabulary, 2)
        turns = []
        for _ in range(replies):
            turns.append(f"what of the {draw.choice(vocabulary)} ?")
            turns.append(f"i like {draw.choice(own)} and {draw.choice(vocabulary)} .")
        found.append({"persona": [f"i like {word} ." for word in own], "turns": turns})
    return found


def write_dialogues(directory: Path, **counts: int) -> Path:
    """A data set directory for dataset = "dialogues"; its evaluations do not come out even."""
    directory.mkdir()
    for seed, (name, count) in enumerate(({"train": 40, "valid": 7, "test": 5} | counts).items()):
        lines = "".join(json.dumps(one) + "\n" for one in dialogues(seed, count))
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def toml(**values) -> str:
    """A run's TOML file with these settings, each under its own table."""
    tables = {}
    for name, value in values.items():
        tables.setdefault(SETTINGS[name].section, {})[name] = value
    return tomli_w.dumps(tables)


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, as text: floats were written exactly, so equal text means equal bits."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def untimed(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file without what the clock says."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(path)]


def column(run: Path, name: str) -> list[float]:
    """One column of a run's steps.csv."""
    return [float(row[name]) for row in rows(run / "steps.csv")]


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def ledger(run: Path) -> dict[str, dict]:
    """A run's ledger by what each line is about."""
    return {entry["what"]: entry for entry in read_json(run / "ledger.json")["entries"]}


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def matrix_products(counts: dict[str, int]) -> int:
    """Calls of matrix products among those of an engine.operations.Operations, forward and backward."""
    names = ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "_scaled_mm")
    return sum(counts.get(f"aten::{name}", 0) for name in names)


def weights(run: Path) -> dict:
    """A run's final weights, by name."""
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def assert_same_weights(run: dict, other: dict) -> None:
    """The same names and the same bits."""
    import torch

    assert run.keys() == other.keys()
    different = [name for name in run if not torch.equal(run[name], other[name])]
    assert not different


class Lab:
    """A directory in which runs are trained. Settings are those of SMALL unless a call changes them."""

    server = None  # a ForkServer, for `launch`: the GPU tests have one

    def __init__(self, directory: Path):
        self.directory = directory
        write_text(directory / "text")

    def config(self, **changes) -> Config:
        return resolve({**SMALL, **changes}, "test")

    def train(self, **changes) -> Path:
        """Train in this process, whose working directory must be the lab; the run's directory."""
        from engine.launch import tokens_for
        from engine.trainer import run

        config = self.config(**changes)
        gc.freeze()  # a run collects garbage before its second step: its own, not also all that pytest holds
        run(config, tokens_for(config))
        return config.directory

    def file(self, **changes) -> str:
        """Write the run's TOML file; its name."""
        (self.directory / "run.toml").write_text(toml(**{**SMALL, **changes}), encoding="utf-8")
        return "run.toml"

    def command(self, *arguments: str, processes: int = 1) -> list[str]:
        """The command line that starts `arguments` (`-m MODULE …` or `FILE.py …`) in so many processes."""
        launcher = (
            []
            if processes == 1
            else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        )
        return [sys.executable, *launcher, *arguments]

    def environment(self, **changes: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",  # else gloo asks for the host's own name, and may wait for an answer
            "PLUMBLINE_CHECKPOINTS": str(self.directory / "checkpoints"),
            **changes,
        }

    def start(self, *arguments: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
        """Run a command in the lab to its end."""
        return subprocess.run(
            self.command(*arguments, processes=processes),
            cwd=self.directory,
            check=False,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=240,
        )

    def launch(self, processes: int = 1, **changes) -> Path:
        """Train as a user does: `python -m engine.train FILE` or torchrun; the run's directory."""
        config, file, done = self.config(**changes), self.file(**changes), None
        if self.server and processes == 1:
            done = self.server.train(config, file, self.directory, self.environment())
        if done is None:
            done = self.start("-m", "engine.train", file, processes=processes)
        assert done.returncode == 0, done.stderr
        return self.directory / config.directory
