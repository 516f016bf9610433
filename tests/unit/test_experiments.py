"""Studies as experiments: grids and their names, hypotheses decided by rows, choosing on some seeds for others."""

import copy
import json

import pytest
from fake_results import write_json, write_run, write_study
from ruamel.yaml import YAML
from test_studies import composed

from engine.errors import ConfigError
from metrics import findings, grid_results, grids, hypothesis, rows, summary
from metrics.measures import amount
from metrics.words import headline
from plots import figures, tables
from stages import choose, summarize
from stages.plan import resolve_study

GRID = {
    "adamw": {
        "sets": {"optimizer": "adamw"},
        "over": {
            "lr": [1e-5, 0.001],
            "batch": {"b16": {"batch_size": 16, "steps": 20}, "b32": {"batch_size": 32}},
        },
    }
}
NAMES = [f"adamw_lr_{lr}_{b}" for lr in ("1em05", "0p001") for b in ("b16", "b32")]


# --- grids


def test_a_grid_stands_for_runs_with_names_that_follow_from_their_settings():
    found = grids.runs(GRID)
    assert list(found) == NAMES
    assert found["adamw_lr_1em05_b16"] == {"optimizer": "adamw", "lr": 1e-5, "batch_size": 16, "steps": 20}
    assert [grids.label(v) for v in (0.0003, 3e-05, 1.0, 8, True, "pre-norm")] == [
        "0p0003", "3em05", "1", "8", "true", "premnorm",
    ]  # fmt: skip
    assert [point.labels for point in grids.points(GRID)][1] == ("1e-05", "b32")


def grid_study(tmp_path, **changes) -> dict:
    params = composed(tmp_path / "params.yaml", "study=quickstart", "~axis", "frozen=[]")
    grid = {
        "adamw": {
            "over": {
                "lr": [0.001, 0.002],
                "batch": {"b16": {"batch_size": 16}, "b8": {"batch_size": 8, "steps": 200}},
            }
        }
    }
    base = {"grid": grid, "runs": grids.runs(grid), "baseline": "adamw_lr_0p001_b16", "axis": "tokens"}
    return params | base | changes


def test_the_plan_takes_a_grid_and_writes_it_down(tmp_path):
    study, configs = resolve_study(grid_study(tmp_path))
    assert configs["adamw_lr_0p002_b8-1"].training.batch_size == 8
    assert configs["adamw_lr_0p002_b8-1"].optimizer.lr == 0.002
    assert study["grid"]["adamw"]["over"]["lr"] == [0.001, 0.002]


def changed(path: str, value) -> dict:
    """The grid of `grid_study` with one key changed."""
    grid = {"adamw": {"over": {"lr": [0.001, 0.002]}}}
    place = grid
    *front, last = path.split(".")
    for key in front:
        place = place[key]
    place[last] = value
    return {"grid": grid, "runs": {"a": {}}, "baseline": "a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": ["lr"]}, "grid = ['lr']: must be a mapping of grids, each with over"),
        (changed("adamw", [1]), "grid.adamw = [1]: must be a mapping with over"),
        (changed("adamw.ovr", {}), "grid.adamw.ovr: unknown key (nearest: over)"),
        (changed("adamw.sets", 3), "grid.adamw.sets = 3: must be a mapping of settings"),
        (changed("adamw.over", {}), "grid.adamw.over = {}: must be a mapping of axes"),
        (changed("adamw.over.lr", 0.1), "grid.adamw.over.lr = 0.1: must be a list of values of the setting lr, or a"),
        (changed("adamw.over.lr", []), "grid.adamw.over.lr = []: must be a list of values"),
        (changed("adamw.over.lr", [0.1, 0.1]), "grid.adamw.over.lr = [0.1, 0.1]: names a value twice"),
        (changed("adamw.over.batch", {"b": 8}), "grid.adamw.over.batch = {'b': 8}: must be a list of values"),
        (changed("adamw.over.seed", list(range(201))), "stands for 402 runs; a study has at most 200"),
        ({"runs": {"adamw_lr_0p001_b16": {}}}, "runs: are not what the grid stands for; a study with a grid has "
         "runs: ${grid_runs:}"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_grid_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve_study(grid_study(tmp_path, **changes))
    assert message in str(caught.value)


def test_a_misspelt_setting_in_a_grid_is_named_like_any_other(tmp_path):
    grid = {"adamw": {"over": {"lrr": [0.1, 0.2]}}}
    with pytest.raises(ConfigError, match=r"runs.adamw_lrr_0p1.lrr: unknown setting \(nearest: lr\)"):
        resolve_study(grid_study(tmp_path, grid=grid, runs=grids.runs(grid), baseline="adamw_lrr_0p1"))


def test_a_grid_that_is_none_is_left_to_the_plan(tmp_path):
    params = composed(tmp_path / "params.yaml", "study=quickstart", "+grid=3", "runs=${grid_runs:}")
    with pytest.raises(ConfigError, match="must be one of the runs the_grid_is_not_one"):
        resolve_study(params)


# --- the cells of a grid

RUNS = {
    f"adamw_lr_{lr}_weight_decay_{wd}": (lr, wd) for lr in ("0p001", "0p01", "0p1") for wd in ("0", "0p1")
}
OVER = {"lr": [0.001, 0.01, 0.1], "weight_decay": [0, 0.1]}
LOSSES = {  # 0p1 diverged with decay in all seeds, without in two
    "adamw_lr_0p001_weight_decay_0": 2.4, "adamw_lr_0p001_weight_decay_0p1": 2.3,
    "adamw_lr_0p01_weight_decay_0": 2.2, "adamw_lr_0p01_weight_decay_0p1": 2.1,
    "adamw_lr_0p1_weight_decay_0": 1.5,
}  # fmt: skip


def write_grid(tmp_path, **changes):
    """val_loss at the end is the loss above in seed 2, and 0.02 more and less in the others."""
    grid = {"adamw": {"sets": {"optimizer": "adamw"}, "over": OVER}}
    study = {
        "grid": grid,
        "runs": grids.runs(grid),
        "baseline": "adamw_lr_0p001_weight_decay_0",
        "metric": "val_loss",
    }
    results = write_study(tmp_path, **(study | changes))
    for run in RUNS:
        for seed in (1, 2, 3):
            home = results / f"{run}-{seed}"
            if run.endswith("0p1_weight_decay_0p1") or (run.endswith("0p1_weight_decay_0") and seed > 1):
                write_json(home / "metrics.json", {"status": "diverged", "step": 7, "reason": "loss 9 > 3"})
                continue
            metrics = json.loads((home / "metrics.json").read_text())
            loss = LOSSES[run] + 0.02 * (seed - 2)
            write_json(home / "metrics.json", metrics | {"val_loss": loss})
            lines = (home / "evals.csv").read_text().splitlines()
            lines[-1] = ",".join([*lines[-1].split(",")[:2], str(loss)])
            (home / "evals.csv").write_text("\n".join(lines) + "\n")
    return results


def test_cells_have_the_mean_and_mark_what_diverged(tmp_path):
    found = summary.summarize(rows.read(write_grid(tmp_path)))
    frame = grid_results.grid_frame(found)
    assert dict(zip(frame["run"], frame["text"], strict=True)) == {
        "adamw_lr_0p001_weight_decay_0": "2.400",
        "adamw_lr_0p001_weight_decay_0p1": "2.300",
        "adamw_lr_0p01_weight_decay_0": "2.200",
        "adamw_lr_0p01_weight_decay_0p1": "2.100",
        "adamw_lr_0p1_weight_decay_0": "1.480 × 2 of 3",
        "adamw_lr_0p1_weight_decay_0p1": "×",
    }
    assert frame.filter(frame["best"] == "yes")["run"].to_list() == ["adamw_lr_0p01_weight_decay_0p1"]
    assert (frame["x_axis"][0], frame["x"][2], frame["y_axis"][0], frame["y"][3]) == (
        "lr", "0.01", "weight_decay", "0.1",
    )  # fmt: skip


def test_the_stable_range_and_the_best_are_said(tmp_path):
    said = [one.text for one in findings.findings(summary.summarize(rows.read(write_grid(tmp_path))))]
    assert (
        "adamw, weight_decay 0: every seed ended at lr 0.001 to 0.01; diverged at 0.1 (2 of 3 seeds)." in said
    )
    assert (
        "adamw, weight_decay 0.1: every seed ended at lr 0.001 to 0.01; diverged at 0.1 (3 of 3 seeds)."
        in said
    )
    best = next(text for text in said if "the best validation loss" in text)
    assert best == (
        "adamw: of 6 runs the best validation loss is 2.100 ± 0.050, at lr 0.01, weight_decay 0.1 (the end of its "
        "range of weight_decay: a better one may lie beyond)."
    )


def test_a_gap_in_the_stable_range_is_said(tmp_path):
    results = write_grid(tmp_path)
    for seed in (1, 2, 3):
        home = results / f"adamw_lr_0p01_weight_decay_0-{seed}"
        write_json(home / "metrics.json", {"status": "diverged", "step": 7, "reason": "x"})
        write_run(results, "adamw_lr_0p1_weight_decay_0", seed)
    said = [text for text, _ in grid_results.sentences(summary.summarize(rows.read(results)))]
    assert (
        "adamw, weight_decay 0: every seed ended at lr 0.001 and 0.1; diverged at 0.01 (3 of 3 seeds)."
        in said
    )


def test_the_heat_map_marks_what_diverged_and_the_best(tmp_path):
    found = summary.summarize(rows.read(write_grid(tmp_path)))
    drawn = figures.every(found)["grid_adamw"]
    assert drawn.title == "Validation loss: lr × weight_decay, adamw"
    text = figures.picture(drawn, "x", found)
    assert (
        ">×<" in text
        and ">1.480<" in text
        and ">× 2 of 3<" in text
        and "#444444" in text
        and "#999999" in text
    )
    assert text.count('stroke="#D55E00"') >= 1


def test_a_summary_writes_the_grid(tmp_path):
    results = write_grid(tmp_path)
    assert summarize.main([str(results), str(tmp_path / "report")]) == 0
    assert len((tmp_path / "report/grid.csv").read_text().splitlines()) == 7


# --- a hypothesis

SAYS = {"says": "Plain SGD is as good."}


def outcome(tmp_path, *when, **changes):
    against = SAYS | {"when": list(when)} if when else SAYS
    study = {"hypothesis": "SGD loses.", "falsified_by": against}
    return hypothesis.outcome(summary.summarize(rows.read(write_study(tmp_path, **(study | changes)))))


@pytest.mark.parametrize(
    ("when", "state", "words"),
    [
        ([{"run": "sgd", "verdict": "worse"}], "falsified", "falsified: sgd is worse than adamw by +0.507"),
        ([{"run": "sgd", "verdict": ["better", "identical"]}], "not falsified", "not falsified: sgd is worse than"),
        ([{"run": "adamw-checkpointing", "verdict": ["identical"]}], "falsified", "identical"),
        ([{"run": "sgd", "measure": "test_loss", "at_least": 2.5}], "falsified",
         "sgd's test loss is 2.6"),
        ([{"run": "sgd", "measure": "test_loss", "at_most": 2.5}], "not falsified", "(falsifying: ≤ 2.5 nats/token)"),
        # 2.61 / 2.10
        ([{"run": "sgd", "against": "adamw", "measure": "test_loss", "at_least": 1.2}], "falsified",
         "sgd's test loss against adamw's is 1.24"),
        ([{"run": "sgd", "against": "adamw", "measure": "test_loss", "at_most": 1.2}], "not falsified", "1.24"),
        ([{"run": "sgd", "verdict": "better"}, {"run": "sgd", "verdict": "worse"}], "falsified", "worse"),
        ([{"run": "sgd", "measure": "test_accuracy", "at_least": 0.5}], "undecided", "was not measured"),
        ([], "open", "is for the reader"),
    ],
)  # fmt: skip
def test_a_hypothesis_is_decided_by_its_conditions(tmp_path, when, state, words):
    found = outcome(tmp_path, *when)
    assert found.state == state and words in found.words


def test_a_run_that_is_not_there_decides_nothing(tmp_path):
    when = [{"run": "sgd", "measure": "test_loss", "at_most": 9.0}, {"run": "sgd", "verdict": "better"}]
    study = {"hypothesis": "h", "falsified_by": SAYS | {"when": when}}
    results = write_study(tmp_path, **study)
    (results / "sgd-2" / "metrics.json").unlink()
    found = hypothesis.outcome(summary.summarize(rows.read(results)))
    assert (
        found.state == "undecided" and "test loss of sgd is not known: 2 of 3 seeds complete" in found.words
    )


def test_a_verdict_of_some_of_the_seeds_decides_no_hypothesis_and_says_so(tmp_path):
    for verdict in ("worse", "better"):  # it would be falsified; it would not be
        study = {"hypothesis": "h", "falsified_by": SAYS | {"when": [{"run": "sgd", "verdict": verdict}]}}
        results = write_study(tmp_path / verdict, **study)
        (results / "sgd-2" / "metrics.json").unlink()
        made = summary.summarize(rows.read(results))
        found = hypothesis.outcome(made)
        assert made.of("sgd").status == "worse" and found.state == "undecided"
        assert "sgd is worse than adamw by +0.5" in found.words
        assert found.words.endswith("nats/token, with 2 of 3 seeds complete.")
        assert "sgd (2 of 3 seeds) is worse; adamw-checkpointing is identical." in headline(made)


def test_an_inconclusive_verdict_decides_only_where_it_is_named(tmp_path):
    study = {"hypothesis": "h", "falsified_by": SAYS}
    results = write_study(tmp_path, seeds=(1,), **study)  # one seed: no verdict
    for verdict, state in (("worse", "undecided"), ("inconclusive", "undecided")):
        plan = json.loads((results / "configs/study.json").read_text())
        plan["falsified_by"] = SAYS | {"when": [{"run": "sgd", "verdict": verdict}]}
        write_json(results / "configs/study.json", plan)
        assert hypothesis.outcome(summary.summarize(rows.read(results))).state == state


def test_equivalent_to_the_margin_is_said_everywhere(tmp_path, capsys):
    """SGD is worse by 0.507 in the mean: far from 0, and less than 0.6."""
    study = {
        "margin": 0.6,
        "hypothesis": "h",
        "falsified_by": SAYS | {"when": [{"run": "sgd", "verdict": ["worse"]}]},
    }
    results = write_study(tmp_path, **study)
    found = hypothesis.outcome(summary.summarize(rows.read(results)))
    assert (found.state, found.conditions[0].came_true) == ("not falsified", False)
    assert summarize.main([str(results), str(tmp_path / "report")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    table = (tmp_path / "report" / "table.md").read_text()
    assert "adamw-checkpointing is identical; sgd is equivalent" in printed
    assert "sgd: the difference is less than 0.6 nats/token, which would change no choice" in printed
    assert "sgd: 3 seeds could have shown" not in printed
    assert "sgd is equivalent to adamw on test loss: the difference (+0.507 ±" in table
    assert "is less than 0.6 nats/token (p = 0.0" in table
    columns = (tmp_path / "report" / "table.csv").read_text().splitlines()[0].split(",")
    assert columns[columns.index("p_holm") + 1] == "p_equivalent"


def test_a_diverged_run_is_a_verdict_too(tmp_path):
    study = {"hypothesis": "h", "falsified_by": SAYS | {"when": [{"run": "sgd", "verdict": "diverged"}]}}
    results = write_study(tmp_path, **study)
    for seed in (1, 2, 3):
        write_json(results / f"sgd-{seed}/metrics.json", {"status": "diverged", "step": 7, "reason": "x"})
    found = hypothesis.outcome(summary.summarize(rows.read(results)))
    assert (found.state, found.words) == ("falsified", "The hypothesis is falsified: sgd diverged.")


def test_the_conclusion_is_said_everywhere(tmp_path, capsys):
    when = [{"run": "sgd", "verdict": ["better"]}]
    study = {"hypothesis": "SGD <loses>.", "falsified_by": SAYS | {"when": when}, "budget": 1_228_800}
    results = write_study(tmp_path, **study)
    assert summarize.main([str(results), str(tmp_path / "report")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    page, table = ((tmp_path / "report" / name).read_text() for name in ("report.html", "table.md"))
    for text, escaped in (
        (printed, "SGD <loses>."),
        (page, "SGD &lt;loses&gt;."),
        (table, "SGD &lt;loses&gt;."),
    ):
        assert f"Hypothesis: {escaped}" in text and "Falsified by: Plain SGD is as good." in text
        assert "Design: compared at equal tokens; 1,228,800 tokens a run; 3 runs × 3 seeds." in text
        assert "The hypothesis is not falsified: sgd is worse than adamw by +0.507" in text
        assert "Against adamw on test loss" in text


def test_one_run_is_no_runs(tmp_path):
    against = {"says": "Nothing.", "when": []}
    one = {"seeds": (1,), "runs": {"adamw": {}}, "hypothesis": "It runs.", "falsified_by": against}
    found = summary.summarize(rows.read(write_study(tmp_path, **one)))
    assert tables.hypothesis_lines(found)[-1] == "Design: compared at equal tokens; 1 run × 1 seed."
    assert (amount(1, "expectation"), amount(2000, "run")) == ("1 expectation", "2,000 runs")


def test_a_study_without_a_hypothesis_says_nothing_of_it(tmp_path):
    found = summary.summarize(rows.read(write_study(tmp_path)))
    assert hypothesis.outcome(found) is None and hypothesis.conclusion(found) == ""
    assert tables.hypothesis_lines(found) == []


def condition(**changes) -> dict:
    one = {"run": "sgd", "measure": "test_loss", "at_most": 2.0}
    return {
        "hypothesis": "h",
        "falsified_by": {"says": "s", "when": [{k: v for k, v in (one | changes).items() if v is not None}]},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hypothesis": "h"}, "falsified_by: is missing; a hypothesis and what would falsify it belong together"),
        ({"falsified_by": "f"}, "hypothesis: is missing"),
        ({"hypothesis": 3, "falsified_by": "f"}, "hypothesis = 3: must be text"),
        ({"hypothesis": "h", "falsified_by": [1]}, "falsified_by = [1]: must be text, or a mapping with"),
        ({"hypothesis": "h", "falsified_by": {"says": "s"}}, "falsified_by: lacks when"),
        ({"hypothesis": "h", "falsified_by": {"says": "s", "when": []}}, "falsified_by.when = []: must be a list"),
        (condition(run="sdg"), "falsified_by.when[0].run = 'sdg': must be one of the runs adamw, adamw_full_ac, "
         "no_decay, sgd (nearest: sgd)"),
        (condition(mesure="x"), "falsified_by.when[0].mesure: unknown key (nearest: measure)"),
        (condition(verdict="better"), "falsified_by.when[0]: must have either verdict or measure"),
        (condition(measure=None), "falsified_by.when[0]: must have either verdict or measure"),
        (condition(measure=None, at_most=None, verdict="beter"), "must be one of better, worse, identical, "
         "equivalent, inconclusive, diverged (nearest: better)"),
        (condition(measure=None, verdict="better"), "falsified_by.when[0].at_most: goes with measure"),
        (condition(at_most=None), "falsified_by.when[0]: lacks at_least or at_most"),
        (condition(measure="speed"), "falsified_by.when[0].measure = 'speed': must be one of test_loss, "),
        ({"budget": 5}, "budget = 5: the baseline adamw is given 204,800 tokens"),
        ({"margin": -0.01}, "margin = -0.01: must be a number ≥ 0, the difference in the metric below which no"),
        ({"margin": "1 %"}, "margin = '1 %': must be a number"),
        ({"margin": True}, "margin = True: must be a number"),
        ({"budget": "many"}, "budget = 'many': must be a whole number of tokens"),
        ({"chosen_from": {"study": "g", "metric": "val_loss", "seeds": [9, 2]}}, "seeds = [1, 2, 3]: the runs were "
         "chosen by g on seed 2 too"),
        ({"chosen_from": {"study": "g", "seeds": []}}, "chosen_from: lacks metric"),
        ({"chosen_from": 3}, "chosen_from = 3: must be a mapping, which stages.choose writes"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_experiment_is_named(tmp_path, changes, message):
    params = composed(tmp_path / "params.yaml", "study=quickstart")
    with pytest.raises(ConfigError) as caught:
        resolve_study(params | changes)
    assert message in str(caught.value)


def test_a_ratio_of_accuracies_is_no_share(tmp_path):
    params = composed(tmp_path / "params.yaml", "study=quickstart")
    study, _ = resolve_study(params | condition(against="adamw", measure="tokens_per_second", at_most=1.5))
    assert study["falsified_by"]["when"][0]["at_most"] == 1.5


# --- choosing


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([7, 8], "runs chosen by grid on seeds 7, 8, by val_loss."),
        ([], "runs not chosen by rows yet: a first guess."),
    ],
)
def test_the_design_says_what_chose_the_runs(tmp_path, seeds, said):
    chosen = {"study": "grid", "metric": "val_loss", "seeds": seeds}
    results = write_study(
        tmp_path, hypothesis="h", falsified_by={"says": "s", "when": []}, chosen_from=chosen
    )
    assert tables.hypothesis_lines(summary.summarize(rows.read(results)))[-1].endswith(said)


def test_the_best_of_each_grid_is_written_for_another_study(tmp_path, monkeypatch):
    write_grid(tmp_path, study="quickstart")
    monkeypatch.chdir(tmp_path)
    choose.main(["quickstart"])
    text = (tmp_path / "conf/chosen/quickstart.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    found = YAML(typ="safe").load(text)
    assert found == {
        "chosen_from": {"study": "quickstart", "metric": "val_loss", "seeds": [1, 2, 3]},
        "runs": {"adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}},
    }
    assert "# adamw_lr_0p01_weight_decay_0p1: validation loss 2.100 ± 0.050" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "has no grid: there is nothing to choose from"),
        ({"metric": "test_loss"}, "metric = test_loss: choosing by test data would favour what is chosen"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(tmp_path, changes, message):
    results = write_grid(tmp_path)
    plan = json.loads((results / "configs/study.json").read_text())
    write_json(results / "configs/study.json", plan | copy.deepcopy(changes))
    with pytest.raises(ConfigError, match=message):
        choose.choose(results)


def test_a_grid_without_a_stable_run_is_refused(tmp_path):
    results = write_grid(tmp_path)
    for path in results.glob("*-3/metrics.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="no run of the grid adamw ended in all 3 seeds"):
        choose.choose(results)
