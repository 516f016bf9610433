"""The seed of the weights and that of the data order, each by itself; evaluations follow from neither."""

import pytest
import torch
from engine_runs import TALKING, assert_same_weights, ledger, read_json, untimed, weights, write_dialogues

from engine import seeds
from engine.build import build_model
from engine.config import ConfigError, resolve
from engine.data.prepare import open_tokens
from engine.launch import tokens_for
from engine.parallel import Ranks
from engine.tasks import next_token


def facts(run) -> tuple[str, str]:
    """The hash of the samples that were trained on, and of what was scored."""
    metrics = read_json(run / "metrics.json")
    return metrics["data_order_sha256"], metrics["evaluation_sha256"]


def first_weights(config) -> dict:
    return dict(build_model(config, 256, Ranks(0, 1, torch.device("cpu"))).state_dict())


def test_the_order_changes_while_the_weights_stay_and_the_other_way_round(lab):
    plain, other = lab.train(run="plain", seed=3), lab.train(run="other", seed=4)
    order, weight = lab.train(run="order", seed=3, data_seed=4), lab.train(run="weight", seed=4, data_seed=3)
    assert facts(order) == facts(other) != facts(plain) == facts(weight)
    assert {facts(run)[1] for run in (plain, other, order, weight)} == {facts(plain)[1]}
    mine, same, another = (
        first_weights(lab.config(**c)) for c in ({"seed": 3}, {"seed": 3, "data_seed": 4}, {"seed": 4})
    )
    assert_same_weights(mine, same)
    assert not torch.equal(mine["token_embedding.weight"], another["token_embedding.weight"])


def test_the_run_s_own_seed_said_once_more_changes_nothing(lab):
    plain, said = (
        lab.train(run="plain", seed=3, dropout=0.2),
        lab.train(run="said", seed=3, dropout=0.2, data_seed=3),
    )
    assert untimed(plain / "steps.csv") == untimed(said / "steps.csv")
    assert_same_weights(weights(plain), weights(said))


def test_a_resumed_run_goes_on_in_its_own_order(lab, interrupt):
    settings = {"steps": 8, "checkpoint_interval": 3, "data_seed": 9}
    whole = lab.train(**settings)
    expected = untimed(whole / "steps.csv"), facts(whole)
    again = interrupt(5, **settings)
    again = lab.train(**settings)
    assert (untimed(again / "steps.csv"), facts(again)) == expected


def test_every_task_has_the_order_of_data_seed(lab, monkeypatch):
    write_dialogues(lab.directory / "dialogues")
    config = lab.config(**TALKING, data_seed=5, redraw_candidates=True)
    from engine import tasks

    order = tasks.of(config).train_order(tokens_for(config), config)
    assert (order.seed, order.redraw.seed) == (5, 5)
    lab.train(steps=1)
    config = lab.config(data_seed=5, curriculum="rarity", curriculum_steps=2)
    assert next_token.train_order(open_tokens("tokens/by_hand"), config).seed == 5


def test_each_seed_that_is_not_in_effect_is_told(lab, monkeypatch):
    both = ledger(lab.train(run="both", seed=4, data_seed=7))
    assert (both["seed"]["in_effect"], both["data_seed"]["in_effect"]) == ("4", "7")
    assert both["seed"]["agrees"] and both["data_seed"]["agrees"]
    assert "data_seed" not in ledger(lab.train(run="one", seed=4))
    ignoring = next_token.TrainOrder
    monkeypatch.setattr(next_token, "TrainOrder", lambda *shape: ignoring(*shape[:3], 4))
    lines = ledger(lab.train(run="ignored", seed=4, data_seed=7))
    assert lines["seed"]["agrees"] and not lines["data_seed"]["agrees"]
    assert (lines["data_seed"]["requested"], lines["data_seed"]["in_effect"]) == ("7", "4")
    config = resolve({"seed": 4, "data_seed": 4}, "test")
    assert [line.agrees for line in seeds.lines(config, 4, 5)] == [False, True]


@pytest.mark.parametrize("value", [-2, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(value):
    with pytest.raises(
        ConfigError, match=f"data_seed = {value}: must be a whole number ≥ -1 and ≤ {2**32 - 1}"
    ):
        resolve({"data_seed": value}, "test")
