"""Comparisons that are not fair are made on purpose: each is shown as not comparable or invalid, with its reason."""

import json
import math

import polars as pl
import pytest
from fake_results import write_json, write_study

from metrics import frames, rows, summary, words
from plots import report

SEEDS = (1, 2, 3)


@pytest.fixture
def results(tmp_path):
    return write_study(tmp_path)


def change(path, **values):
    """Replace keys of a JSON file; None removes one."""
    new = json.loads(path.read_text()) | values
    write_json(path, {key: value for key, value in new.items() if value is not None})


def configure(results, run, old, new, seeds=SEEDS):
    for seed in seeds:
        path = results / f"{run}-{seed}" / "config.toml"
        path.write_text(path.read_text().replace(old, new))


def summarized(results):
    return summary.summarize(rows.read(results))


def of(study, name="sgd"):
    return next(one for one in study.runs if one.run == name)


def assert_not_ranked(study, *reasons):
    """sgd is not comparable for these reasons, its numbers are shown, and nothing compares it."""
    run = of(study)
    assert run.status == "not comparable" and run.not_comparable == reasons
    assert run.comparison is None and set(run.ratios.values()) == {None}
    assert run.estimates["test_loss"] is not None
    assert of(study, "adamw-checkpointing").status == "identical"  # nobody else is touched
    for reason in reasons:
        assert f"sgd: not comparable: {reason}" in words.footnotes(study)
        assert reason in words.verdict_sentence(study, run)
    assert "sgd is not comparable" in words.headline(study)
    assert frames.dvc_metrics(run, "test_loss")["verdict"] == "not comparable"
    row = frames.table_frame(study).filter(pl.col("run") == "sgd").row(0, named=True)
    assert (row["verdict"], row["difference"], row["p"]) == ("not comparable", None, None)
    assert row["not_comparable"] == "; ".join(reasons)


def test_fair_runs_are_compared(results):
    study = summarized(results)
    assert [run.not_comparable + run.invalid + run.costs_not_comparable for run in study.runs] == [()] * 3
    assert of(study).status == "worse" and study.axis == "equal tokens"
    assert words.headline(study) == (
        "Against adamw on test loss at equal tokens, sgd is worse; adamw-checkpointing is identical."
    )


@pytest.mark.parametrize(
    ("axis", "key", "value", "reason"),
    [
        ("tokens", "tokens", 1_228_799, "had 1,228,799 tokens, the baseline 1,228,800"),
        ("steps", "steps", 299, "had 299 steps, the baseline 300"),
        ("flops", "flops", 6.3e12, "had 6.3e+12 FLOPs, the baseline 6.1e+12, more than 2% apart"),
        (
            "seconds",
            "train_seconds",
            30.7,
            "had 30.7 seconds of training, the baseline 30, more than 2% apart",
        ),
        (
            "flops",
            "flops",
            None,
            "its FLOPs or the baseline's were not recorded, and the study compares at equal FLOPs",
        ),
    ],
)
def test_unequal_budgets(tmp_path, axis, key, value, reason):
    results = write_study(tmp_path, axis=axis)
    for seed in SEEDS:  # without resumes, which seconds do not allow
        for run in ("adamw", "adamw-checkpointing", "sgd"):
            (results / f"{run}-{seed}" / "events.jsonl").write_text("")
    change(results / "sgd-3" / "metrics.json", **{key: value})
    if key == "steps":  # honest rows, one less
        path = results / "sgd-3" / "steps.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    if key == "tokens":  # honest rows, which end there too
        path = results / "sgd-3" / "steps.csv"
        path.write_text(path.read_text().replace("300,1228800,", "300,1228799,"))
    assert_not_ranked(summarized(results), f"{reason} (seed 3)")


@pytest.mark.parametrize(("axis", "key"), [("flops", "flops"), ("seconds", "train_seconds")])
def test_budgets_within_the_stated_tolerance_are_equal(tmp_path, axis, key):
    results = write_study(tmp_path, axis=axis)
    for path in results.glob("*/events.jsonl"):
        path.write_text("")
    path = results / "sgd-3" / "metrics.json"
    change(path, **{key: json.loads(path.read_text())[key] * 1.019})
    assert of(summarized(results)).status == "worse"


def test_tokens_may_differ_where_the_axis_is_another(tmp_path):
    results = write_study(tmp_path, axis="steps")
    path = results / "sgd-3" / "steps.csv"
    path.write_text(path.read_text().replace("300,1228800,", "300,1228801,"))
    change(results / "sgd-3" / "metrics.json", tokens=1228801)
    assert of(summarized(results)).status == "worse"


def test_seconds_of_a_resumed_run(tmp_path):
    study = summarized(write_study(tmp_path, axis="seconds"))  # every run of it was resumed
    assert of(study).not_comparable == (
        "it was resumed, and the steps done again are in no one's seconds",
        "the baseline was resumed, and the steps done again are in no one's seconds",
    )


def test_a_frozen_setting_that_a_run_changed(tmp_path):
    results = write_study(tmp_path, frozen=["steps", "batch_size"])
    configure(results, "sgd", "batch_size = 32", "batch_size = 16", seeds=(2,))
    assert_not_ranked(summarized(results), "batch_size is frozen: 16, the baseline has 32 (seed 2)")


def test_a_frozen_setting_that_did_not_take_effect(tmp_path):
    results = write_study(tmp_path, frozen=["compile"])
    line = {"what": "compile", "requested": "blocks", "in_effect": "none", "how": "", "agrees": False}
    write_json(results / "sgd-1" / "ledger.json", {"entries": [line]})
    assert_not_ranked(summarized(results), "compile is frozen: requested blocks, in effect none (seed 1)")


def test_a_frozen_setting_that_the_ladder_changed(tmp_path):
    results = write_study(tmp_path, frozen=["micro_batch_size"])
    line = {"what": "micro_batch_size, as first asked", "requested": "0", "in_effect": "8", "how": ""}
    write_json(results / "sgd-1" / "ledger.json", {"entries": [line | {"agrees": False}]})
    assert_not_ranked(summarized(results), "micro_batch_size is frozen: requested 0, in effect 8 (seed 1)")


@pytest.mark.parametrize("where", ["metrics", "test"])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("evaluation_sha256", "f" * 64, "was scored on other {} tokens or windows than the baseline"),
        (
            "evaluation_precision",
            "bfloat16",
            "{} was scored in bfloat16, the baseline's in float32 (eval_precision makes them equal)",
        ),
    ],
)
def test_another_evaluation(results, where, key, value, reason):
    path = results / "sgd-2" / "metrics.json" if where == "metrics" else results / "test" / "sgd-2.json"
    change(path, **{key: value})
    split = {"metrics": "validation", "test": "test"}[where]
    assert_not_ranked(summarized(results), reason.format(split) + " (seed 2)")


def test_another_data_order(results):
    change(results / "sgd-2" / "metrics.json", data_order_sha256="0" * 64)
    assert_not_ranked(summarized(results), "read its data in another order than the baseline (seed 2)")


def test_another_order_that_follows_from_the_settings_is_a_note(results):
    configure(results, "sgd", "batch_size = 32", "batch_size = 64")
    for seed in SEEDS:
        change(results / f"sgd-{seed}" / "metrics.json", data_order_sha256="0" * 64)
    sgd = of(summarized(results))
    assert (sgd.status, sgd.not_comparable) == ("worse", ())
    assert sgd.notes == ("data order not paired, because of batch_size",)


def test_another_data_seed_explains_another_order_and_an_order_of_all_seeds_is_said(results):
    configure(results, "sgd", "[run]", "[run]\ndata_seed = 7")
    for seed in SEEDS:
        change(results / f"sgd-{seed}" / "metrics.json", data_order_sha256="7" * 64)
    sgd = of(summarized(results))
    assert (sgd.status, sgd.not_comparable) == ("worse", ())
    assert sgd.notes == (
        "its seeds have one data order (data_seed = 7), so its interval is of initial weights and dropout alone",
        "data order not paired, because of data_seed",
    )


def test_what_was_never_hashed_is_said(results):
    for seed in SEEDS:
        change(results / f"sgd-{seed}" / "metrics.json", data_order_sha256=None, evaluation_sha256=None)
    sgd = of(summarized(results))
    assert sgd.status == "worse"
    assert sgd.notes == ("not checked (rows without hashes): data order, evaluation set",)


@pytest.mark.parametrize(("key", "value"), [("device_name", "NVIDIA H100"), ("torch", "2.11.0")])
def test_another_machine_or_torch_makes_costs_not_comparable(results, key, value):
    change(results / "sgd-2" / "env.json", **{key: value})
    study = summarized(results)
    sgd = of(study)
    assert sgd.status == "worse" and set(sgd.ratios.values()) == {None}
    assert sgd.estimates["tokens_per_second"] is not None
    [reason] = sgd.costs_not_comparable
    assert f"{key} {value}, the baseline's" in reason and reason.endswith("(seed 2)")
    assert f"sgd: costs not comparable: {reason}" in words.footnotes(study)
    assert words.cost_sentence(study, sgd) == ""


def test_what_only_newer_runs_tell_of_their_machine_is_no_difference(results):
    """Rows from before env.json had these, beside rows that have them."""
    judged = of(summarized(results))
    new = {
        "driver_version": "580.95.05",
        "pcie_generation": 5,
        "pcie_width": 16,
        "git_engine_diff_sha256": "ab",
    }
    for seed in SEEDS:
        change(results / f"sgd-{seed}" / "env.json", **new)
    sgd = of(summarized(results))
    assert (sgd.status, sgd.not_comparable, sgd.costs_not_comparable) == ("worse", (), ())
    assert sgd.ratios == judged.ratios and set(sgd.ratios.values()) != {None}
    page = report.html(summarized(results))
    assert "driver version" in page and "580.95.05 (sgd-1, sgd-2, sgd-3)" in page


def test_a_run_of_which_a_seed_diverged_is_not_judged_by_the_others(results):
    diverged = {"status": "diverged", "reason": "loss 9.1", "step": 41, "val_loss": 1.0}
    write_json(results / "sgd-2" / "metrics.json", diverged)
    write_json(results / "test" / "sgd-2.json", {"status": "diverged", "reason": "loss 9.1"})
    study = summarized(results)
    assert_not_ranked(study, "diverged (seed 2)")
    others = "its means are over seeds 1, 3, the baseline's over seeds 1, 2, 3"
    assert of(study).notes == ("seed 2: diverged: at step 41: loss 9.1", others)
    assert of(study).complete_seeds == (1, 3)
    for seed in SEEDS:
        write_json(results / f"sgd-{seed}" / "metrics.json", diverged)
    study = summarized(results)
    assert (of(study).status, set(of(study).estimates.values())) == ("diverged", {None})
    assert "sgd diverged" in words.headline(study)
    write_json(results / "sgd-1" / "metrics.json", {"status": "failed", "reason": "killed"})
    assert of(summarized(results)).state == "diverged"


def test_a_baseline_of_which_a_seed_diverged_judges_nobody(results):
    write_json(results / "adamw-2" / "metrics.json", {"status": "diverged", "reason": "r", "step": 41})
    write_json(results / "test" / "adamw-2.json", {"status": "diverged", "reason": "r"})
    study = summarized(results)
    assert of(study).not_comparable == ("the baseline diverged (seed 2)",)
    assert of(study, "adamw-checkpointing").status == "not comparable"
    assert "Every run is complete and comparable" not in report.html(study)


def test_seconds_on_another_machine_are_not_equal_seconds(tmp_path):
    results = write_study(tmp_path, axis="seconds")
    for path in results.glob("*/events.jsonl"):
        path.write_text("")
    for seed in SEEDS:
        change(results / f"sgd-{seed}" / "env.json", device_name="faster")
    sgd = of(summarized(results))
    assert sgd.status == "not comparable" and "device_name faster" in sgd.not_comparable[0]


def test_other_threads_are_another_machine(results):
    for seed in SEEDS:
        change(results / f"sgd-{seed}" / "env.json", threads=1)
        change(results / f"adamw-{seed}" / "env.json", threads=8)
    sgd = of(summarized(results))
    assert sgd.status == "worse" and sgd.costs_not_comparable == (
        "ran on another machine or torch: threads 1, the baseline's 8",
    )


def test_a_frozen_setting_that_the_baseline_did_not_have_in_effect(tmp_path):
    results = write_study(tmp_path, frozen=["compile"])
    for seed in SEEDS:
        path = results / f"adamw-{seed}" / "ledger.json"
        line = {"what": "compile", "requested": "model", "in_effect": "none", "how": "h", "agrees": False}
        write_json(path, {"entries": [*json.loads(path.read_text())["entries"], line]})
    reason = "the baseline's compile is frozen: requested model, in effect none"
    assert all(run.not_comparable == (reason,) for run in summarized(results).runs[1:])


def test_a_test_set_that_was_never_hashed_is_said(results):
    for seed in SEEDS:
        change(results / "test" / f"sgd-{seed}.json", evaluation_sha256=None)
    assert of(summarized(results)).notes == ("not checked (rows without hashes): test set and its precision",)


def test_a_budget_that_is_no_number_is_refused(tmp_path):
    results = write_study(tmp_path, axis="flops")
    change(results / "sgd-1" / "metrics.json", flops=math.nan)
    with pytest.raises(rows.ResultsError, match="flops must be finite, got nan"):
        summarized(results)


# --- rows that cannot be true


def assert_invalid(results, problem):
    study = summarized(results)
    sgd = of(study)
    assert sgd.status == "invalid" and sgd.invalid == (problem,)
    assert sgd.comparison is None and set(sgd.ratios.values()) == {None}
    assert f"sgd: invalid: {problem}" in words.footnotes(study)
    assert problem in words.verdict_sentence(study, sgd)
    assert frames.dvc_metrics(sgd, "test_loss")["verdict"] == "invalid"


def test_more_memory_than_the_device_has(results):
    change(results / "sgd-2" / "env.json", device_memory_gib=0.46)
    assert_invalid(results, "peak memory 0.4689 GiB, and its device has 0.46 (seed 2)")


def test_nothing_is_compared_with_an_invalid_baseline(results):
    change(results / "adamw-2" / "env.json", device_memory_gib=0.46)
    study = summarized(results)
    assert [run.status for run in study.runs] == ["invalid", "not comparable", "not comparable"]
    assert of(study).not_comparable == ("the baseline is invalid",)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("val_loss", "metrics.json says val_loss 1.5, evals.csv ends in 2.6"),
        ("tokens", "metrics.json says tokens 1.5, steps.csv ends in 1228800"),
    ],
)
def test_a_figure_that_somebody_edited(results, key, problem):
    path = results / "sgd-2" / "evals.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], "300,1228800,2.6"]) + "\n")
    change(results / "sgd-2" / "metrics.json", val_loss=2.6)
    assert of(summarized(results)).status == "worse"
    change(results / "sgd-2" / "metrics.json", **{key: 1.5})
    sgd = of(summarized(results))
    assert sgd.status == "invalid" and f"{problem} (seed 2)" in sgd.invalid


# --- what happened


def test_events_and_counts_are_shown(results):
    change(results / "sgd-2" / "metrics.json", skipped_steps=1, norm_spikes=4)
    (results / "sgd-3" / "events.jsonl").write_text('{"event": "out_of_memory", "changed": {}}\n' * 2)
    study = summarized(results)
    said = {"resumes": 2, "skipped step": 1, "spikes of the gradient norm": 4, "out-of-memory rungs": 2}
    assert of(study).counts == said
    assert f"sgd: {', '.join(f'{n} {what}' for what, n in said.items())}" in words.footnotes(study)
    assert of(study, "adamw").counts == {"resumes": 3}


# --- budgets of their own, and what must be alike


def test_a_budget_of_its_own_is_labelled_and_never_ranked(tmp_path):
    results = write_study(tmp_path, own_budget=["sgd"])
    for seed in SEEDS:
        path = results / f"sgd-{seed}" / "steps.csv"
        path.write_text(path.read_text().replace("300,1228800,", "300,1486848,"))
        change(results / f"sgd-{seed}" / "metrics.json", tokens=1_486_848)
    study = summarized(results)
    run, said = of(study), "had 1,486,848 tokens, the baseline 1,228,800"
    assert run.status == "own budget" and run.own_budget == (said,) and run.not_comparable == ()
    assert run.comparison is None and set(run.ratios.values()) == {None} and run not in study.comparable
    assert run.estimates["test_loss"] is not None  # its numbers are shown
    assert of(study, "adamw-checkpointing").status == "identical"
    assert f"sgd: own budget, not ranked: {said}" in words.footnotes(study)
    assert "sgd had a budget of its own" in words.headline(study)
    assert "sgd had a budget of its own and is not ranked" in words.verdict_sentence(study, run)
    assert frames.dvc_metrics(run, "test_loss")["verdict"] == "own budget"
    row = frames.table_frame(study).filter(pl.col("run") == "sgd").row(0, named=True)
    assert (row["verdict"], row["own_budget"], row["difference"]) == ("own budget", said, None)
    assert "own budget" in report.html(study)


def test_a_budget_of_its_own_excuses_nothing_else(tmp_path):
    results = write_study(tmp_path, own_budget=["sgd"])
    change(results / "sgd-2" / "metrics.json", evaluation_sha256="f" * 64)
    run = of(summarized(results))
    assert run.status == "not comparable"
    assert run.not_comparable == (
        "was scored on other validation tokens or windows than the baseline (seed 2)",
    )


def decays(results, run, in_effect, agrees=True):
    entry = {"what": "weight_decay", "requested": "0.1 of matrices, 0 of vectors", "in_effect": in_effect}
    for seed in SEEDS:
        write_json(
            results / f"{run}-{seed}" / "ledger.json", {"entries": [entry | {"how": "", "agrees": agrees}]}
        )


@pytest.mark.parametrize(
    ("in_effect", "reason"),
    [
        ("0 of matrices, 0 of vectors", "weight decay in effect is 0 of matrices, the baseline's 0.1"),
        ("0.1 of matrices, 0.1 of vectors", "weight decay in effect is 0.1 of vectors, the baseline's 0"),
        (
            "0 of matrices, 0.1 of matrices, 0 of vectors",
            "weight decay in effect is 0 and 0.1 of matrices, the baseline's 0.1",
        ),
    ],
)
def test_unequal_decay_groups_are_named(results, in_effect, reason):
    """As in the original: one optimizer had none at all, another decayed biases and norms too."""
    for run in ("adamw", "adamw-checkpointing"):
        decays(results, run, "0.1 of matrices, 0 of vectors")
    decays(results, "sgd", in_effect)
    assert_not_ranked(summarized(results), f"{reason}, and the study sets it for neither")


def test_decay_that_the_study_sets_and_that_of_muons_matrices_may_differ(tmp_path):
    runs = {"adamw": {}, "adamw-checkpointing": {"weight_decay": 0.0}, "sgd": {"optimizer": "muon"}}
    results = write_study(tmp_path, runs=runs)
    decays(results, "adamw", "0.1 of matrices, 0 of vectors")
    decays(results, "adamw-checkpointing", "0 of matrices, 0 of vectors")
    decays(results, "sgd", "0.1 of embeddings, 0.01 of matrices, 0 of vectors")
    assert [run.not_comparable for run in summarized(results).runs] == [(), (), ()]


def test_unequal_clipping_is_named_unless_the_study_sets_it(tmp_path):
    results = write_study(tmp_path)
    for run, norm in (("adamw", "1.0"), ("adamw-checkpointing", "1.0"), ("sgd", "0.0")):
        configure(results, run, "batch_size = 32", f"batch_size = 32\nclip_norm = {norm}")
    reason = "clip_norm 0.0, the baseline's 1.0, and the study sets it for neither"
    assert_not_ranked(summarized(results), reason)
    plan = results / "configs" / "study.json"
    runs = {"adamw": {}, "adamw-checkpointing": {}, "sgd": {"clip_norm": 0.0}}
    change(plan, runs=runs)
    assert of(summarized(results)).not_comparable == ()


def test_other_tokens_of_the_same_number_are_named(results):
    """Random ones, say, where the data were missing."""
    for run, digest in (("adamw", "a" * 64), ("adamw-checkpointing", "a" * 64), ("sgd", "b" * 64)):
        for seed in SEEDS:
            change(results / f"{run}-{seed}" / "metrics.json", train_sha256=digest)
    reason = "was trained on other tokens (sha256 bbbbbbbbbbbb) than the baseline (aaaaaaaaaaaa)"
    assert_not_ranked(summarized(results), reason)
