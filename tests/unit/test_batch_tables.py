"""The table of runs by batch, learning rate and checkpointing, and what it says of an accuracy: by hand."""

import json

import pytest
from fake_classifier import classifier_study
from fake_results import write_json, write_study

from metrics import rows, summary
from metrics.batches import batches
from metrics.findings import findings
from plots import outcome_tables, tables
from stages import summarize

SEEDS = (1, 2, 3)
LARGE = {"batch_size": 512, "steps": 15, "activation_checkpointing": "full"}
RUNS = {
    "small_1": {"lr": 0.001, "micro_batch_size": 64},
    "large_1": {**LARGE, "lr": 0.001, "width": 128},
    "large_2": {**LARGE, "lr": 0.001, "lr_rule": "linear", "lr_batch_size": 256, "width": 128},
}


@pytest.fixture
def results(tmp_path):
    return classifier_study(tmp_path, runs=RUNS, scaling={}, criteria=[])


def read(results):
    return summary.summarize(rows.read(results))


def test_a_row_a_run_by_hand(results):
    frame = batches(read(results))
    assert frame["batch_size"].to_list() == [256, 512, 512]
    assert frame["micro_batch"].to_list() == [64, 512, 512]
    assert frame["accumulation"].to_list() == [4, 1, 1] and frame["replicas"].to_list() == [1, 1, 1]
    assert frame["peak_lr"].to_list() == [0.001, 0.001, 0.002]
    assert frame["activation_checkpointing"].to_list() == ["none", "full", "full"]
    assert frame["best_val_loss"].to_list() == [0.27] * 3
    assert frame["best_val_accuracy"].to_list() == pytest.approx([0.914, 0.923, 0.922])


def test_epochs_take_as_long_as_their_steady_steps(results):
    """Epochs are 2,560 rows: 10 steps of 256 in 10 ms, 5 of 512 in 40 and 42; not of another machine."""
    assert batches(read(results))["epoch_seconds"].to_list() == pytest.approx([0.1, 0.2, 0.21])
    for seed in SEEDS:
        path = results / f"large_2-{seed}" / "env.json"
        write_json(path, json.loads(path.read_text()) | {"torch": "1.0"})
    assert batches(read(results))["epoch_seconds"].to_list() == [pytest.approx(0.1), pytest.approx(0.2), None]


def test_replicas_and_tensor_parallelism_divide_a_batch(results):
    for seed in SEEDS:
        env, config = (results / f"large_1-{seed}" / name for name in ("env.json", "config.toml"))
        write_json(env, json.loads(env.read_text()) | {"processes": 8})
        config.write_text(config.read_text() + "tensor_parallel = 2\nmicro_batch_size = 32\n")
    [row] = batches(read(results)).filter(run="large_1").to_dicts()
    assert (row["micro_batch"], row["accumulation"], row["replicas"]) == (32, 4, 4)


def test_the_table_in_words_and_its_file(results, tmp_path):
    [(caption, (heads, cells))] = outcome_tables.batch_tables(read(results))
    assert caption.startswith("Batch, learning rate and recomputing")
    assert heads[-3:] == ["best validation loss (nats/row)", "best validation accuracy (%)", "epoch (s)"]
    assert cells[0][:7] == ["small_1", "256", "64 × 4 × 1", "0.001", "none", "0.2700", "91.40"]
    assert cells[2][:7] == ["large_2", "512", "512 × 1 × 1", "0.002", "full", "0.2700", "92.20"]
    assert caption in tables.markdown(read(results))
    (tmp_path / "reports").mkdir()
    summarize.write_tables(tmp_path / "reports", read(results))
    assert (tmp_path / "reports" / "batches.csv").read_text().count("\n") == 4  # noqa: PLR2004


@pytest.mark.parametrize("left_out", ["batch_size", "activation_checkpointing"])
def test_no_table_where_only_one_of_both_differs(tmp_path, left_out):
    runs = {
        run: {k: v for k, v in own.items() if k not in (left_out, "micro_batch_size")}
        for run, own in RUNS.items()
    }
    found = read(classifier_study(tmp_path, runs=runs, scaling={}, criteria=[]))
    assert batches(found).is_empty() and outcome_tables.batch_tables(found) == []


def test_a_study_that_does_not_say_its_batch_has_no_table(tmp_path):
    assert batches(read(write_study(tmp_path))).is_empty()


def test_what_the_learning_rate_did_to_an_accuracy_is_said_in_rows(results):
    """92.0 against 92.1 % of 7,600 rows: 7.6 rows."""
    [text] = [one.text for one in findings(read(results)) if "at the same batch size" in one.text]
    assert text.startswith(
        "large_2 has 2 × the learning rate of large_1, at the same batch size of 512: test accuracy -0.1000 ± "
    )
    assert "percentage points, 8 of 7,600 rows" in text
