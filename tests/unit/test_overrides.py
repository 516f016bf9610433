"""What `dvc exp run -S …` is told before DVC composes: one message a mistake, with what would do instead."""

import shutil

import pytest
from test_studies import CONF, composed

from stages.overrides import refusal

DONE = "Nothing was run or changed."


def told(*overrides: str, conf=CONF) -> str:
    return refusal(conf, ["dvc", "exp", "run", *(f"-S{one}" for one in overrides)])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("study=persona_bost", "study=persona_bost: no such study (nearest: persona_best, persona_cost)"),
        ("preset=gpt2_16x9", "preset=gpt2_16x9: no such preset (nearest: gpt2_16x8)"),
        ("preset=q", "preset=q: no such preset (there are gpt2_16x8, gpt2_baseline, gpt2_mla, gpt2_no_compile, "
         "gpt2_vanilla, none, two_heads)"),
        ("study=imdb,imbd", "study=imbd: no such study (nearest: imdb)"),  # a sweep
        ("study=choice(imdb, imbd)", "study=imbd: no such study (nearest: imdb)"),
        ("runs.adamw.weight_decay=0", "runs.adamw.weight_decay: runs.adamw has no weight_decay of its own yet, and a "
         "+ adds it: -S +runs.adamw.weight_decay=0"),
        ("runs.no_decay.wieght_decay=0", "runs.no_decay.wieght_decay: unknown setting (nearest: weight_decay)"),
        ("runs.sgdd.lr=0.1", "runs.sgdd.lr: runs has no sgdd (nearest: sgd)"),
        ("runs.q.lr=0.1", "runs.q.lr: runs has no q (it has adamw, adamw_full_ac, no_decay, sgd)"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_in_one_sentence(override, problem):
    assert told(override) == f"{problem}. {DONE}"


def test_all_mistakes_of_a_kind_are_told_at_once():
    said = told("lerning_rate=1", "preset=gpt2_mal", "study=chargtp")
    assert said.startswith(
        "lerning_rate: unknown setting (nearest: lr); study=chargtp: no such study (nearest: chargpt); "
        f"preset=gpt2_mal: no such preset (nearest: gpt2_mla). {DONE} `python -m engine.config`"
    )


def test_runs_that_are_not_chosen_yet_are_told_with_what_chooses_them(tmp_path):
    shutil.copytree(CONF, tmp_path / "conf")
    assert told("study=wikitext2_optimizers", conf=tmp_path / "conf") == ""
    (tmp_path / "conf/chosen/wikitext2_optimizer_grid.yaml").unlink()
    grid = "wikitext2_optimizer_grid"
    assert told("study=wikitext2_optimizers", conf=tmp_path / "conf") == (
        f"study=wikitext2_optimizers: takes its runs from conf/chosen/{grid}.yaml, which is not there: run "
        f"`python -m stages.choose {grid}` first, when the study {grid} is done. {DONE}"
    )
    assert told("study=gpt2_tuned", conf=tmp_path / "conf") == ""


@pytest.mark.parametrize(
    "overrides",
    [
        ["runs.sgd.lr=0.2", "lr=0.1,0.2"],
        ["study=gpt2", "expects.compile=none", "expects.steps=240"],  # the preset's, and the study's
        ["study=gpt2", "runs.mla_reciprocal.latent_width=64"],  # by way of <<
        ["study=gpt2_tuned", "runs.muon.lr=0.1"],  # of conf/chosen
        ["study=persona_best", "runs.started.init_from=gpt2"],
        ["+runs.adamw.weight_decay=0", "~runs.sgd", "+new=1", "other.yaml:x.y=1"],
        ["+runs.mine={lr: 1}", "runs.mine.lr=2"],  # made by the first
        ["study=chargpt", "criteria.0.at_most=2"],
    ],
    ids=" ".join,
)
def test_what_hydra_would_take_is_not_refused(tmp_path, overrides):
    assert told(*overrides) == ""
    taken = [one for one in overrides if ":x" not in one and "," not in one and "criteria.0" not in one]
    composed(tmp_path / "params.yaml", *taken)


def test_every_shipped_study_and_preset_may_be_asked_for():
    for group in ("study", "preset"):
        for path in (CONF / group).glob("*.yaml"):
            assert told(f"{group}={path.stem}") == ""
