"""Every study that is shipped composes and validates, and names runs that differ from its baseline."""

from pathlib import Path

import pytest
from dvc.utils.hydra import compose_and_dump

from engine.errors import ConfigError
from metrics.rows import read
from stages import plan
from stages.plan import read_params, resolve_study

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(output: Path, *overrides: str) -> dict:
    compose_and_dump(output, str(CONF), None, "config", str(CONF), list(overrides))
    return read_params(output)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "study").glob("*.yaml")))
def test_every_shipped_study_is_valid(name, tmp_path):
    study, configs = resolve_study(composed(tmp_path / "params.yaml", f"study={name}"))
    assert study["study"] == name
    assert set(configs) == {f"{run}-{seed}" for run in study["runs"] for seed in study["seeds"]}
    assert len({config.data for config in configs.values()}) == 1
    baseline = study["runs"][study["baseline"]]
    assert all(own != baseline for run, own in study["runs"].items() if run != study["baseline"])
    if name.startswith("wikitext2"):
        assert study["hypothesis"] and study["falsified_by"] and study["frozen"]


def test_the_comparison_of_optimizers_takes_what_was_chosen_and_other_seeds(tmp_path):
    study, configs = resolve_study(composed(tmp_path / "params.yaml", "study=wikitext2_optimizers"))
    grid, _ = resolve_study(composed(tmp_path / "params.yaml", "study=wikitext2_optimizer_grid"))
    assert study["chosen_from"]["study"] == "wikitext2_optimizer_grid" == grid["study"]
    assert list(study["runs"]) == list(grid["grid"])
    assert not set(study["seeds"]) & set(grid["seeds"])
    settings = {name: configs[f"{name}-1"].optimizer.optimizer for name in study["runs"]}
    assert settings == {name: name for name in grid["grid"]}
    # Apart from what is chosen, the two studies train alike.
    chosen = {"optimizer", "lr", "weight_decay", "muon_lr", "muon_weight_decay"}
    mine, theirs = (s["settings"] | {k: None for k in chosen} for s in (study, grid))
    apart = {k for k in mine if mine[k] != theirs[k]}
    assert apart == {"eval_interval", "gradient_norm_layers", "activation_norm_layers"}


def test_an_inherited_setting_reaches_only_the_runs_in_which_it_has_an_effect(tmp_path):
    _, configs = resolve_study(composed(tmp_path / "params.yaml", "study=quickstart", "momentum=0.8"))
    assert configs["sgd-1"].optimizer.momentum == 0.8
    assert configs["adamw-1"].optimizer.momentum == 0.9  # the default, and absent from its TOML


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+runs.adamw.lrr=1", "runs.adamw.lrr: unknown setting"),
        ("+runs.adamw.tokenizer=chars", "runs.adamw.tokenizer: is the study's, not a run's"),
        ("+runs.adamw.momentum=0.5", "runs.adamw.momentum = 0.5: would do nothing with optimizer = adamw"),
        (
            "baseline=nobody",
            "baseline = 'nobody': must be one of the runs adamw, adamw_full_ac, no_decay, sgd",
        ),
        ("seeds=[1,1]", "must be distinct whole numbers"),
        ("metric=speed", "metric = 'speed': must be one of test_loss, val_loss"),
        ("heads=5", "all runs: width = 128: must be a multiple of heads = 5"),
        ("axis=epochs", "axis = 'epochs': must be one of tokens, samples, steps, flops, seconds"),
        ("frozen=lr", "frozen = 'lr': must be a list of settings"),
        ("frozen=[batchsize]", "frozen: 'batchsize' is an unknown setting (nearest: batch_size)"),
        ("frozen=[lr]", "runs.sgd.lr = 0.1: lr is frozen by the study, which has 0.002"),
        (
            "+runs.sgd.steps=90",
            "runs.sgd: is given 184,320 tokens, the baseline adamw 204,800, and the study compares at equal tokens "
            "(axis = 'tokens'); change its steps, or the axis, or list it in own_budget, which shows it apart",
        ),
    ],
)
def test_a_mistake_in_a_study_is_named(tmp_path, override, message):
    params = composed(tmp_path / "params.yaml", "study=quickstart", override)
    with pytest.raises(ConfigError) as caught:
        resolve_study(params)
    assert message in str(caught.value)


def test_equal_samples_are_checked_before_anything_runs(tmp_path):
    params = composed(tmp_path / "params.yaml", "study=quickstart", "axis=samples", "+runs.sgd.steps=90")
    with pytest.raises(
        ConfigError, match="runs.sgd: is given 1,440 samples, the baseline adamw 1,600, and the study"
    ):
        resolve_study(params)


@pytest.mark.parametrize(
    "overrides",
    [
        ["axis=steps", "frozen=[]", "+runs.sgd.batch_size=32"],  # as many steps, twice the tokens
        ["frozen=[]", "+runs.sgd.batch_size=32", "+runs.sgd.steps=50"],  # as many tokens, half the steps
        ["axis=flops", "+runs.sgd.steps=90"],  # only the runs can tell
        ["axis=seconds", "+runs.sgd.steps=90"],
        ["frozen=[lr]", "runs.sgd.lr=0.002"],  # said again, not changed
    ],
    ids="; ".join,
)
def test_runs_may_differ_in_what_the_axis_and_the_study_leave_free(tmp_path, overrides):
    study, _ = resolve_study(composed(tmp_path / "params.yaml", "study=quickstart", *overrides))
    assert study["axis"] in ("tokens", "steps", "flops", "seconds")


def test_a_study_that_says_nothing_compares_at_equal_tokens_and_freezes_nothing(tmp_path):
    params = composed(tmp_path / "params.yaml", "study=quickstart", "~axis", "~frozen")
    study, _ = resolve_study(params)
    assert (study["axis"], study["frozen"]) == ("tokens", [])


def test_the_plan_writes_down_what_the_comparison_must_keep_to(tmp_path, monkeypatch):
    params = composed(tmp_path / "params.yaml", "study=quickstart", "axis=steps", "frozen=[width]")
    assert "axis" in params
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plan"])
    plan.main()
    written = read(tmp_path / "results" / "quickstart")
    assert (written.study.axis, written.study.frozen) == ("steps", ("width",))
    assert {one.state for one in written.runs} == {"missing"}


# --- scaling and criteria

PAIRS = {
    "small_2": {"reference": "small_1", "kind": "strong"},
    "weak_2": {"reference": "small_1", "kind": "weak"},
}
CRITERIA = [
    {"run": "weak_2", "measure": "speedup", "at_least": 1.8},
    {"run": "small_1", "measure": "test_loss", "at_most": 5.0},
]
SCALED = {
    "small_1": {},
    "small_2": {"processes": 2},
    "weak_2": {"processes": 2, "batch_size": 32, "steps": 50, "lr": 0.004},
}


def scaled(tmp_path, *overrides: str, **changes) -> dict:
    """The quickstart's settings with runs in one and two processes; `changes` replace keys of the study."""
    params = composed(tmp_path / "params.yaml", "study=quickstart", *overrides)
    base = {"baseline": "small_1", "runs": SCALED, "frozen": [], "scaling_probe_steps": 5}
    base["selected"] = list(SCALED)
    return params | base | {"scaling": PAIRS, "criteria": CRITERIA} | changes


def test_a_study_declares_scaling_and_criteria_and_the_plan_writes_them_down(tmp_path, monkeypatch):
    params = scaled(tmp_path)
    study, _ = resolve_study(params)
    assert (study["scaling"], study["criteria"]) == (PAIRS, CRITERIA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plan"])
    monkeypatch.setattr(plan, "read_params", lambda _: params)
    plan.main()
    written = read(tmp_path / "results" / "quickstart").study
    assert (written.scaling, written.criteria) == (PAIRS, tuple(CRITERIA))


def test_a_study_that_declares_neither_has_neither(tmp_path):
    study, _ = resolve_study(composed(tmp_path / "params.yaml", "study=quickstart"))
    assert (study["scaling"], study["criteria"]) == ({}, [])


def pair(run="small_2", **changes):
    return {"scaling": PAIRS | {run: PAIRS[run] | changes}}


def run(name, **settings):
    return {"runs": SCALED | {name: SCALED[name] | settings}}


def criterion(**changes):
    return {"criteria": [CRITERIA[0] | changes]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": ["small_2"]}, "scaling = ['small_2']: must be a mapping of runs, each to its reference"),
        ({"scaling": {"smal_2": PAIRS["small_2"]}}, "(nearest: small_2)"),
        ({"scaling": {"small_2": "small_1"}}, "scaling.small_2 = 'small_1': must be a mapping with reference and"),
        ({"scaling": {"small_2": {"kind": "strong"}}}, "scaling.small_2: lacks reference"),
        (pair(refernce="small_1"), "scaling.small_2.refernce: unknown key (nearest: reference)"),
        (pair(reference="small1"), "scaling.small_2.reference = 'small1': must be one of the runs small_1, small_2, "
         "weak_2 (nearest: small_1)"),
        (pair(reference="small_2"), "scaling.small_2.reference = 'small_2': is the run itself"),
        (pair(kind="storng"), "scaling.small_2.kind = 'storng': must be one of strong, weak (nearest: strong)"),
        (pair(kind="weak"), "scaling.small_2.kind = 'weak': is the same batch_size for each process, which would be "
         "batch_size = 32 with the 16 of small_1; runs.small_2 has 16"),
        (pair("weak_2", kind="strong"), "scaling.weak_2.kind = 'strong': is the same batch_size, which would be "
         "batch_size = 16"),
        (run("small_2", processes=1), "scaling.small_2: runs.small_2.processes = 1: must be 2 or more"),
        (run("small_1", processes=4), "scaling.small_2.reference: runs.small_1.processes = 4: must be 1"),
        (run("small_2", width=64), "scaling.small_2: runs.small_2 has width = 64, small_1 128; between them only "
         "spreading, batch, steps and lr may differ"),
        (run("small_2", cpu_threads=1), "scaling.small_2: runs.small_2 has cpu_threads = 1, small_1 0"),
        (run("small_2", scaling_probe_steps=0), "scaling.small_2: runs.small_2.scaling_probe_steps = 0: must be 1 or "
         "more, for its steps to be timed"),
        ({"criteria": {"speedup": 1.8}}, "criteria = {'speedup': 1.8}: must be a list, each with run, measure"),
        ({"criteria": ["fast"]}, "criteria[0] = 'fast': must be a mapping"),
        ({"criteria": [{"run": "small_1", "at_most": 1}]}, "criteria[0]: lacks measure"),
        (criterion(atleast=2), "criteria[0].atleast: unknown key (nearest: at_least)"),
        (criterion(run="weak"), "criteria[0].run = 'weak': must be one of the runs small_1, small_2, weak_2 "
         "(nearest: weak_2)"),
        (criterion(measure="speedpu"), "criteria[0].measure = 'speedpu': must be one of test_loss, "),
        (criterion(measure="speedpu"), "efficiency (nearest: speedup)"),
        (criterion(run="small_1"), "criteria[0].measure = 'speedup': scaling does not declare 'small_1'"),
        ({"criteria": [{"run": "small_1", "measure": "test_loss"}]}, "criteria[0]: lacks at_least or at_most"),
        (criterion(at_least="high"), "criteria[0].at_least = 'high': must be a finite number"),
        (criterion(at_least=True), "criteria[0].at_least = True: must be a finite number"),
        (criterion(at_most=1.5), "criteria[0]: at_least = 1.8 is above at_most = 1.5"),
        (criterion(measure="test_accuracy", at_least=91), "criteria[0].at_least = 91: must be a share from 0 to 1 "
         "(0.91 for 91 %)"),
        (criterion(measure="test_accuracy", at_least=0.9), "criteria[0].measure = 'test_accuracy': runs on text have "
         "none; must be one of test_loss, test_perplexity, "),
        (criterion(measure=["speedup"]), "criteria[0].measure = ['speedup']: must be one of test_loss, "),
        (criterion(measure="efficiency", at_least=0.5, at_most=90), "criteria[0].at_most = 90: must be a share from "
         "0 to 2 (0.9 for 90 %)"),
        (criterion(measure="efficiency", at_least=90), "criteria[0].at_least = 90: must be a share from 0 to 1"),
        (criterion(at_least=-1), "criteria[0].at_least = -1: must be above 0, as every speedup is"),
        (criterion(at_least=4.1), "criteria[0].at_least = 4.1: must be at most 4, twice the processes of runs."),
        (criterion(at_most=180), "criteria[0].at_most = 180: must be at most 4, twice the processes of runs.weak_2"),
        *((criterion(measure=name, at_least=0.5, at_most=-2), f"criteria[0].at_most = -2: must be above 0, as every "
           f"{name} is") for name in ("train_seconds", "tokens_per_second", "peak_memory_gib", "test_loss")),
        ({"criteria": [*CRITERIA, CRITERIA[0] | {"at_least": 1.9}]}, "criteria[2]: speedup of weak_2 is criteria[0]'s"
         ": put both bounds there"),
    ],
)  # fmt: skip
def test_a_mistake_in_scaling_or_criteria_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve_study(scaled(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        criterion(at_least=4),
        criterion(measure="efficiency", at_least=1, at_most=2),
        criterion(measure="test_perplexity", at_least=1),
        {
            "criteria": [
                *CRITERIA,
                CRITERIA[0] | {"run": "small_2"},
                CRITERIA[0] | {"measure": "efficiency", "at_least": 0},
            ]
        },
    ],
)
def test_what_can_just_be_met_is_a_criterion(tmp_path, changes):
    study, _ = resolve_study(scaled(tmp_path, **changes))
    assert study["criteria"] == changes["criteria"]


@pytest.mark.parametrize("name", ["test_perplexity", "test_bits_per_byte"])
def test_a_classifier_has_nothing_that_is_of_text(tmp_path, name):
    agnews = composed(
        tmp_path / "params.yaml", "study=agnews", f"criteria=[{{run: small_1, measure: {name}, at_least: 1}}]"
    )
    with pytest.raises(
        ConfigError, match=f"'{name}': classifiers have none; must be one of test_loss, test_acc"
    ):
        resolve_study(agnews)


@pytest.mark.parametrize(
    "changes", [{}, {"criteria": [{"run": "one", "measure": "test_loss", "at_most": 2}]}]
)
def test_a_run_s_name_is_text(tmp_path, changes):
    """YAML reads 1 as a number, of which no name is near."""
    with pytest.raises(ConfigError) as caught:
        resolve_study(scaled(tmp_path, baseline="first", runs={1: {}, "small_1": {}}, **changes))
    assert str(caught.value).endswith("runs: the name 1 must be text: write it in quotes, '1'")


def test_all_mistakes_are_told_at_once(tmp_path):
    changes = pair(kind="week", reference="nobody") | criterion(measure="fast", at_least=None)
    with pytest.raises(ConfigError) as caught:
        resolve_study(scaled(tmp_path, **changes, metric="speed"))
    said = str(caught.value)
    assert "5 problems" in said and said.count("scaling.small_2.") == 2 and said.count("criteria[0].") == 2


def test_what_goes_with_another_batch_or_number_of_steps_may_differ(tmp_path):
    free = {"warmup_steps": 10, "eval_interval": 25, "log_interval": 5, "shard_samples": False}
    free |= {"on_shared_samples": "report", "data_parallel": "fsdp"}
    study, _ = resolve_study(scaled(tmp_path, **run("weak_2", **free)))
    assert study["runs"]["weak_2"]["warmup_steps"] == 10


@pytest.mark.parametrize("metric", ["test_accuracy", "val_accuracy"])
def test_accuracy_is_the_metric_of_labelled_data_only(metric):
    from stages.study import study_problems

    study = {
        "study": "s",
        "question": "q",
        "baseline": "a",
        "metric": metric,
        "seeds": [1],
        "runs": {"a": {}},
    }
    study |= {"axis": "tokens", "frozen": [], "scaling": {}, "criteria": [], "to_beat": {}}
    assert study_problems(study, "ag_news") == []
    assert study_problems(study, "wikitext2") == [
        f"metric = '{metric}': must be one of test_loss, val_loss; of labelled data only (dataset = 'wikitext2' is "
        "text)"
    ]
    assert study_problems(study | {"metric": "speed"}, "ag_news") == [
        "metric = 'speed': must be one of test_loss, val_loss, test_accuracy, val_accuracy"
    ]
