"""How the train stage starts the engine and shows it."""

import io
import sys

from rich.console import Console

from engine import children
from stages.train import parsed, show

LINES = [
    '{"event": "step", "step": 2, "steps": 4, "train_loss": 3.25, "tokens_per_second": 1200}\n',
    "a word from torch\n",
    '{"event": "step", "step": 4, "steps": 4, "train_loss": 2.5, "tokens_per_second": 1300}\n',
]


def test_one_process_needs_no_launcher_and_several_use_torchrun():
    assert children.training("run.toml", 0) == [sys.executable, "-m", "engine.train", "run.toml"]
    several = children.training("run.toml", 3)
    assert several[1:3] == ["-m", "torch.distributed.run"]
    assert several[-5:] == ["--nproc-per-node", "3", "-m", "engine.train", "run.toml"]


def test_only_json_objects_are_progress():
    assert parsed('{"step": 1}') == {"step": 1}
    assert parsed("[1]") == {} and parsed("a word") == {}


def test_without_a_terminal_lines_are_passed_on(capsys):
    show(LINES, Console(file=io.StringIO()), "adamw, seed 1", 4)
    assert capsys.readouterr().out == "".join(LINES)


def test_on_a_terminal_there_is_a_bar_with_the_newest_figures():
    screen = io.StringIO()
    show(LINES, Console(file=screen, force_terminal=True, width=120), "adamw, seed 1", 4)
    text = screen.getvalue()
    assert "adamw, seed 1" in text and "4/4" in text and "loss 2.500  1,300 tokens/s" in text
    assert "a word from torch" in text
