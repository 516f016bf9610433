"""Findings made from rows: each against numbers worked out by hand, with the runs that it came from."""

import json
import math

import pytest
import tomli_w
from fake_results import write_json, write_run, write_study

from metrics import rows, summary
from metrics.findings import findings

SEEDS = (1, 2, 3)
BASE = {"optimizer": "adamw", "lr": 0.001, "batch_size": 32, "steps": 300, "context": 128}


@pytest.fixture
def study(tmp_path):
    """study(runs, seeds): write results whose runs have these settings on top of BASE; says what is found.

    Other arguments replace keys of study.json."""

    def write(runs: dict[str, dict], seeds=SEEDS, **changes):
        results = write_study(tmp_path, seeds, runs=runs, baseline=next(iter(runs)), **changes)
        for run, settings in runs.items():
            for seed in seeds:
                config = tomli_w.dumps({"run": {"run": run, "seed": seed}, "settings": BASE | settings})
                (results / f"{run}-{seed}" / "config.toml").write_text(config)
        return results

    return write


def measured(results, run, seeds=SEEDS, **values):
    """Put values, one for all seeds or a function of the seed, into a run's metrics.json."""
    for seed in seeds:
        path = results / f"{run}-{seed}" / "metrics.json"
        own = {key: value(seed) if callable(value) else value for key, value in values.items()}
        write_json(path, json.loads(path.read_text()) | own)


def read_samples(results, run, ids):
    """Let the ledger say which samples a step had."""
    for seed in SEEDS:
        path = results / f"{run}-{seed}" / "ledger.json"
        line = {"what": "samples", "requested": ids, "in_effect": ids, "how": "h", "agrees": True}
        write_json(path, {"entries": [*json.loads(path.read_text())["entries"], line]})


def found(results, about: str) -> list[tuple[str, tuple[str, ...]]]:
    made = findings(summary.summarize(rows.read(results)))
    return [(one.text, one.runs) for one in made if about in one.text]


def test_memory_saved_and_time_added(study):
    results = study({"plain": {}, "full": {"activation_checkpointing": "full"}, "other": {"width": 8}})
    measured(results, "plain", peak_memory_gib=10.0, activation_mib=800.0, step_seconds_median=1.0)
    time = {1: 1.2, 2: 1.3, 3: 1.3 * 1.3 / 1.2}  # logs evenly apart: the middle one is the geometric mean
    measured(results, "full", peak_memory_gib=4.0, activation_mib=80.0, step_seconds_median=time.get)
    half = 4.302653 * math.log(1.3 / 1.2) / math.sqrt(3)
    low, high = (round(100 * (1.3 * math.exp(sign * half) - 1)) for sign in (-1, 1))
    assert found(results, "peak memory") == [
        (
            "full against plain (activation_checkpointing = full): peak memory 60 % less, "
            f"activations kept 90 % less, step time 30 % more ({low} % more to {high} % more); 3 paired seeds.",
            ("full", "plain"),
        )
    ]


def test_a_cost_that_may_be_more_or_less_is_said_to_be_so(study):
    results = study({"plain": {}, "full": {"activation_checkpointing": "full"}})
    measured(results, "plain", step_seconds_median=1.0)
    measured(results, "full", step_seconds_median={1: 0.5, 2: 1.2, 3: 2.88}.get)
    half = 4.302653 * math.log(2.4) / math.sqrt(3)
    low, high = 1.2 * math.exp(-half), 1.2 * math.exp(half)
    [(text, _)] = found(results, "peak memory")
    assert f"step time 20 % more, which these seeds do not tell from none ({low:.2f}–{high:.0f} ×)" in text


def test_one_seed_says_so(study):
    results = study({"plain": {}, "full": {"activation_checkpointing": "full"}}, seeds=(1,))
    [(text, _)] = found(results, "peak memory")
    assert text.endswith("; one seed, so no interval.")


def test_how_much_larger_a_micro_batch_fits(study):
    runs = {
        "small": {},
        "full": {"activation_checkpointing": "full", "batch_size": 96},
        "larger": {"activation_checkpointing": "full", "batch_size": 128},
        "no_technique": {"batch_size": 64},
    }
    results = study(runs)
    peaks = {"small": 10.0, "full": 9.9, "larger": 10.3, "no_technique": 9.6}
    for run, peak in peaks.items():
        measured(results, run, peak_memory_gib=peak)
    assert found(results, "micro-batches") == [
        (
            "full holds micro-batches 3 × as large as small's (96 sequences against 32) in 0.99 × its peak memory; "
            "3 paired seeds.",
            ("full", "small"),
        )
    ]


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        (0.004, "4 × its learning rate: the linear rule"),
        (0.002, "2 × its learning rate: the square-root rule"),
        (0.001, "1 × its learning rate: neither the linear rule nor the square-root rule"),
        (0.003, "3 × its learning rate: neither the linear rule nor the square-root rule"),
    ],
)
def test_which_rule_a_learning_rate_followed(study, lr, said):
    results = study(
        {"small": {}, "big": {"batch_size": 128, "lr": lr}, "sgd": {"batch_size": 64, "optimizer": "sgd"}}
    )
    assert found(results, "learning rate") == [
        (f"big has 4 × the batch size of small and {said} (linear 4, square root 2).", ("big", "small"))
    ]


def test_a_rule_is_followed_from_the_reference_that_is_declared(study):
    runs = {"base": {}, "one": {"batch_size": 64}, "two": {"batch_size": 256, "lr": 0.002}}
    results = study(runs, scaling={"two": {"reference": "one", "kind": "weak"}})
    texts = {runs: text for text, runs in found(results, "learning rate")}
    assert set(texts) == {("one", "base"), ("two", "one")}
    assert texts["two", "one"] == (
        "two has 4 × the batch size of one and 2 × its learning rate: the square-root rule (linear 4, square root 2)."
    )


def test_a_rule_that_a_setting_applies_is_seen_and_another_model_is_not_compared(study):
    rule = {"lr_rule": "sqrt", "lr_batch_size": 16}
    results = study(
        {
            "small": {"batch_size": 32, "lr": 0.001, **rule},
            "big": {"batch_size": 128, "lr": 0.001, **rule},
            "wide": {"batch_size": 128, "width": 8},
        }
    )
    [(text, runs)] = found(results, "learning rate")
    assert runs == ("big", "small")
    assert text.startswith(
        "big has 4 × the batch size of small and 2 × its learning rate: the square-root rule"
    )


def test_speedup_and_efficiency_are_of_throughput(study):
    results = study({"one": {}, "four": {"processes": 4}, "other": {"width": 8, "processes": 4}})
    for run, processes in {"one": 1, "four": 4, "other": 4}.items():
        for seed in SEEDS:
            path = results / f"{run}-{seed}" / "env.json"
            write_json(path, json.loads(path.read_text()) | {"processes": processes})
    measured(results, "one", tokens_per_second=1000.0, train_seconds=1.0)
    measured(results, "four", tokens_per_second=3200.0, train_seconds=9.0)  # seconds decide nothing
    for run, ids in (("one", "16 distinct"), ("four", "64 distinct")):
        read_samples(results, run, ids)
    assert found(results, "efficiency") == [
        (
            "four in 4 processes trains 3.20 × as many tokens a second as one in 1: efficiency 80%; 3 paired seeds. "
            "Samples of one step, by their ids: 64 distinct and 16 distinct.",
            ("four", "one"),
        )
    ]


def test_time_to_the_baselines_final_loss(study):
    results = study({"base": {}, "quick": {"lr": 0.002}, "slow": {"lr": 1e-5}})
    for seed in SEEDS:
        for run, losses in {"base": [3.0, 2.5, 2.0], "quick": [2.2, 1.9, 1.8], "slow": [4, 3, 2.001]}.items():
            table = [f"{s},{s * 4096},{loss}" for s, loss in zip((100, 200, 300), losses, strict=True)]
            (results / f"{run}-{seed}" / "evals.csv").write_text(
                "\n".join(["step,tokens_seen,val_loss", *table])
            )
            measured(results, run, (seed,), val_loss=losses[-1])
            test = results / "test" / f"{run}-{seed}.json"
            write_json(test, json.loads(test.read_text()) | {"test_loss": losses[-1] + seed / 100})
        path = results / f"quick-{seed}" / "steps.csv"
        slow = path.read_text().replace(",0.1,", ",0.2,")  # twice as long a step
        path.write_text(slow.replace(",0.2,", ",190,", 1))  # and the first one compiles
    assert found(results, "final validation loss") == [
        (
            "quick reached base's final validation loss after 0.67 × the tokens and 1.33 × the seconds of training "
            "(compiling not counted) that base took, in 3 of 3 seeds; looked at where it was evaluated.",
            ("quick", "base"),
        ),
        ("slow never reached base's final validation loss in any of 3 seeds.", ("slow", "base")),
    ]


def test_sparsity_that_was_reached(study):
    results = study({"dense": {}, "pruned": {"lr": 0.01}})
    measured(results, "dense", sparsity=0.0)
    measured(results, "pruned", sparsity=lambda seed: 0.49 + seed / 1000)
    half = 100 * 4.302653 * 0.001 / math.sqrt(3)
    assert found(results, "prunable weights 0") == [
        (f"pruned ended with 49.2 ± {half:.1f} % of its prunable weights 0; 3 seeds.", ("pruned",))
    ]


def test_identical_results(study):
    results = study({"plain": {}, "full": {"activation_checkpointing": "full"}})
    text = "full has exactly the test loss of plain in all 3 seeds"
    assert found(results, "exactly") == [
        (f"{text}, and the same training loss at every step.", ("full", "plain"))
    ]
    path = results / "full-2" / "steps.csv"
    lines = path.read_text().splitlines()
    cells = lines[5].split(",")
    lines[5] = ",".join([*cells[:2], str(float(cells[2]) + 1e-9), *cells[3:]])
    path.write_text("\n".join(lines))
    assert found(results, "exactly") == [(f"{text}.", ("full", "plain"))]


def test_nothing_is_found_in_runs_that_are_not_comparable_or_on_another_machine(study):
    results = study({"plain": {}, "full": {"activation_checkpointing": "full"}})
    path = results / "full-2" / "env.json"
    write_json(path, json.loads(path.read_text()) | {"torch": "1.0"})
    assert found(results, "peak memory") == [] and found(results, "exactly") != []
    measured(results, "full", evaluation_sha256="0" * 64)
    assert found(results, "") == []
    write_run(results, "full", 2)
    for seed in SEEDS:
        (results / f"full-{seed}" / "metrics.json").unlink()
    assert found(results, "") == []


# --- what a larger batch is bought with, and what its learning rate did

RECOMPUTED = {"activation_checkpointing": "full", "batch_size": 128, "warmup_steps": 20, "eval_interval": 75}


def test_the_cost_of_a_sample_where_the_batch_was_changed_with_checkpointing(study):
    """20 GiB for 128 samples are 0.5 of 10 for 32; 160 MiB kept 0.05 of 800; a sample takes 625 / 500 of the time."""
    results = study({"plain": {}, "large": RECOMPUTED, "same": {"activation_checkpointing": "full"}})
    measured(results, "plain", peak_memory_gib=10.0, activation_mib=800.0, tokens_per_second=625.0)
    measured(results, "large", peak_memory_gib=20.0, activation_mib=160.0, tokens_per_second=500.0)
    assert found(results, "for each sample") == [
        (
            "large against plain (activation_checkpointing = full), for each sample, 128 at a time against 32: "
            "activations kept 95 % less, peak memory 50 % less, time 25 % more; 3 paired seeds.",
            ("large", "plain"),
        )
    ]


def test_the_cost_of_a_sample_is_not_said_of_runs_that_differ_otherwise_or_recompute_nothing(study):
    results = study({"plain": {}, "wide": RECOMPUTED | {"width": 8}, "batch": {"batch_size": 128}})
    assert found(results, "for each sample") == []


def test_what_scaling_the_learning_rate_did(study):
    """Differences of test loss 0.1, 0.2, 0.3: 0.2 ± 4.302653 × 0.1 / √3; of the best validation loss -0.5 in each."""
    runs = {"plain": {}, "large": RECOMPUTED, "scaled": RECOMPUTED | {"lr": 0.004}}
    results = study(runs | {"other": RECOMPUTED | {"lr": 0.004, "width": 8}})
    for run, factor in (("large", 0.0), ("scaled", 0.1)):
        measured(results, run, best_val_loss=2.5 if run == "large" else 2.0)
        for seed in SEEDS:
            path = results / "test" / f"{run}-{seed}.json"
            write_json(path, json.loads(path.read_text()) | {"test_loss": 2.0 + factor * seed})
    assert found(results, "at the same batch size") == [
        (
            "scaled has 4 × the learning rate of large, at the same batch size of 128: test loss +0.20 ± 0.25 "
            "nats/token, which these seeds do not tell from none, 3 paired seeds; best validation loss -0.5000 ± 0 "
            "nats/token, 3 paired seeds.",
            ("scaled", "large"),
        )
    ]


def test_learning_rates_at_the_baselines_own_batch_are_left_to_the_verdicts(study):
    results = study({"plain": {}, "quick": {"lr": 0.002}})
    assert found(results, "at the same batch size") == []
