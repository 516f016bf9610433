"""The summarize stage as it is called: files, terminal, exit codes."""

import csv
import json
import shutil

import pytest
from fake_results import write_run, write_study

from stages import summarize


def test_writes_every_file_and_prints_the_table(tmp_path, capsys):
    results, reports = write_study(tmp_path), tmp_path / "reports" / "quickstart"
    (reports / "metrics").mkdir(parents=True)
    (reports / "metrics" / "gone.json").write_text("{}")  # of a run that the study had before
    assert summarize.main([str(results), str(reports)]) == 0
    names = {path.relative_to(reports).as_posix() for path in reports.rglob("*") if path.is_file()}
    runs = {f"metrics/{run}.json" for run in ("adamw", "adamw-checkpointing", "sgd")}
    assert names == runs | {"curves.csv", "bars.csv", "table.md", "table.csv", "report.html"}
    row = json.loads((reports / "metrics" / "sgd.json").read_text())
    assert row["seeds"] == 3
    assert row["verdict"] == "worse"
    assert row["in_effect"] == "as requested"
    curves = list(csv.DictReader((reports / "curves.csv").read_text().splitlines()))
    assert len(curves) == 600  # 300 steps thinned to 200 in each of 3 runs
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 110  # the last line is the report's path
    assert "identical" in printed
    assert f"Report: {reports / 'report.html'}" in printed


def test_unfinished_run_is_listed_without_numbers(tmp_path, capsys):
    results, reports = write_study(tmp_path), tmp_path / "reports"
    for seed in (1, 2, 3):
        (results / f"sgd-{seed}" / "metrics.json").unlink()
    assert summarize.main([str(results), str(reports)]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed if line.strip().startswith("sgd ")]
    assert rows == [["sgd", "0", "of", "3", "–", "–", "–", "incomplete", "–", "–"], ["sgd"] + ["–"] * 6]
    assert "* sgd: seeds 1, 2, 3: incomplete: interrupted or still running (no metrics.json)" in printed
    table = (reports / "table.md").read_text()
    assert "| sgd | 0 of 3 | – | – | – | incomplete |" in table


def test_every_table_marks_what_did_not_go_as_requested(tmp_path, capsys):
    results, reports = write_study(tmp_path), tmp_path / "reports"
    write_run(results, "sgd", 2, agrees=False)
    assert summarize.main([str(results), str(reports)]) == 0
    words = "compile: requested true, in effect false (seed 2)"
    assert f"* sgd: not as requested: {words}" in capsys.readouterr().out
    assert f"- sgd: not as requested: {words}" in (reports / "table.md").read_text()
    assert f"sgd: not as requested: {words}" in (reports / "report.html").read_text()
    rows = {row["run"]: row for row in csv.DictReader((reports / "table.csv").read_text().splitlines())}
    assert rows["sgd"]["not_as_requested"] == words and rows["adamw"]["not_as_requested"] == ""
    in_effect = {
        path.stem: json.loads(path.read_text())["in_effect"] for path in (reports / "metrics").glob("*")
    }
    others = dict.fromkeys(("adamw", "adamw-checkpointing"), "as requested")
    assert in_effect == others | {"sgd": words}


@pytest.mark.parametrize("unfinished", [False, True])
def test_nothing_to_summarize_exits_2(tmp_path, capsys, unfinished):
    results, reports = tmp_path / "results" / "quickstart", tmp_path / "reports"
    if unfinished:
        write_study(tmp_path)
        for home in results.glob("*-[123]"):
            shutil.rmtree(home)
    assert summarize.main([str(results), str(reports)]) == 2
    message = capsys.readouterr().err
    expected = "adamw-1: missing, has not run" if unfinished else "Run `dvc repro` first"
    assert expected in message
    assert not reports.exists()


def test_wrong_command_line_exits_2(capsys):
    assert summarize.main(["results/x"]) == 2
    assert "usage: python -m stages.summarize" in capsys.readouterr().err
