"""What a study of classifiers shows: percents, samples, its own columns and charts, in every output."""

import csv
import json
import re

import pytest
from fake_classifier import PART, classifier_study
from fake_results import write_json, write_study

from metrics import frames, rows, summary, words
from metrics.findings import findings
from metrics.rows import ResultsError
from plots import figures, outcome_tables, report, tables
from stages import summarize

SEEDS = (1, 2, 3)


@pytest.fixture
def results(tmp_path):
    return classifier_study(tmp_path)


@pytest.fixture
def study(results):
    return summary.summarize(rows.read(results))


def test_accuracy_is_in_percent_with_both_intervals(study):
    heads, cells = tables.quality_table(study)
    assert heads == [
        "run",
        "seeds",
        "test accuracy (%)",
        "binomial interval (%)",
        "difference",
        "p",
        "verdict",
        "test loss",
    ]
    # t(2) = 4.303 × 0.1 points / √3; Wilson's by hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    assert cells[0][2:4] == ["91.20 ± 0.25", "90.54–91.82"]
    assert cells[2][4].startswith("+0.9000")  # points


def test_words_say_points_and_rows(results):
    for seed, share in zip(SEEDS, (0.921, 0.915, 0.924), strict=True):
        path = results / "test" / f"large_1-{seed}.json"
        write_json(path, json.loads(path.read_text()) | {"test_accuracy": share})
    study = summary.summarize(rows.read(results))
    text = words.verdict_sentence(study, study.of("large_1"))
    # differences of 1.0, 0.3 and 1.1 points
    assert "inconclusive (+0.8 ± 1.1 percentage points, 3 paired seeds" in text
    assert re.search(r"could have shown a difference of [\d.]+ percentage points", text)
    assert study.measure("test_loss").axis == "test loss (nats/row)"


def test_costs_are_in_samples(study):
    heads, cells = tables.cost_table(study)
    assert heads[:3] == ["run", "throughput (samples/s)", "step time (ms)"]
    assert cells[0][1] == "25,600" and "tokens" not in " ".join(heads)
    assert "training time (s)" not in heads and "training time (s)" in tables.cost_table(study, full=True)[0]


def test_a_column_that_no_run_has_is_not_shown(results):
    for run in ("small_1", "small_2", "large_1", "large_2"):
        for seed in SEEDS:
            path = results / f"{run}-{seed}" / "metrics.json"
            write_json(path, json.loads(path.read_text()) | {"activation_mib": None})
    study = summary.summarize(rows.read(results))
    assert not any("activations" in head for head in tables.cost_table(study, full=True)[0])
    written = frames.table_frame(study).columns
    assert {"test_accuracy", "samples_per_second_ratio"} <= set(written)
    assert not {"activation_mib", "test_perplexity", "test_bits_per_byte"} & set(written)


def test_a_language_model_has_none_of_it(tmp_path):
    study = summary.summarize(rows.read(write_study(tmp_path)))
    said = " ".join([*tables.quality_table(study, full=True)[0], *tables.cost_table(study, full=True)[0]])
    for word in ("accuracy", "binomial", "samples", "training time"):
        assert word not in said
    assert "test perplexity" in said and "tokens/s" in said
    assert not {"val_accuracy", "speedup", "efficiency", "epoch_seconds"} & set(figures.every(study))
    assert study.measure("test_loss").axis == "test loss (nats/token)"
    assert outcome_tables.scaling_tables(study) == outcome_tables.criteria_tables(study) == []


def test_how_much_of_the_published_rows_was_trained_on_is_said_as_the_ledger_has_it(results, study):
    everyone = "small_1, small_2, large_1, large_2"
    assert f"{everyone}: dataset ag_news: {PART}" in words.footnotes(study)
    for run in everyone.split(", "):
        for seed in SEEDS:
            path = results / f"{run}-{seed}" / "ledger.json"
            path.write_text(path.read_text().replace(PART, "120,000 training rows"))
    notes = words.footnotes(summary.summarize(rows.read(results)))
    assert not any("training rows" in note for note in notes)


def test_scaling_is_in_every_output(results, tmp_path, capsys):
    reports = tmp_path / "reports"
    assert summarize.main([str(results), str(reports)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 110
    assert re.search(r"small_2 +small_1 +strong +2 +256 +32,000 +1.25 +62.5", printed)
    assert re.search(r"small_2 +37.5 ± 0.0 +0.0 ± 0.0 +0.0 ± 0.0 +6.2 ± 0.0 +5.0 ± 0.0 +26.2 ± 0.0", printed)
    row = "| small_2 | small_1 | strong | 2 | 256 | 32,000 ± 0 | 1.25 | 62.5 (62.5–62.5) | 37.5 ± 0.0 |"
    assert row in (reports / "table.md").read_text()
    assert r"small\_2 & small\_1 & strong & 2 & 256" in (reports / "table.tex").read_text()
    pairs = {row["run"]: row for row in csv.DictReader((reports / "scaling.csv").read_text().splitlines())}
    assert float(pairs["small_2"]["too_little_work"]) == pytest.approx(2.1 / 8)
    page = (reports / "report.html").read_text()
    assert "<h2>Scaling</h2>" in page and "does not scale well" in page
    bars = {row["metric"] for row in csv.DictReader((reports / "bars.csv").read_text().splitlines())}
    assert {"test accuracy (%)", "throughput (samples/s)", "speedup (×)", "efficiency (%)"} <= bars
    metrics = json.loads((reports / "metrics" / "small_2.json").read_text())
    assert metrics["test_accuracy"] == 0.911 and metrics["samples_per_second"] == 32_000
    assert "tokens_per_second" not in metrics


def test_a_pair_that_was_not_measured_has_dashes_and_a_reason(results, tmp_path, capsys):
    for seed in SEEDS:
        (results / f"large_2-{seed}" / "metrics.json").unlink()
    assert summarize.main([str(results), str(tmp_path / "reports")]) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "large_2 large_1 weak – – – – –" in printed and "large_2 – – – – – –" in printed
    assert "The scaling of large_2 against large_1 was not measured: large_2 has no result" in printed
    assert "– – –" in (tmp_path / "reports" / "table.md").read_text().replace(" |", "")


def test_parts_that_were_not_told_apart_have_their_own_column(results):
    for seed in SEEDS:
        path = results / f"small_2-{seed}" / "scaling.json"
        write_json(path, json.loads(path.read_text()) | {"alone_seconds": None, "exchange": "fsdp"})
    (_, (heads, cells)) = outcome_tables.scaling_tables(summary.summarize(rows.read(results)))[1]
    assert heads[-4:] == ["communication", "imbalance", "too little work", "not told apart"]
    assert cells[0][-4:] == ["–", "–", "–", "37.5 ± 0.0"] and cells[1][-1] == "–"


def test_a_negative_part_is_shown_as_it_is(results):
    for seed in SEEDS:
        path = results / f"large_2-{seed}" / "scaling.json"
        faster = {
            "loaded_seconds": [0.039, 0.039],
            "ready_seconds": [0.0385] * 2,
            "alone_seconds": [0.0385] * 2,
        }
        write_json(path, json.loads(path.read_text()) | faster)
    (_, (_, cells)) = outcome_tables.scaling_tables(summary.summarize(rows.read(results)))[1]
    assert cells[1][1] == "-2.6 ± 0.0" and cells[1][-1] == "-2.6 ± 0.0"  # the minus of every other table


def test_what_is_rounded_to_nothing_has_no_sign(results):
    for seed in SEEDS:
        path = results / f"large_2-{seed}" / "scaling.json"
        hardly = {
            "loaded_seconds": [0.03999, 0.0399],
            "ready_seconds": [0.0395] * 2,
            "alone_seconds": [0.0395] * 2,
        }
        write_json(path, json.loads(path.read_text()) | hardly)
    (_, (_, cells)) = outcome_tables.scaling_tables(summary.summarize(rows.read(results)))[1]
    assert cells[1][1:3] == ["0.0 ± 0.0", "0.0 ± 0.0"]  # -0.025 % is lost


def test_the_charts(study):
    drawn = figures.every(study)
    asked = {
        "test_accuracy",
        "samples_per_second",
        "epoch_seconds",
        "trade_off",
        "speedup",
        "efficiency",
        "val_accuracy",
    }
    assert asked <= set(drawn)
    pictures = {name: figures.picture(drawn[name], name, study) for name in asked}
    assert ">slower than one process<" in pictures["speedup"] and ">ideal<" in pictures["speedup"]
    assert (
        ">small_2: 1.25 × (strong)<" in pictures["speedup"]
        and ">large_2: 1.90 × (weak)<" in pictures["speedup"]
    )
    assert {">85 %<", ">ideal<", ">small_2: 62.5 % (strong)<"} <= set(
        re.findall(r">[^<>]+<", pictures["efficiency"])
    )
    assert ">epoch<" in pictures["val_accuracy"] and ">validation accuracy (%)<" in pictures["val_accuracy"]
    assert ">small_1: 91.20 ± 0.25<" in pictures["test_accuracy"]
    assert "Says nothing of scaling" in drawn["epoch_seconds"].caption
    for picture in pictures.values():
        assert "NaN" not in picture and "undefined" not in picture
    assert report.html(study).count('role="img"') == len(drawn)


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("small_1-1/metrics.json", "val_accuracy", "small_1-1/metrics.json lacks val_accuracy"),
        ("small_1-1/metrics.json", "samples_per_epoch", "small_1-1/metrics.json lacks samples_per_epoch"),
        ("test/small_1-1.json", "test_accuracy", "test/small_1-1.json lacks test_accuracy"),
        ("test/small_1-1.json", "examples", "test/small_1-1.json lacks examples"),
    ],
)
def test_what_a_classifier_must_have(results, name, key, message):
    values = json.loads((results / name).read_text())
    del values[key]
    write_json(results / name, values)
    with pytest.raises(ResultsError, match=message):
        rows.read(results)


def test_evaluations_of_a_classifier_have_its_accuracy(results):
    path = results / "small_1-1" / "evals.csv"
    path.write_text(path.read_text().replace("val_accuracy", "accuracy"))
    with pytest.raises(ResultsError, match="small_1-1/evals.csv lacks the column val_accuracy"):
        rows.read(results)


def reached(results) -> dict[tuple[str, ...], str]:
    """Of the runs, what is said of the time to another's final accuracy."""
    made = findings(summary.summarize(rows.read(results)))
    return {one.runs: one.text for one in made if "reached" in one.text}


def test_time_to_the_references_accuracy(results):
    """Of every run to the baseline's, and of a run whose scaling is declared also to its reference's."""
    texts = reached(results)
    assert texts["large_2", "large_1"] == (
        "large_2 reached large_1's final validation accuracy after 1.00 × the samples and 0.52 × the seconds of "
        "training (compiling not counted) that large_1 took, in 3 of 3 seeds; looked at where it was evaluated."
    )
    assert set(texts) == {(run, "small_1") for run in ("small_2", "large_1", "large_2")} | {
        ("large_2", "large_1")
    }


def test_samples_are_counted_whatever_tokens_each_of_them_has(tmp_path):
    """As where one run reads what was said once for all candidates, and another with each."""
    results = classifier_study(tmp_path, axis="samples")
    for seed in SEEDS:
        home = results / f"large_2-{seed}"
        for name in ("steps.csv", "evals.csv"):
            head, *lines = (home / name).read_text().splitlines()
            at = head.split(",").index("tokens_seen")
            cells = [line.split(",") for line in lines]
            halved = [[*row[:at], str(int(row[at]) // 2), *row[at + 1 :]] for row in cells]
            (home / name).write_text("\n".join([head, *map(",".join, halved)]) + "\n")
        metrics = json.loads((home / "metrics.json").read_text())
        write_json(home / "metrics.json", metrics | {"tokens": metrics["tokens"] // 2})
    text = reached(results)["large_2", "large_1"]
    assert text.startswith("large_2 reached large_1's final validation accuracy after 1.00 × the samples and")


def test_as_good_as_the_target_is_good_enough(results):
    for seed in SEEDS:
        target = json.loads((results / f"large_1-{seed}" / "metrics.json").read_text())["val_accuracy"]
        home = results / f"large_2-{seed}"
        head, *lines = (home / "evals.csv").read_text().splitlines()
        shares = (0.25, 0.5, target)
        cells = [[*line.split(",")[:3], str(share)] for line, share in zip(lines, shares, strict=True)]
        (home / "evals.csv").write_text("\n".join([head, *map(",".join, cells)]) + "\n")
        ends = {"val_accuracy": target, "best_val_accuracy": target}
        write_json(home / "metrics.json", json.loads((home / "metrics.json").read_text()) | ends)
    # large_1 was once better than it ended: after two of its three epochs.
    assert reached(results)["large_2", "large_1"].startswith(
        "large_2 reached large_1's final validation accuracy after 1.50 × the samples"
    )


def test_a_run_identical_to_the_baseline_still_has_a_time_to_its_references_accuracy(tmp_path):
    results = classifier_study(tmp_path, scaling={"small_2": {"reference": "large_1", "kind": "strong"}})
    for seed in SEEDS:
        one, two = (results / "test" / f"small_{n}-{seed}.json" for n in (1, 2))
        two.write_text(one.read_text())
    assert summary.summarize(rows.read(results)).of("small_2").status == "identical"
    assert {runs for runs in reached(results) if runs[0] == "small_2"} == {("small_2", "large_1")}
