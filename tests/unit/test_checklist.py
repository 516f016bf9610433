"""The checklist before the first step, refused data sets, presets and the selection of runs."""

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest
from dvc.utils.hydra import compose_and_dump

from engine.config import resolve
from engine.errors import ConfigError
from engine.rundir import toml
from metrics.selection import chosen
from stages import checklist, plan, presets, progress
from stages.plan import read_params, resolve_study
from stages.requirements import selection_problem

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(output: Path, *overrides: str) -> dict:
    compose_and_dump(output, str(CONF), None, "config", str(CONF), list(overrides))
    return read_params(output)


def config(**values):
    return resolve({"batch_size": 12, "micro_batch_size": 2, "context": 32, "run": "a", **values}, "here")


# --- the checklist


def test_accumulation_and_tokens_follow_from_the_settings_of_the_step():
    checks = checklist.of_settings({"accumulation": 3, "tokens_per_step": 384}, config(processes=2))
    assert [(c.what, c.found, c.passed) for c in checks] == [
        ("accumulation", "3", True),
        ("tokens_per_step", "384", True),
    ]
    [alone] = checklist.of_settings({"accumulation": 3}, config())
    assert str(alone) == "FAIL  accumulation           6, expected 3"
    [whole] = checklist.of_settings({"accumulation": 1}, config(micro_batch_size=0, processes=2))
    assert whole.passed


def test_one_of_several_values_will_do():
    expects = {"dataset": ["text", "stdlib"], "compile": ["model", "blocks"]}
    dataset, compiled = checklist.of_settings(expects, config())
    assert dataset.passed and not compiled.passed
    assert checklist.words([compiled]) == ["compile is none, expected model or blocks"]


def test_a_run_with_its_own_budget_has_its_own_steps():
    assert not checklist.of_settings({"steps": 7}, config(), own_budget=["a"])
    assert not checklist.of_settings({"steps": 7}, config(), own_budget=["b"])[0].passed


@pytest.mark.parametrize(
    ("expects", "message"),
    [
        ([], "must be a mapping"),
        (
            {"batchsize": 3},
            r"expects\.batchsize: is no setting \(nearest: batch_size\), nor one of accumulation",
        ),
        ({"accumulation": "4"}, "must be a whole number ≥ 1"),
        ({"train_sha256": 4}, "must be text"),
        ({"compile": ["model", "all"]}, r"expects\.compile = 'all': must be one of none, blocks, model"),
    ],
)
def test_a_mistake_in_what_is_expected_is_named(expects, message):
    [problem] = checklist.problems(expects)
    assert re.search(message, problem), problem


def planned(tmp_path, monkeypatch, expects: dict, tokens: int = 900) -> Path:
    monkeypatch.chdir(tmp_path)
    configs = tmp_path / "results/here/configs"
    configs.mkdir(parents=True)
    (configs / "a-1.toml").write_text(toml(config(study="here")), encoding="utf-8")
    study = {"expects": expects, "seeds": [1, 2], "runs": {"a": {}}}
    (configs / "study.json").write_text(json.dumps(study), encoding="utf-8")
    meta = {"splits": {"train": {"tokens": tokens, "sha256_tokens": "a1"}}}
    (tmp_path / "tokens/here").mkdir(parents=True)
    (tmp_path / "tokens/here/meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return configs / "a-1.toml"


def test_all_lines_are_printed_and_a_failure_stops_the_run(tmp_path, monkeypatch, capsys):
    expects = {"batch_size": 12, "context": 1024, "train_tokens_at_least": 1000, "train_sha256": "a1"}
    path = planned(tmp_path, monkeypatch, expects)
    with pytest.raises(ConfigError, match="2 problems in the checklist of a-1") as caught:
        checklist.require(path)
    assert "context is 32, expected 1,024" in str(caught.value)
    assert "train_tokens is 900, expected ≥ 1,000, too few to rank runs by" in str(caught.value)
    lines = [line.removeprefix("checklist a-1: ")[:4] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["pass", "FAIL", "FAIL", "pass"]


def test_what_passes_is_kept_as_rows(tmp_path, monkeypatch):
    checks = checklist.require(planned(tmp_path, monkeypatch, {"train_tokens_at_least": 900}))
    assert checklist.as_rows(checks) == [
        {"what": "train_tokens", "expected": "≥ 900", "found": "900", "passed": True}
    ]


def test_without_tokens_their_checklist_cannot_pass(tmp_path, monkeypatch):
    path = planned(tmp_path, monkeypatch, {"train_tokens_at_least": 900})
    (tmp_path / "tokens/here/meta.json").unlink()
    with pytest.raises(ConfigError, match="no tokens yet"):
        checklist.require(path)
    study = path.with_name("study.json")
    study.unlink()
    assert checklist.require(path) == []  # by hand, without a plan


# --- in the plan


def test_the_plan_refuses_a_run_that_is_not_as_expected(tmp_path):
    params = composed(
        tmp_path / "p.yaml", "study=quickstart", "+expects={context: 256, dataset: [imdb_text]}"
    )
    with pytest.raises(ConfigError) as caught:
        resolve_study(params)
    assert caught.value.problems == [
        "all runs: context is 128, expected 256 (expects: if it is meant, change that too)",
        "all runs: dataset is stdlib, expected imdb_text (expects: if it is meant, change that too)",
    ]
    one = composed(tmp_path / "p.yaml", "study=quickstart", "+expects={weight_decay: 0.1}")
    with pytest.raises(ConfigError, match=r"runs\.no_decay, sgd: weight_decay is 0\.0, expected 0\.1"):
        resolve_study(one)


def test_a_step_that_is_not_evaluated_has_no_perplexity(tmp_path):
    overrides = ("study=quickstart", "+perplexity_at=[50,75,100]")
    with pytest.raises(
        ConfigError, match="perplexity_at: 75 steps are not evaluated with eval_interval = 50"
    ):
        resolve_study(composed(tmp_path / "p.yaml", *overrides))
    whole = composed(tmp_path / "p.yaml", *overrides, "eval_interval=25")
    assert resolve_study(whole)[0]["perplexity_at"] == [50, 75, 100]


def test_a_refused_data_set_is_refused_with_the_reason(tmp_path):
    why = "+refused_datasets={stdlib: too small to rank optimizers}"
    with pytest.raises(ConfigError, match="dataset = 'stdlib': is refused by the study: too small to rank"):
        resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", why))
    with pytest.raises(ConfigError, match=r"refused_datasets = 'stdli': must be one of .*nearest: stdlib"):
        resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", "+refused_datasets={stdli: x}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+own_budget=[nobody]", "own_budget = 'nobody': must be runs: adamw"),
        ("+own_budget=[adamw]", "own_budget: adamw is the baseline"),
        ("+own_budget=[sgd]", "own_budget: runs.sgd is given the 204,800 tokens of the baseline"),
        ("+own_budget=sgd", "own_budget = 'sgd': must be a list of runs"),
        ("+perplexity_at=[10,10]", "perplexity_at = .*must be a list of distinct steps above 0"),
        ("+perplexity_at=[1.5]", "perplexity_at = .*must be a list of distinct steps above 0"),
        ("+targets=[-3]", "targets = .*must be a list of distinct validation losses above 0"),
        ("only=[adamm]", r"only = 'adamm': must be runs or patterns of them, .*\(nearest: adamw\)"),
        ("only=[sgd]", "only = .*leaves out the baseline adamw"),
        ("only=sgd", "only = 'sgd': must be a list of runs or patterns"),
    ],
)
def test_a_mistake_in_what_is_asked_of_the_runs_is_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", override))


def test_a_longer_run_must_be_declared(tmp_path):
    overrides = ("study=quickstart", "+runs.sgd.steps=121")
    with pytest.raises(ConfigError, match="or list it in own_budget, which shows it apart"):
        resolve_study(composed(tmp_path / "p.yaml", *overrides))
    study, configs = resolve_study(composed(tmp_path / "p.yaml", *overrides, "+own_budget=[sgd]"))
    assert configs["sgd-1"].training.steps == 121 and study["own_budget"] == ["sgd"]


def test_epochs_in_place_of_a_study_s_steps(tmp_path):
    """Both are refused; `steps` at its default is not set."""
    asked = ("study=quickstart", "epochs=0.5", "warmup_epochs=0.1")
    with pytest.raises(ConfigError, match=r"steps = 90: would do nothing with epochs = 0\.5"):
        resolve_study(composed(tmp_path / "p.yaml", *asked, "steps=90", "warmup_steps=0"))
    with pytest.raises(
        ConfigError, match=r"warmup_steps = 20: would do nothing with warmup_epochs = 0\.1; it needs"
    ):
        resolve_study(composed(tmp_path / "p.yaml", *asked))
    _, configs = resolve_study(composed(tmp_path / "p.yaml", *asked, "steps=100", "warmup_steps=0"))
    with pytest.raises(
        ConfigError, match=r"budget = 7: only the token files tell how many tokens epochs = 0\.5 are"
    ):
        resolve_study(composed(tmp_path / "p.yaml", *asked, "steps=100", "warmup_steps=0", "+budget=7"))
    written = tomllib.loads(toml(configs["sgd-1"]))
    assert written["training"]["epochs"] == 0.5 and "steps" not in written["training"]
    assert written["schedule"]["warmup_epochs"] == 0.1 and "warmup_steps" not in written["schedule"]


# --- a selection of runs


def test_patterns_choose_runs_and_leave_others_out():
    runs = ["adamw", "mla", "mla_reciprocal", "muon"]
    assert chosen(runs, ["m*", "!mla_*"]) == ["mla", "muon"]
    assert chosen(runs, ["!mla*"]) == ["adamw", "muon"]
    assert chosen(runs, []) == runs and chosen(runs, ["sgd"]) == []


def test_a_run_may_be_left_out_by_name(tmp_path):
    study, _ = resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", 'only=["!sgd"]'))
    assert list(study["runs"]) == ["adamw", "adamw_full_ac", "no_decay"]


def test_only_some_runs_and_what_goes_with_them(tmp_path):
    params = composed(
        tmp_path / "p.yaml",
        "study=quickstart",
        "only=[adamw,no_*]",
        "+criteria=[{run: sgd, measure: test_loss, at_most: 3}, {run: adamw, measure: test_loss, at_most: 3}]",
        "+hypothesis=sgd is worse",
        "+falsified_by={says: it is not, when: [{run: sgd, verdict: better}]}",
    )
    assert params["selected"] == ["adamw", "no_decay"]
    study, configs = resolve_study(params)
    assert set(configs) == {f"{run}-{seed}" for run in ("adamw", "no_decay") for seed in (1, 2, 3)}
    assert [one["run"] for one in study["criteria"]] == ["adamw"] and not study["hypothesis"]
    assert study["said"] == [
        "only 2 of 4 runs: without adamw_full_ac, sgd",
        "1 criterion is of a run left out, and not looked at",
        "the hypothesis is about runs left out, and not decided",
    ]
    heads = ("study=quickstart", "+runs.sgd.layers=2", "+runs.sgd.gradient_norm_layers=[2]")
    with pytest.raises(ConfigError, match="blocks are numbered 0 to 1"):
        resolve_study(composed(tmp_path / "p.yaml", *heads))
    resolve_study(composed(tmp_path / "p.yaml", *heads, "only=[adamw]"))  # a run left out stops nobody
    whole, _ = resolve_study(composed(tmp_path / "p.yaml", "study=quickstart"))
    assert list(whole["runs"]) == ["adamw", "adamw_full_ac", "no_decay", "sgd"] and not whole["said"]


def test_two_criteria_of_runs_left_out_are_two(tmp_path):
    of_sgd = [f"{{run: sgd, measure: {one}, at_most: 3}}" for one in ("test_loss", "val_loss")]
    params = composed(
        tmp_path / "p.yaml", "study=quickstart", "only=[adamw]", f"+criteria=[{', '.join(of_sgd)}]"
    )
    assert resolve_study(params)[0]["said"][1] == "2 criteria are of runs left out, and not looked at"


# --- runs that are the same


def test_a_preset_that_makes_two_runs_the_same_is_told_with_both_names(tmp_path):
    latent = ("study=gpt2", "preset=gpt2_mla")
    with pytest.raises(ConfigError) as caught:
        resolve_study(composed(tmp_path / "p.yaml", *latent))
    assert caught.value.problems == [
        "runs.adamw, mla: all settings are equal, so mla would be adamw trained twice; leave one out "
        "(-S 'only=[\"!mla\"]'), or list it in repeats if that is meant"
    ]
    _, configs = resolve_study(composed(tmp_path / "p.yaml", *latent, "only=['!mla']"))
    assert configs["adamw-1"].model.attention_form == "latent" and "mla-1" not in configs


def test_the_baseline_is_never_the_one_to_leave_out(tmp_path):
    params = composed(tmp_path / "p.yaml", "study=quickstart")
    params |= {"runs": {"again": {}, "adamw": {}}, "selected": ["again", "adamw"]}
    with pytest.raises(ConfigError, match=r"runs.again, adamw: all .* one out \(-S 'only=\[\"!again\"\]'"):
        resolve_study(params)


def test_runs_are_the_same_by_what_is_in_effect_not_by_what_is_said(tmp_path):
    """What the study has, said again, is no difference."""
    params = composed(tmp_path / "p.yaml", "study=quickstart", "+runs.again={width: 128}")
    assert params["width"] == 128
    with pytest.raises(ConfigError, match="runs.adamw, again: all settings are equal"):
        resolve_study(params)


def test_a_run_may_be_said_to_repeat_another(tmp_path):
    """To see what the machine alone changes."""
    again = ("study=quickstart", "+runs.again={}")
    study, configs = resolve_study(composed(tmp_path / "p.yaml", *again, "+repeats=[again]"))
    assert "again-1" in configs and study["repeats"] == ["again"]
    left = resolve_study(composed(tmp_path / "p.yaml", *again, "+repeats=[again]", "only=[adamw]"))[0]
    assert left["repeats"] == []
    for wrong, message in (
        ("[agian]", "repeats = 'agian': must be runs: .*nearest: again"),
        ("again", "must be a list of runs"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_study(composed(tmp_path / "p.yaml", *again, f"+repeats={wrong}"))


def test_a_run_that_a_preset_rules_out_can_be_left_out(tmp_path):
    fallback = ("study=gpt2", "preset=gpt2_no_compile")
    with pytest.raises(ConfigError) as caught:
        resolve_study(composed(tmp_path / "p.yaml", *fallback))
    assert caught.value.problems == [
        "runs.mla_reciprocal: attention = 'flex': is fused in a compiled graph only; set compile = 'model'; or leave "
        "it out: -S 'only=[\"!mla_reciprocal\"]'"
    ]
    resolve_study(composed(tmp_path / "p.yaml", *fallback, "only=['!mla_reciprocal']"))
    several = ("study=gpt2", "+runs.a={heads: 5}", "+runs.b={heads: 5}")
    with pytest.raises(ConfigError, match=r"heads = 5; or leave them out: -S 'only=\[\"!a\",\"!b\"\]'"):
        resolve_study(composed(tmp_path / "p.yaml", *several))
    with pytest.raises(ConfigError, match="all runs: width = 768: must be a multiple of heads = 5\n"):
        resolve_study(composed(tmp_path / "p.yaml", "study=gpt2", "heads=5"))


def test_a_selection_that_dvc_would_not_train_is_refused():
    assert selection_problem({"runs": {"a": {}, "b": {}}, "selected": ["a"], "only": []}).startswith(
        "selected"
    )
    assert selection_problem({"runs": {"a": {}, "b": {}}, "selected": ["a"], "only": ["a"]}) is None
    assert selection_problem({"runs": {"a": {}}}) is None


# --- presets


def test_a_presets_difference_is_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "DIRECTORY", tmp_path)
    (tmp_path / "ground.yaml").write_text("preset: ground\nlr: 0.1\nlayers: 3\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text(
        "defaults: [ground, _self_]\npreset: other\nlayers: 5\nsteps: 9\nexpects: {steps: 9}\n",
        encoding="utf-8",
    )
    assert presets.settings("other") == {"lr": 0.1, "layers": 5, "steps": 9}
    said = presets.lines(
        "other", "mine", {"lr": 0.2, "layers": 5, "steps": 9, "data_dir": "x"}, {"steps": 100}, {"data_dir"}
    )
    assert said == [
        "preset other: same as ground, except layers = 5 (there 3), steps = 9 (there 100)",
        "study mine: same as preset other, except lr = 0.2 (there 0.1)",
    ]
    with pytest.raises(ConfigError, match="preset 'third': no such file; there are ground, other"):
        presets.parents("third")
    (tmp_path / "ground.yaml").write_text("defaults: [other]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="preset other: builds on itself"):
        presets.parents("other")


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "preset").glob("gpt2_*.yaml")))
def test_every_gpt2_preset_keeps_the_step_and_passes_its_own_checklist(name, tmp_path):
    values = composed(tmp_path / "p.yaml", "study=wikitext2_best", f"preset={name}") | presets.settings(name)
    assert values["preset"] == name
    whole = resolve(
        {k: v for k, v in presets.settings(name).items()} | {"dataset": "imdb_text", "tokenizer": "gpt2"}, ""
    )
    checks = checklist.of_settings(values["expects"], whole)
    assert [c.what for c in checks if not c.passed] == []
    assert whole.training.batch_size * whole.model.context == 131_072
    assert list(checklist.problems(values["expects"])) == []


def test_the_fallbacks_are_the_baseline_but_for_what_they_say(tmp_path):
    defaults = {}
    said = {
        name: presets.lines(name, "x", {}, defaults)[0]
        for name in ("gpt2_no_compile", "gpt2_16x8", "gpt2_mla")
    }
    assert said["gpt2_no_compile"] == (
        "preset gpt2_no_compile: same as gpt2_baseline, except compile = none (there model)"
    )
    assert said["gpt2_16x8"] == (
        "preset gpt2_16x8: same as gpt2_no_compile, except micro_batch_size = 16 (there 32)"
    )
    assert "attention_form = latent" in said["gpt2_mla"]


def test_a_studys_own_settings_win_over_a_preset(tmp_path):
    values = composed(tmp_path / "p.yaml", "study=quickstart", "preset=gpt2_16x8")
    assert (values["layers"], values["micro_batch_size"], values["compile"]) == (3, 16, "none")
    assert values["expects"]["accumulation"] == 8 and values["expects"]["context"] == 1024
    with pytest.raises(ConfigError, match="context is 128, expected 1,024"):
        resolve_study(values)


# --- how far a study is


def test_what_is_left_takes_as_long_as_what_is_done_by_the_token(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    params = composed(
        tmp_path / "params.yaml", "study=quickstart", "+runs.sgd.steps=200", "+own_budget=[sgd]"
    )
    (tmp_path / "conf").symlink_to(CONF)
    assert params and plan.read_params(Path("params.yaml")) == params
    monkeypatch.setattr("sys.argv", ["plan"])
    plan.main()
    configs = tmp_path / "results/quickstart/configs"
    assert str(progress.of_study(configs)) == "0 of 12 done"
    assert progress.of_study(configs).left[:5] == (
        "adamw-1",
        "adamw_full_ac-1",
        "no_decay-1",
        "sgd-1",
        "adamw-2",
    )
    finish(configs, "adamw-1", train_seconds=50.0, eval_seconds=10.0)
    # 2 adamw and 6 others as long, 3 sgd twice as long
    assert progress.of_study(configs).seconds_left == pytest.approx(60 * (2 + 6 + 3 * 2))
    finish(configs, "sgd-1", train_seconds=30.0)
    found = progress.of_study(configs)
    other = (60 + 15) / 2  # the mean of the paces seen
    assert found.seconds_left == pytest.approx(2 * 60 + 6 * other + 2 * 30)
    assert str(found) == "2 of 12 done, about 7 min to go"
    assert "adamw-1" not in found.left and len(found.left) == 10
    plan.main()
    assert "2 of 12 done, about 7 min to go; to train: adamw_full_ac-1, " in capsys.readouterr().err
    assert str(progress.Progress(3, 3, 0.0)) == "3 of 3 done"
    (configs / "adamw-1.toml").write_text((configs / "adamw-2.toml").read_text())  # planned otherwise since
    assert progress.of_study(configs).done == 1


def finish(configs: Path, name: str, **seconds: float) -> None:
    digest = hashlib.sha256((configs / f"{name}.toml").read_bytes()).hexdigest()
    (configs.parent / name).mkdir()
    metrics = {"status": "complete", "config_sha256": digest, **seconds}
    (configs.parent / name / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


def test_durations_in_words():
    assert [progress.duration(s) for s in (4, 90, 3599, 7500)] == ["4 s", "2 min", "1 h 00 min", "2 h 05 min"]


# --- criteria on ratios and times


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ("measure: test_loss, against: adamw", r"criteria\[0\]\.against = 'adamw': is the run itself"),
        (
            "measure: test_loss, against: nobody",
            r"criteria\[0\]\.against = 'nobody': must be one of the runs",
        ),
        ("measure: speedup, against: sgd", "speedup is a ratio already"),
        ("measure: seconds_to_target", r"criteria\[0\]\.target = None: must be a validation loss above 0"),
        ("measure: steady_train_seconds, target: 3", "target: goes with measure = 'seconds_to_target'"),
        ("measure: test_loss, target: 3", "target: goes with measure = 'seconds_to_target'"),
    ],
)
def test_a_mistake_in_a_criterion_on_a_ratio_or_time_is_named(tmp_path, one, message):
    override = f"+criteria=[{{run: adamw, at_most: 2, {one}}}]"
    with pytest.raises(ConfigError, match=message):
        resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", override))


def test_a_run_may_have_criteria_on_its_figure_and_on_its_ratio(tmp_path):
    both = "{run: sgd, measure: test_loss, at_most: 3}, {run: sgd, measure: test_loss, against: adamw, at_most: 2}"
    study, _ = resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", f"+criteria=[{both}]"))
    assert len(study["criteria"]) == 2
    with pytest.raises(ConfigError, match=r"criteria\[2\]: test_loss of sgd is criteria\[0\]'s"):
        three = f"+criteria=[{both}, {{run: sgd, measure: test_loss, at_least: 1}}]"
        resolve_study(composed(tmp_path / "p.yaml", "study=quickstart", three))
