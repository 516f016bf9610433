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
    assert all(own for run, own in study["runs"].items() if run != study["baseline"])


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
        ("heads=5", "runs.adamw: width = 128: must be a multiple of heads = 5"),
        ("axis=epochs", "axis = 'epochs': must be one of tokens, steps, flops, seconds"),
        ("frozen=lr", "frozen = 'lr': must be a list of settings"),
        ("frozen=[batchsize]", "frozen: 'batchsize' is an unknown setting (nearest: batch_size)"),
        ("frozen=[lr]", "runs.sgd.lr = 0.1: lr is frozen by the study, which has 0.002"),
        (
            "+runs.sgd.steps=90",
            "runs.sgd: is given 184,320 tokens, the baseline adamw 204,800, and the study compares at equal tokens "
            "(axis = 'tokens'); change its steps, or the axis",
        ),
    ],
)
def test_a_mistake_in_a_study_is_named(tmp_path, override, message):
    params = composed(tmp_path / "params.yaml", "study=quickstart", override)
    with pytest.raises(ConfigError) as caught:
        resolve_study(params)
    assert message in str(caught.value)


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
