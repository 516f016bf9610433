"""A study's figures over the commits and experiments of a small repository, nothing checked out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from metrics import history as figures_of
from plots import history as pages
from stages import history

ROOT = Path(__file__).resolve().parents[2]
DAY = 86_400  # seconds


class Repository:
    """Commits with given figures, a day apart from the first of January 2026 on."""

    def __init__(self, path):
        self.path, self.days = path, 0
        path.mkdir()
        self.git("init", "-q", "-b", "main")
        self.git("commit", "-q", "--allow-empty", "-m", "start")

    def git(self, *arguments):
        date = f"{1_767_225_600 + self.days * DAY} +0000"
        who = {
            f"GIT_{role}_{what}": "user@localhost"
            for role in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.path,
            env=os.environ | who | dates,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def write(self, **runs):
        """run = (test loss, tokens/s, GiB, verdict)"""
        for run, (loss, speed, memory, verdict) in runs.items():
            path = self.path / "reports" / "tiny" / "metrics" / f"{run}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"test_loss": loss, "tokens_per_second": speed, "peak_memory_gib": memory}
            path.write_text(json.dumps(found | {"seeds": 3, "verdict": verdict}))

    def commit(self, subject, **runs):
        self.days += 1
        self.write(**runs)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", subject)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two runs; one of them faster; something else; an experiment from there; what is not committed."""
    made = Repository(tmp_path / "lab")
    made.commit("First", base=(2.5, 100, 2.0, "baseline"), muon=(2.25, 80, 1.5, "better"))
    made.commit("A faster base", base=(2.5, 150, 2.0, "baseline"))
    base = made.commit("Words only")
    made.commit("tried", muon=(2.0, 80, 1.5, "better"))
    made.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/witty-lark", "HEAD")
    for own in ("exec/EXEC_HEAD", "temp/of/dvc"):  # no experiments
        made.git("update-ref", f"refs/exps/{own}", "HEAD")
    made.git("reset", "-q", "--hard", base)
    made.write(base=(2.375, 150, 1.0, "baseline"))
    monkeypatch.chdir(made.path)
    return made


def told(repository, *more):
    done = subprocess.run(
        [sys.executable, "-m", "stages.history", *more],
        cwd=repository.path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_row_where_the_figures_of_a_run_changed(repository):
    found = figures_of.changes(history.revisions(Path("reports/tiny")), "test_loss")
    assert [
        (one.revision.says, one.revision.date, one.run, one.value, one.difference, one.speed) for one in found
    ] == [
        ("First", "2026-01-02", "base", 2.5, None, 100),
        ("First", "2026-01-02", "muon", 2.25, None, 80),
        ("A faster base", "2026-01-03", "base", 2.5, 0.0, 150),
        (f"experiment from {repository.git('rev-parse', 'HEAD')[:7]}", "2026-01-05", "muon", 2.0, -0.25, 80),
        ("what is not committed", "now", "base", 2.375, -0.125, 150),
    ]
    assert [one.revision.name for one in found[3:]] == ["witty-lark", "workspace"]
    assert [one.revision.aside for one in found] == [False, False, False, True, False]
    assert (
        repository.git("status", "--short") == "M reports/tiny/metrics/base.json"
    )  # nothing was checked out


def test_the_first_against_the_last_leaves_experiments_out(repository):
    found = figures_of.changes(history.revisions(Path("reports/tiny")), "test_loss")
    [(old, new)] = figures_of.ends(found)  # muon was measured once, apart from the experiment
    assert figures_of.then_and_now(old, new, "test_loss") == (
        f"base, {old.revision.name} → workspace: test loss 2.500 → 2.375 (-0.1250 nats/token), speed 1.50 ×, peak "
        "memory 0.50 ×"
    )


def test_an_experiment_that_was_committed_is_told_once(repository):
    repository.git("checkout", "-q", "--", ".")
    repository.commit("The lark", muon=(2.0, 80, 1.5, "better"))
    found = figures_of.changes(history.revisions(Path("reports/tiny")), "test_loss")
    assert [(one.revision.says, one.difference) for one in found if one.value == 2.0] == [("The lark", -0.25)]


def test_a_merge_is_one_revision_of_the_branch(repository):
    repository.git("checkout", "-q", "--", ".")
    repository.git("checkout", "-q", "-b", "side")
    repository.commit("on the side", base=(2.4, 150, 2.0, "baseline"))
    repository.commit("on the side again", base=(2.3, 150, 2.0, "baseline"))
    repository.git("checkout", "-q", "main")
    repository.days += 1
    repository.git("merge", "-q", "--no-ff", "-m", "Merge the side", "side")
    found = figures_of.changes(history.revisions(Path("reports/tiny")), "test_loss")
    assert [one.revision.says for one in found if one.run == "base"] == [
        "First",
        "A faster base",
        "Merge the side",
    ]
    assert found[-1].difference == pytest.approx(-0.2)


def test_the_command_prints_table_revisions_ends_and_draws(repository):
    status, said = told(repository, "tiny", "--chart", "history.svg")
    assert status == 0, said
    assert "reports/tiny: 5 changes of a run's figures in 4 revisions" in said
    assert [
        word for word in ("test loss", "-0.1250", "better", "baseline", "2026-01-03") if word not in said
    ] == []
    assert ", 2026-01-03: A faster base" in said and "witty-lark, 2026-01-05: experiment from" in said
    assert "test loss 2.500 → 2.375 (-0.1250 nats/token), speed 1.50 ×" in said and "no interval" in said
    svg = (repository.path / "history.svg").read_text()
    assert svg.startswith("<svg") and "witty-lark" in svg and "test loss (nats/token)" in svg
    status, said = told(repository, "reports/tiny", "--metric", "peak_memory_gib")
    assert status == 0 and "peak memory 2.000 → 1.000 (-1.000 GiB)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["other"],
            "in reports/other:\n  - no commit, experiment or workspace has its figures; run it, and commit",
        ),
        (["tiny", "--metric", "tets_loss"], "--metric = 'tets_loss': must be one of test_loss, "),
        (["tiny", "--metric", "tets_loss"], "(nearest: test_loss)"),
        (
            ["tiny", "--metric", "val_accuracy"],
            "must be one of test_loss, tokens_per_second, peak_memory_gib",
        ),
    ],
)
def test_what_is_not_there_is_named(repository, arguments, message):
    status, said = told(repository, *arguments)
    assert status == 2 and message in said and "Traceback" not in said


def test_a_malformed_file_of_a_commit_is_named(repository):
    (repository.path / "reports/tiny/metrics/base.json").write_text("{test_loss: 1")
    commit = repository.commit("broken")
    with pytest.raises(
        ConfigError, match=rf"{commit[:7]}:reports/tiny/metrics/base.json:\n  - is not valid JSON"
    ):
        history.revisions(Path("reports/tiny"))


def test_outside_a_repository_git_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match="not a git repository"):
        history.revisions(Path("reports/tiny"))


def revision(name, runs, before=None, aside=False):
    return figures_of.Revision(name, "2026-01-01", "", runs, before or {}, aside)


def test_a_run_that_has_not_run_is_no_change_and_one_that_diverged_is():
    missing, lost = {"seeds": 0, "verdict": "missing"}, {"seeds": 0, "verdict": "diverged"}
    then, now = {"a": missing}, {"a": lost, "b": missing}
    found = figures_of.changes([revision("1", then), revision("2", now, then)], "test_loss")
    assert [(one.revision.name, one.run, one.value, one.verdict) for one in found] == [
        ("2", "a", None, "diverged")
    ]
    assert figures_of.ends(found) == [] and figures_of.frame(found, "test_loss").is_empty()


def test_the_figure_of_the_study_is_the_first_of_its_files():
    runs = {"a": {"verdict": "missing"}, "b": {"val_loss": 1.0, "test_loss": 2.0, "verdict": "better"}}
    assert figures_of.figures([revision("1", runs)]) == ("val_loss", "test_loss")
    assert figures_of.figures([revision("1", {"a": {"verdict": "missing"}})]) == ()


def test_shares_are_in_percent_and_words_are_no_numbers():
    then = {"a": {"test_accuracy": 0.90}, "b": {"test_accuracy": "not finite"}}
    now = {"a": {"test_accuracy": 0.915}, "b": {"test_accuracy": 0.5}}
    found = figures_of.changes([revision("1", then), revision("2", now, then)], "test_accuracy")
    heads, rows = pages.table(found, "test_accuracy")
    assert heads[3] == "test accuracy (%)"
    assert [row[3:5] for row in rows] == [["90.00", "–"], ["–", "–"], ["91.50", "+1.500"], ["50.00", "–"]]
    frame = figures_of.frame(found, "test_accuracy")
    assert frame["value"].to_list() == pytest.approx([90.0, 91.5, 50.0]) and frame["place"].to_list() == [
        0,
        1,
        1,
    ]
    [(old, new)] = figures_of.ends(found)
    said = "a, 1 → 2: test accuracy 90.00 → 91.50 (+1.500 percentage points)"
    assert figures_of.then_and_now(old, new, "test_accuracy") == said


def test_the_chart_has_no_line_through_experiments():
    runs = [{"a": {"test_loss": value}} for value in (3.0, 2.0, 1.0)]
    found = figures_of.changes(
        [
            revision("1", runs[0]),
            revision("tried", runs[1], runs[0], aside=True),
            revision("2", runs[2], runs[0]),
        ],
        "test_loss",
    )
    spec = pages.timeline(figures_of.frame(found, "test_loss"), "title", "test loss").to_dict()
    line, kept, tried = spec["layer"]
    assert [layer["mark"]["type"] for layer in (line, kept, tried)] == ["line", "circle", "point"]
    filters = [layer["transform"][0]["filter"] for layer in (line, kept, tried)]
    assert filters == ["!datum.aside", "!datum.aside", "datum.aside"]
    assert line["encoding"]["x"]["sort"] == ["1", "tried", "2"]
