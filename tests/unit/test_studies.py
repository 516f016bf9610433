"""Every study that is shipped composes and validates, and names runs that differ from its baseline."""

from pathlib import Path

import pytest
from dvc.utils.hydra import compose_and_dump

from engine.errors import ConfigError
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
        ("baseline=nobody", "baseline = 'nobody': must be one of the runs adamw, adamw_full_ac, sgd"),
        ("seeds=[1,1]", "must be distinct whole numbers"),
        ("metric=speed", "metric = 'speed': must be one of test_loss, val_loss"),
        ("heads=5", "runs.adamw: width = 128: must be a multiple of heads = 5"),
    ],
)
def test_a_mistake_in_a_study_is_named(tmp_path, override, message):
    params = composed(tmp_path / "params.yaml", "study=quickstart", override)
    with pytest.raises(ConfigError) as caught:
        resolve_study(params)
    assert message in str(caught.value)
