"""The studies about dialogues: one starts from what another leaves, and figures in their files are the data's."""

from dataclasses import replace

import pytest
from test_data import real
from test_studies import composed

from engine import pretrained
from engine.config import Config
from engine.data import prepare
from stages.plan import resolve_study


def configs(tmp_path, name: str) -> dict[str, Config]:
    return resolve_study(composed(tmp_path / "params.yaml", f"study={name}"))[1]


@pytest.mark.parametrize(
    ("earlier", "run", "later"),
    [
        ("persona_lm", "lm-1", "persona_turns"),
        ("persona_turns", "turns-1", "persona_best"),
        ("persona_turns", "turns-1", "persona_recipes"),
        ("persona_turns", "turns-1", "persona"),
    ],
)
def test_weights_of_the_earlier_study_fit_the_later(tmp_path, earlier, run, later):
    theirs = configs(tmp_path, earlier)[run]
    for mine in configs(tmp_path, later).values():
        names = [name for name in pretrained.FUNCTION if name != "model"]
        assert [getattr(mine.model, n) for n in names] == [getattr(theirs.model, n) for n in names]
        assert mine.model.context <= theirs.model.context
        assert mine.data.tokenizer == theirs.data.tokenizer == "gpt2"


def test_the_best_starts_where_turns_ends(tmp_path):
    started = configs(tmp_path, "persona_best")["started-2"]
    assert str(configs(tmp_path, "persona_turns")["turns-1"].directory) == started.model.init_from


def test_the_pilot_tries_what_it_says_on_another_seed(tmp_path):
    """Its baseline is the best's started, and each other run differs from that in what it says alone."""
    best = resolve_study(composed(tmp_path / "params.yaml", "study=persona_best"))[0]
    pilot = resolve_study(composed(tmp_path / "params.yaml", "study=persona_recipes"))[0]
    assert not set(pilot["seeds"]) & set(best["seeds"])
    assert not pilot["metric"].startswith("test_")
    assert pilot["settings"] == best["settings"] | best["runs"]["started"]
    assert pilot["runs"] == {
        "started": {},
        "gentle": {"lr": 0.0001},
        "choice_first": {"lm_loss_weight": 0.3},
        "regular": {"dropout": 0.2, "weight_decay": 0.1},
    }


def test_the_real_dialogues_fill_what_the_study_says(tmp_path):
    """232 tokens before a reply, and an epoch of 64 steps."""
    config = configs(tmp_path, "persona")["baseline-1"]
    data = replace(config.data, data_dir=real("personachat"), tokenizer_dir=real("gpt2_tokenizer"))
    meta = prepare.prepare(data, tmp_path / "tokens")
    splits = meta["splits"]
    assert (meta["context_tokens"], meta["reply_tokens"]) == (232, 32)
    assert config.model.context == 232 + 32
    assert (splits["test"]["rows"], splits["test"]["dialogues"]) == (7801, 1000)
    assert (
        splits["train"]["rows"] == 64 * config.training.batch_size and meta["source_rows"]["train"] == 17_316
    )
    assert splits["train"]["rows"] + meta["dropped"]["not among max_train_rows"] == 15_611
