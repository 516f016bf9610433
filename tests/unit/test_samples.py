"""Samples of text: left at each evaluation, the same as generation gives, and of no effect on training."""

import json

import pytest
import torch
from engine_runs import assert_same_weights, untimed, weights

from engine import rundir
from engine.config import resolve
from engine.errors import ConfigError
from engine.generate import generate, open_run
from engine.samples import PROMPT_TOKENS, SAMPLING

RUN = {"steps": 4, "eval_interval": 2, "dropout": 0.1}


def samples(run) -> list[dict]:
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_each_evaluation_leaves_one_and_training_does_not_notice(lab):
    plain = lab.train(run="plain", **RUN)
    run = lab.train(run="sampled", **RUN, sample_tokens=12)
    assert [one["step"] for one in samples(run)] == [1, 3]
    assert untimed(run / "steps.csv") == untimed(plain / "steps.csv")
    assert_same_weights(weights(run), weights(plain))
    assert not (plain / "samples.jsonl").exists()


def test_the_last_one_is_what_the_final_model_generates(lab):
    run = lab.train(**RUN, sample_tokens=12, sample_prompt="the ")
    _, tokenizer, model = open_run(run)
    ids = torch.tensor([[ord(c) for c in "the "]])  # bytes
    expected = generate(model, ids, count=12, sampling=SAMPLING)[0, 4:]
    last = samples(run)[-1]
    assert last["prompt"] == "the " and last["text"] == tokenizer.decode(expected.numpy())


def test_without_a_prompt_it_goes_on_from_the_validation_text(lab):
    run = lab.train(**RUN, sample_tokens=3)
    text = (lab.directory / "text" / "valid.txt").read_text(encoding="utf-8")
    assert samples(run)[0]["prompt"] == text[:PROMPT_TOKENS]


def test_a_resumed_run_has_each_sample_once(lab, monkeypatch):
    from engine.step import Step

    settings = {**RUN, "sample_tokens": 5, "checkpoint_interval": 3}
    whole = samples(lab.train(run="whole", **settings))
    call = Step.__call__

    def stops(self, step, micro_batches):
        if step == 3:
            raise KeyboardInterrupt
        return call(self, step, micro_batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Step, "__call__", stops)
        lab.train(run="stopped", **settings)
    assert [one["step"] for one in samples(lab.train(run="stopped", **settings))] == [1, 3] and len(
        whole
    ) == 2


def test_a_prompt_that_is_not_in_the_vocabulary_is_refused_before_training(lab):
    with pytest.raises(ConfigError, match="sample_prompt: 1 of its 1 tokens are not in the run's vocabulary"):
        lab.train(tokenizer="chars", sample_tokens=5, sample_prompt="ß")
    assert not (lab.directory / "results").exists() or not list(
        (lab.directory / "results").rglob("steps.csv")
    )


def test_a_prompt_without_samples_is_refused():
    with pytest.raises(ConfigError, match="sample_prompt = 'x': would do nothing with sample_tokens = 0"):
        resolve({"sample_prompt": "x"}, "test")


def test_a_run_that_diverged_keeps_no_sample_from_after_that(tmp_path):
    for step in (1, 3, 5):
        rundir.append_sample(tmp_path, step, {"prompt": "a", "text": "b"})
    rundir.cut_samples(tmp_path, 3)
    assert [one["step"] for one in samples(tmp_path)] == [1, 3]
    rundir.cut_samples(tmp_path / "none", 3)  # a run without samples
