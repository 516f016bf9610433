"""The summarize stage as it is called: files, terminal, exit codes."""

import csv
import json
import re
import shutil

import pytest
from engine_runs import REPOSITORY
from fake_results import write_json, write_run, write_study
from ruamel.yaml import YAML

from metrics import rows, summary
from stages import summarize


def test_writes_every_file_and_prints_the_table(tmp_path, capsys):
    results, reports = write_study(tmp_path), tmp_path / "reports" / "quickstart"
    (reports / "metrics").mkdir(parents=True)
    (reports / "metrics" / "gone.json").write_text("{}")  # of a run that the study had before
    assert summarize.main([str(results), str(reports)]) == 0
    names = {path.relative_to(reports).as_posix() for path in reports.rglob("*") if path.is_file()}
    runs = {f"metrics/{run}.json" for run in ("adamw", "adamw-checkpointing", "sgd")}
    charts = {"curves.csv", "validation.csv", "bars.csv", "trade_off.csv"}
    assert names == runs | charts | {"table.md", "table.csv", "table.tex", "report.html", "epochs.csv"}
    row = json.loads((reports / "metrics" / "sgd.json").read_text())
    assert row["seeds"] == 3
    assert row["verdict"] == "worse"
    assert row["in_effect"] == "as requested"
    curves = list(csv.DictReader((reports / "curves.csv").read_text().splitlines()))
    assert len(curves) == 600  # 300 steps thinned to 200 in each of 3 runs
    assert {"lr", "lr_low", "lr_high"} <= curves[0].keys()
    validation = list(csv.DictReader((reports / "validation.csv").read_text().splitlines()))
    assert [row["step"] for row in validation if row["run"] == "sgd"] == [
        "50",
        "100",
        "150",
        "200",
        "250",
        "300",
    ]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 110  # the last line is the report's path
    assert "identical" in printed
    assert f"Report: {reports / 'report.html'}" in printed


@pytest.mark.parametrize(("columns", "width"), [(60, 110), (110, 110), (150, 150)])
def test_a_narrow_terminal_folds_lines_and_loses_nothing(tmp_path, capsys, monkeypatch, columns, width):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert summarize.terminal().width == width
    assert summarize.main([str(write_study(tmp_path)), str(tmp_path / "reports")]) == 0
    printed = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    rows = [line for line in printed.splitlines() if line.split()[:1] == ["adamw-checkpointing"]]
    assert len(rows) == 2 and all(len(row.split()) >= 7 for row in rows) and "…" not in printed


def test_every_run_name_stands_in_every_part_of_a_wide_table(tmp_path, capsys):
    names = ["adamw", "adamwprune_bitter10z_longer", "a_run_of_another_name"]
    asked = {"perplexity_at": list(range(51, 302, 50)) * 2, "targets": [2.5]}
    results = write_study(tmp_path, runs=dict.fromkeys(names, {}), **asked)
    summarize.show(summarize.terminal(), summary.summarize(rows.read(results)))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110 and "…" not in printed
    tables = [part.split("\n\n")[0].splitlines() for part in re.split("─{20,}", printed)[1:]]
    tables = [[line.split() for line in lines if line.strip()] for lines in tables]
    assert len(tables) >= 6  # quality, cost, on the way in three parts, course, equal seconds, target
    assert [[row[0] for row in table[: len(names)]] for table in tables] == [names] * len(tables)
    assert printed.count("On the way: ") == 1 and printed.count("On the way (continued)") == 2


def test_words_fold_where_a_table_is_too_wide_and_numbers_never_do(capsys):
    why = "not at its target sparsity yet, nor near to it, and of another model"
    rows = [["a" * 60, "5.10 ± 0.02 of 7", why], ["b", "–", "–"]]
    summarize.show_table(summarize.terminal(), "T", (["run", "loss", "verdict"], rows))
    printed = capsys.readouterr().out
    assert "5.10 ± 0.02 of 7" in printed and max(map(len, printed.splitlines())) <= 110
    assert "".join(printed.split()).count("a" * 55) == 1 and "not at its target" in printed


def test_a_part_of_a_wide_table_says_which_row_and_of_what_a_ratio_is():
    cells = [["a", "8", *"xyz"], ["a", "16", *"xyz"]]
    wide = [[cell * 30 if cell in "xyz" else cell for cell in line] for line in cells]
    parts = summarize._parts((["run", "tokens", "loss", "time", "ratio"], wide), 110)
    assert [heads for heads, _ in parts] == [["run", "tokens", "loss"], ["run", "tokens", "time", "ratio"]]
    assert parts[1][1][1] == ["a", "16", "y" * 30, "z" * 30]
    assert summarize._parts((["run", "tokens", "loss"], [["a", "8", "1"]]), 110)[0][0] == [
        "run",
        "tokens",
        "loss",
    ]


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


def test_runs_that_are_not_ranked_are_readable_in_a_terminal(tmp_path, capsys):
    names = {"not_like_it": {}, "impossible": {}, "gone": {}, "a_name_of_more_than_thirty_characters": {}}
    results = write_study(tmp_path, runs={"adamw": {}} | names, frozen=["lr"])
    for seed in (1, 2, 3):
        with (results / f"not_like_it-{seed}" / "config.toml").open("a") as config:
            config.write("lr = 0.5\n")
        write_json(results / f"impossible-{seed}" / "env.json", {"device_memory_gib": 0.25})
        write_json(
            results / f"gone-{seed}" / "metrics.json",
            {"status": "diverged", "step": 7, "reason": "loss 9 > 3"},
        )
    assert summarize.main([str(results), str(tmp_path / "reports")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed[:-1])) <= 110
    status = {line.split()[0]: line for line in printed if "±" in line or "0 of 3" in line}
    assert " not comparable " in status["not_like_it"]
    assert " invalid " in status["impossible"]
    assert " diverged " in status["gone"]
    text = " ".join(printed)
    assert "not_like_it: not comparable: lr is frozen: 0.5, the baseline has its default" in text
    assert "impossible: invalid: peak memory 0.4689 GiB, and its device has 0.25" in text
    assert "gone: seeds 1, 2, 3: diverged: at step 7: loss 9 > 3" in text
    assert text.index("Against adamw on test loss") < text.index("Results:") < text.index("Cost:")
    assert "…" not in text  # nothing is cut


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


def test_what_dvc_draws_says_no_unit_that_depends_on_what_a_study_is_of():
    """One dvc.yaml for all studies: a loss is of a token or of a row, a speed of tokens or of samples."""
    plots = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    labels = [
        text for plot in plots for own in plot.values() for key, text in own.items() if key.endswith("_label")
    ]
    assert len(labels) >= 8 and not [text for text in labels if re.search("token|row|sample", text)]


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
