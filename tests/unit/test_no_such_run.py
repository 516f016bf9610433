"""A directory that is not there, or is no run's: every command that wants one says what may have been meant."""

import sys
from pathlib import Path

import pytest

from engine import chat, evaluate, export, generate, hits
from engine.errors import ConfigError
from engine.rundir import make_anew, read_outcome

COMMANDS = {
    "chat": (chat, ["--persona", "persona.txt"]),
    "evaluate": (evaluate, ["test", "out.json"]),
    "export": (export, ["out"]),
    "generate": (generate, ["--prompt", "a"]),
    "hits": (hits, ["--output", "out.json"]),
}
INCOMPLETE = "no metrics.json: the run is not complete, so there is no final model"


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """results/letters with two complete runs, one that is not, and what else a study has there."""
    monkeypatch.chdir(tmp_path)
    study = Path("results/letters")
    for name in ("adamw-1", "adamw-2", "sgd-1"):
        make_anew(study / name)
        if name != "sgd-1":
            (study / name / "metrics.json").write_text("{}")
    for name in ("configs", "test"):
        (study / name).mkdir()
    (study / "configs/adamw-1.toml").touch()
    return study


def said(directory: str | Path) -> str:
    with pytest.raises(ConfigError, match="1 problem in ") as raised:
        read_outcome(Path(directory))
    assert raised.value.where == str(Path(directory))
    return raised.value.problems[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_so_in_one_message(study, monkeypatch, capsys, name):
    module, arguments = COMMANDS[name]
    runs = "its runs are adamw-1, adamw-2: name one of them, as in results/letters/adamw-1"
    for directory, problem in (
        ("results/letters", f"is a study's directory; {runs}"),
        ("results/letters/adamw-3", "no such directory (nearest: results/letters/adamw-2)"),
        ("results/letters/sgd-1", INCOMPLETE),
    ):
        monkeypatch.setattr(sys, "argv", [name, directory, *arguments])
        with pytest.raises(SystemExit, match="2"):
            module.main()
        assert capsys.readouterr().err == f"error: 1 problem in {directory}:\n  - {problem}\n"
    assert not Path("out").exists() and not Path("out.json").exists()


def test_the_nearest_of_what_is_there_is_named(study):
    assert said("results/letters/adamw") == "no such directory (nearest: results/letters/adamw-2)"
    assert said("results/leters/adamw-1") == "no such directory (nearest: results/letters/adamw-1)"
    assert said("results/leters/lion-1") == "no such directory (nearest: results/letters)"
    assert said("letters/adamw-1") == "no such directory"
    assert said(study.absolute() / "sdg-1") == f"no such directory (nearest: {study.absolute() / 'sgd-1'})"


def test_where_no_name_is_near_the_runs_are_named(study):
    runs = "its runs are adamw-1, adamw-2: name one of them, as in results/letters/adamw-1"
    assert said("results/letters/xyz") == f"no such directory; results/letters is a study's directory: {runs}"


def test_a_study_without_complete_runs(study):
    for name in ("adamw-1", "adamw-2"):
        (study / name / "metrics.json").unlink()
    runs = "none of its runs is complete: adamw-1, adamw-2, sgd-1"
    assert said(study) == f"is a study's directory; {runs}"
    Path("results/planned/configs").mkdir(parents=True)
    assert said("results/planned") == (
        "is a study's directory, of which no run was started; `dvc exp run` trains them"
    )


def test_of_many_runs_the_first_are_named(study):
    for seed in range(3, 12):
        make_anew(study / f"adamw-{seed}")
        (study / f"adamw-{seed}" / "metrics.json").write_text("{}")
    assert "its runs are adamw-1, adamw-10, " in said(study) and "adamw-6 and 3 more: name one" in said(study)


def test_what_is_no_run_is_told(study):
    assert said("results") == "is no run's directory: it has neither metrics.json nor config.toml"
    assert said("results/letters/configs/adamw-1.toml") == "is a file; a run's directory is wanted"
