"""What the engine writes down so that comparisons can be checked: data order, evaluation set, precision, FLOPs."""

import contextlib

import numpy as np
import pytest
import torch
from engine_runs import ledger, read_json

from engine import trainer
from engine.config import resolve
from engine.data.batches import Drawn, TrainOrder
from engine.errors import ConfigError
from engine.probes import training_flops
from engine.tasks import next_token, scoring

TOKENS = np.arange(401) % 61
KEYS = ("data_order_sha256", "evaluation_sha256", "evaluation_precision")


def order(seed: int = 1) -> TrainOrder:
    return TrainOrder(TOKENS, context=8, batch_size=4, seed=seed)


def drawn(ids: dict[int, np.ndarray]) -> np.ndarray:
    seen = Drawn(order())
    for number, own in ids.items():
        seen.add(number, own)
    return seen.sums


def digest(sums: np.ndarray) -> str:
    return Drawn(order()).digest(sums, "tokens")


STEPS = {number: order().sample_ids(number) for number in range(30)}  # more than two epochs


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_parts_add_up_to_what_one_process_draws(world):
    parts = [
        drawn({number: order().rank_slice(number, rank, world) for number in STEPS}) for rank in range(world)
    ]
    assert digest(sum(parts)) == digest(drawn(STEPS))


def test_another_sample_another_step_or_another_seed_is_another_order():
    swapped = STEPS | {3: STEPS[4], 4: STEPS[3]}
    replaced = STEPS | {3: np.array([*STEPS[3][:-1], STEPS[3][-1] + 1])}
    twice = STEPS | {3: STEPS[3][[0, 0, 2, 3]]}
    fewer = {number: ids for number, ids in STEPS.items() if number < 29}
    other_seed = {number: order(2).sample_ids(number) for number in STEPS}
    found = [digest(drawn(ids)) for ids in (STEPS, swapped, replaced, twice, fewer, other_seed)]
    assert len(set(found)) == 6
    assert Drawn(order()).digest(drawn(STEPS), "other tokens") not in found


def test_within_a_step_the_order_does_not_count():
    assert digest(drawn(STEPS)) == digest(drawn({n: ids[::-1].copy() for n, ids in STEPS.items()}))


def test_what_was_drawn_before_a_restart_is_known():
    again = Drawn(order())
    again.resumed(11, rank=0, world=1)
    for number in range(11, 30):
        again.add(number, STEPS[number])
    assert digest(again.sums) == digest(drawn(STEPS))


def test_a_run_says_what_it_drew_and_what_it_was_scored_on(lab):
    def of(**changes) -> tuple:
        metrics = read_json(lab.train(**changes) / "metrics.json")
        return tuple(metrics[key] for key in KEYS)

    plain = of()
    assert plain[2] == "float32" and all(len(value) == 64 for value in plain[:2])
    assert of(width=16, micro_batch_size=2, eval_batch_size=3, dropout=0.1) == plain
    other_order, other_set = of(seed=2), of(eval_tokens=40)
    assert other_order[0] != plain[0] and other_order[1:] == plain[1:]
    assert other_set[0] == plain[0] and other_set[1] != plain[1]
    assert of(precision="bf16") == (*plain[:2], "bfloat16")
    assert of(precision="bf16", eval_precision="fp32") == plain


def test_a_step_that_reads_something_else_is_told(lab, monkeypatch):
    honest = read_json(lab.train() / "metrics.json")["data_order_sha256"]
    whole = TrainOrder.rank_slice
    monkeypatch.setattr(
        TrainOrder, "rank_slice", lambda self, number, *of: whole(self, number + (number == 3), *of)
    )
    assert read_json(lab.train() / "metrics.json")["data_order_sha256"] != honest


@pytest.mark.parametrize(
    "changes", [{"eval_stride": 4}, {"context": 8}, {"eval_stride": 4, "context": 8}], ids="-".join
)
def test_other_windows_are_another_evaluation(lab, changes):
    plain = next_token.sha256(TOKENS, lab.config())
    assert next_token.sha256(TOKENS, lab.config(**changes)) != plain
    assert next_token.sha256(TOKENS[:-1], lab.config()) != plain
    assert next_token.sha256(TOKENS, lab.config(), limit=400) == plain
    assert next_token.sha256(TOKENS.astype(np.uint16), lab.config(eval_batch_size=1, eval_stride=16)) == plain


def test_an_evaluation_in_another_precision_is_told(lab, monkeypatch):
    line = ledger(lab.train(precision="bf16"))["eval_precision"]
    assert line["agrees"] and (line["requested"], line["in_effect"]) == ("bf16", "bfloat16")
    monkeypatch.setattr(scoring, "autocast", lambda *_: contextlib.nullcontext())
    line = ledger(lab.train(precision="bf16"))["eval_precision"]
    assert not line["agrees"] and line["in_effect"] == "float32"


def test_weights_that_ignore_the_seed_are_told(lab, monkeypatch):
    seeded = torch.manual_seed
    monkeypatch.setattr(trainer.torch, "manual_seed", lambda seed: seeded(0 if seed == 4 else seed))
    line = ledger(lab.train(seed=4))["seed"]
    assert not line["agrees"] and line["in_effect"] == "4 of the data order, 0 of the weights"


def test_floating_point_operations_by_hand(lab):
    model = resolve({"layers": 2, "heads": 2, "width": 8, "context": 5}, "test").model
    assert training_flops(1000, model, 30) == 30 * (6 * 1000 + 12 * 2 * 8 * 5)
    metrics = read_json(lab.train() / "metrics.json")
    assert metrics["flops"] == training_flops(metrics["parameters"], lab.config().model, metrics["tokens"])


def test_a_bf16_stream_cannot_be_scored_in_fp32(lab):
    with pytest.raises(ConfigError, match="eval_precision = 'fp32': a model with a bf16 residual stream"):
        lab.config(precision="bf16", residual_precision="bf16", eval_precision="fp32")
