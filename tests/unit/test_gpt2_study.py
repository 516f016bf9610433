"""The numbers of the study gpt2 against one another: what its runs are to show can show in so few steps."""

from pathlib import Path

import pytest
from dvc.utils.hydra import compose_and_dump

from engine.errors import ConfigError
from engine.pruning.ramp import Ramp
from metrics.course import END, FEWEST
from stages.choose import choose
from stages.plan import read_params, resolve_study

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
RECOVERY = 100  # updates for which AdamWSPAM, as coded, cuts gradients after a reset


def composed(output: Path, *overrides: str, study: str = "gpt2") -> dict:
    compose_and_dump(output, str(CONF), None, "config", str(CONF), [f"study={study}", *overrides])
    return read_params(output)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The study, and the settings of each run's first seed."""
    study, configs = resolve_study(composed(tmp_path_factory.mktemp("gpt2") / "params.yaml"))
    return study, {run: configs[f"{run}-1"] for run in study["runs"]}


def evaluated(config) -> list[int]:
    """Steps after which a run is evaluated."""
    steps, every = config.training.steps, config.evaluation.eval_interval
    return sorted({*range(every, steps + 1, every), steps})


def test_resets_come_several_times_or_in_time_to_get_over(planned):
    _, runs = planned
    spam, legacy = runs["spam"], runs["adamwspam_legacy"]
    period, steps = spam.optimizer.spam_reset_steps, spam.training.steps
    assert (steps - 1) // period >= 3
    assert spam.optimizer.spam_warmup_steps / period == 150 / 500  # as published
    first = legacy.optimizer.legacy_reset_counts // 2
    assert RECOVERY <= legacy.training.steps - first < 2 * first


def test_every_run_ends_with_evaluations_that_have_a_scatter(planned):
    for config in planned[1].values():
        steps = config.training.steps
        assert sum(step > (1 - END) * steps for step in evaluated(config)) >= FEWEST


def test_runs_that_prune_share_a_ramp_that_begins_after_warm_up_and_is_over_before_the_end(planned):
    study, runs = planned
    ramps = {}
    for name, config in runs.items():
        if config.pruning.pruning != "none":
            ramp = ramps[name] = Ramp.of(config.pruning, config.training.steps)
            assert ramp.start >= config.schedule.warmup_steps
            ranked = [u for u in range(config.training.steps + 1) if ramp.is_due(u)]
            assert len(ranked) >= 10 and ranked[-1] == ramp.end
            # The best loss counts at the target sparsity: in some evaluations.
            assert sum(step >= ramp.end for step in evaluated(config)) >= FEWEST
    assert len(set(ramps.values())) == 1
    assert {"magnitude", "movement", "two_of_four", "bitter2_longer", "bitter3_longer"} < set(ramps)


def test_the_short_recipe_is_the_recipe_and_is_excused_from_equal_tokens_alone(planned):
    study, runs = planned
    whole, short = (runs[name] for name in ("recipe", "recipe_short"))
    apart = {k for k, value in whole.flat.items() if short.flat[k] != value}
    assert apart == {"run", "steps", "eval_interval"} and 2 * short.training.steps == whole.training.steps
    # Its time to a loss is a criterion like any other's.
    asked = {one["run"]: one for one in study["criteria"] if one["measure"] == "seconds_to_target"}
    assert asked["recipe_short"] == {**asked["recipe"], "run": "recipe_short"}
    assert asked["recipe"]["target"] in study["targets"]


def test_the_recipe_is_the_one_that_the_pilot_chose_on_a_seed_of_its_own(planned, tmp_path):
    study, runs = planned
    pilot, tried = resolve_study(composed(tmp_path / "params.yaml", study="gpt2_recipes"))
    chosen, short = tried["muon_faster-10"].flat, runs["recipe_short"].flat
    apart = {key for key, value in short.items() if chosen[key] != value}
    # What only measures, or concerns what is not in use.
    assert apart == {"study", "run", "seed", "latency_lengths", "attention_sequences", "monitor_interval"}
    assert not set(pilot["seeds"]) & set(study["seeds"])
    assert tried["adamw-10"].training == runs["adamw"].training


def test_the_grid_differs_from_the_study_in_learning_rates_alone(planned, tmp_path):
    """So that what it chooses is about the runs that were compared at one learning rate."""
    study, runs = planned
    grid, tried = resolve_study(composed(tmp_path / "params.yaml", study="gpt2_grid"))
    assert not set(grid["seeds"]) & set(study["seeds"])
    assert tried["adamw_lr_0p0006-10"].optimizer == runs["adamw"].optimizer
    measured = {"study", "run", "seed", "latency_lengths", "attention_sequences", "monitor_interval"}
    for name, config in tried.items():
        like = runs[name.partition("_")[0]].flat
        assert {key for key, value in config.flat.items() if like[key] != value} <= measured | {
            "lr",
            "muon_lr",
        }
    assert {name.partition("_")[0] for name in tried} == {"adamw", "spam", "muon"}


def test_the_tuned_study_is_the_grid_s_best_of_each_on_seeds_of_its_own(tmp_path):
    written = (CONF / "chosen" / "gpt2_grid.yaml").read_text(encoding="utf-8")
    assert written == choose(ROOT / "records" / "gpt2-grid-h200" / "results")
    grid, tried = resolve_study(composed(tmp_path / "grid.yaml", study="gpt2_grid"))
    tuned, runs = resolve_study(composed(tmp_path / "tuned.yaml", study="gpt2_tuned"))
    assert not set(tuned["seeds"]) & set(grid["seeds"])
    assert [tuned[key] for key in ("frozen", "axis", "budget")] == [
        grid[key] for key in ("frozen", "axis", "budget")
    ]
    assert set(tuned["runs"]) == set(grid["grid"])
    for name in tuned["runs"]:
        own = runs[f"{name}-1"].flat
        same = [
            cell
            for cell, config in tried.items()
            if {key for key, value in own.items() if config.flat[key] != value} == {"study", "run", "seed"}
        ]
        assert len(same) == 1 and same[0].startswith(f"{name}_")


@pytest.mark.parametrize("preset", ["gpt2_no_compile", "gpt2_16x8"])
def test_on_a_fallback_the_study_keeps_its_length(preset, tmp_path):
    study, configs = resolve_study(composed(tmp_path / "params.yaml", f"preset={preset}", "only=[adamw]"))
    training = configs["adamw-1"].training
    assert (training.steps, training.batch_size, study["expects"]["steps"]) == (240, 128, 240)


@pytest.mark.parametrize("dataset", ["tinyshakespeare", "stdlib"])
def test_data_sets_that_cannot_rank_optimizers_are_refused_with_another_to_take(dataset, tmp_path):
    with pytest.raises(
        ConfigError, match=f"dataset = '{dataset}': is refused .*use fineweb_edu or imdb_text"
    ):
        resolve_study(composed(tmp_path / "params.yaml", f"dataset={dataset}"))


def test_a_first_set_of_runs_is_a_study_by_itself(tmp_path):
    """What is left out is said, and costs the others nothing."""
    first = "[adamw,spam,adamwprune_*,magnitude,movement,mla]"
    study, _ = resolve_study(composed(tmp_path / "params.yaml", f"only={first}"))
    assert len(study["runs"]) == 9 and study["own_budget"] == [] and study["hypothesis"] == ""
    assert {one["run"] for one in study["criteria"]} == {
        "adamw",
        "adamwprune_bitter3",
        "magnitude",
        "movement",
    }
    assert "the hypothesis is about runs left out, and not decided" in study["said"]
    assert study["left_out"][:3] == ["adamw_adv", "adamw8bit", "muon"] and len(study["left_out"]) == 13
