"""The model with two heads: its loss by hand, its two layouts equal, what it starts from, and a run of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_runs import TALKING, column, events, ledger, read_json, rows, untimed, weights, write_dialogues

from engine import hits, plan, pretrained, rundir
from engine.build import build_model
from engine.config import resolve
from engine.data.choices import lines_of
from engine.data.prepare import open_tokens, prepare
from engine.evaluate import final_model
from engine.export import export
from engine.gradient_sums import GradientSums
from engine.models.gpt import Layout
from engine.objectives import ReplyAndChoice, scalar
from engine.parallel import Ranks
from engine.step import Step
from engine.tasks import dialogues as task

ONE = Ranks(0, 1, torch.device("cpu"))
VOCABULARY = 17 + 5
BOS, EOS, PAD, USER, BOT = range(17, 22)
REPLY, CANDIDATES = 4, 3
SETTINGS = {
    **TALKING,
    "layers": 2,
    "heads": 2,
    "width": 32,
    "context": 10,
    "candidates": CANDIDATES,
    "max_reply_tokens": REPLY,
    "device": "cpu",
}
ROWS = [  # context, candidates, which is true
    ([BOS, 3, USER, 4], [[BOT, 5, EOS], [BOT, 6, 7, EOS], [BOT, EOS]], 1),
    ([BOS, 1, USER, 2, 9, 8], [[BOT, 4, 4, EOS], [BOT, 2, EOS], [BOT, 3, EOS]], 2),
]


def config(**changes):
    return resolve({**SETTINGS, **changes}, "test")


def model_of(**changes):
    return build_model(config(**changes), VOCABULARY, ONE)


def types_of(ids: list[int]) -> list[int]:
    """The speaker of each token of a context or a reply: who is named before it, and first the persona's."""
    found = []
    for i in ids:
        found.append(i if i in (USER, BOT) else found[-1] if found else BOT)
    return found


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """ROWS as the data gives them: inputs (2, 2, lines, REPLY), targets (2, 1 + REPLY)."""
    lines = lines_of(10 - REPLY, REPLY)
    inputs = torch.full((2, 2, lines + CANDIDATES, REPLY), PAD)
    targets = torch.full((2, 1 + REPLY), -100)
    for row, (context, replies, gold) in enumerate(ROWS):
        for line, ids in enumerate([context, *replies]):
            at = 0 if line == 0 else (lines + line - 1) * REPLY
            inputs[row, 0].view(-1)[at : at + len(ids)] = torch.tensor(ids)
            inputs[row, 1].view(-1)[at : at + len(ids)] = torch.tensor(types_of(ids))
        targets[row, 0] = gold
        targets[row, 1 : len(replies[gold])] = torch.tensor(replies[gold][1:])
    return inputs, targets


def by_hand(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nats of the true replies' tokens, nats of the choices, right ones): one unpadded sequence at a time."""
    tokens, choice, right = 0, 0, 0
    for context, replies, gold in ROWS:
        scores = []
        for number, reply in enumerate(replies):
            ids = torch.tensor([context + reply])
            types = torch.tensor([types_of(context) + [BOT] * len(reply)])
            x = model.token_embedding(ids) + model.token_embedding(types)
            x = x + model.position_embedding(torch.arange(ids.size(1)))
            for block in model.layers:
                x = block(x)
            hidden = model.norm(x)[0]
            scores.append(model.choice_head(hidden[-1]))
            if number == gold:
                logits = hidden[len(context) : -1] @ model.token_embedding.weight[:VOCABULARY].T
                tokens += F.cross_entropy(logits, torch.tensor(reply[1:]), reduction="sum")
        scores = torch.cat(scores)
        choice += F.cross_entropy(scores, torch.tensor(gold))
        right += int(scores.argmax()) == gold
    return tokens, choice, torch.tensor(float(right))


# --- the loss


def test_the_parts_of_the_loss_by_hand():
    """Three candidates whose scores are 0, ln 2 and 0; of four tokens the true one has half of the probability."""
    objective = ReplyAndChoice(4, lm_weight=3.0)
    hidden = torch.tensor([[[1.0], [1.0], [0.0]]])
    weight = torch.tensor([[math.log(3)], [0.0], [0.0], [0.0]])
    scores, targets = torch.tensor([[0.0, math.log(2), 0.0]]), torch.tensor([[1, 0, 2, -100]])
    parts = objective(hidden, weight, scores, targets)
    assert parts.tolist() == pytest.approx([math.log(2) + math.log(6), math.log(2), 1.0])
    counts = objective.counts(targets)
    assert counts.tolist() == [2, 1, 1] and objective.samples(counts) == 1
    mean = (math.log(2) + math.log(6)) / 2
    assert scalar(objective.weighed(parts, counts)).item() == pytest.approx((3 * mean + math.log(2)) / 4)


def test_a_row_that_only_fills_a_batch_counts_for_nothing():
    objective = ReplyAndChoice(4)
    targets = torch.full((1, 4), -100)
    parts = objective(torch.ones(1, 3, 1), torch.ones(4, 1), torch.tensor([[2.0, 1.0, 0.0]]), targets)
    assert parts.tolist() == [0.0, 0.0, 0.0] and objective.counts(targets).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kernel", ["full", "fused", "chunked"])
@pytest.mark.parametrize("changes", [{}, {"shared_context": True}, {"attention": "manual"}], ids=str)
def test_losses_and_gradients_are_those_of_sequences_one_by_one(kernel, changes):
    model = model_of(loss_kernel=kernel, **changes)
    inputs, targets = batch()
    parts, _ = model(inputs, targets)
    expected = by_hand(model)
    assert parts.tolist() == pytest.approx([e.item() for e in expected], rel=1e-5)
    parameters = list(model.parameters())
    scale = torch.tensor([0.25, 2.0, 0.0])
    scaled, _ = model(inputs, targets, scale)
    found = torch.autograd.grad(scalar(scaled), parameters)
    wanted = torch.autograd.grad(0.25 * expected[0] + 2.0 * expected[1], parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared_context", [False, True])
def test_gradients_summed_in_place_are_those_of_autograd(shared_context):
    """Rows of the embedding get theirs from four places: tokens, both speakers, and the head that is tied to it."""
    scale, found = torch.tensor([0.25, 2.0, 0.0]), []
    for summed in (False, True):
        model = model_of(loss_kernel="fused", shared_context=shared_context)
        if summed:
            GradientSums(model, torch.float32, 1).refresh()
        for _ in range(2):  # micro-batches
            scalar(model(*batch(), scale)[0]).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_only_the_true_reply_has_logits():
    model = model_of(loss_kernel="fused")
    model(*batch())
    assert model.loss.largest_logits == (2 * REPLY, VOCABULARY)


def test_a_step_weighs_tokens_and_rows_of_all_its_micro_batches():
    """Not means of the micro-batches' own means: they have 3 and 2 tokens."""
    settings = config(lm_loss_weight=3.0, clip_norm=0.0)
    model = build_model(settings, VOCABULARY, ONE)
    tokens, choice, right = (e.item() for e in by_hand(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = Step(model, optimizer, ONE, training=settings.training, schedule=settings.schedule, lr=0.0)
    inputs, targets = batch()
    whole = step(0, [(inputs, targets)])
    halves = step(0, [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])])
    for measured in (whole, halves):
        assert measured["parts"].tolist() == pytest.approx([tokens / 5, choice / 2, right / 2], rel=1e-5)
        assert measured["train_loss"].item() == pytest.approx((3 * tokens / 5 + choice / 2) / 4, rel=1e-5)
        assert measured["targets"].item() == 2
    assert halves["grad_norm"].item() == pytest.approx(whole["grad_norm"].item(), rel=1e-5)
    assert (targets[0] >= 0).sum() != (targets[1] >= 0).sum()


def test_no_candidate_sees_another_nor_padding():
    inputs, _ = batch()
    for changes in ({}, {"shared_context": True}):
        model = model_of(**changes)
        before, _ = model(inputs)
        other = inputs.clone()
        other[:, 0, 2] = torch.tensor([BOT, 9, 9, EOS])  # the first candidate
        after, _ = model(other)
        assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-4)
        torch.testing.assert_close(after[:, 1:], before[:, 1:])


def test_chatting_reads_types_too():
    """A whole sequence through `features`, as it is read with a cache: its speakers are in the layout."""
    model = model_of().eval()
    context, replies, gold = ROWS[0]
    ids, types = torch.tensor([context + replies[gold]]), torch.tensor([types_of(context) + [BOT] * 4])
    hidden, _ = model.features(ids, None, Layout(types=types))
    scores, _ = model(batch()[0])
    torch.testing.assert_close(model.choice_head(hidden[0, -1])[0], scores[0, gold])


# --- what it starts from


def test_it_starts_from_a_gpt_run_with_what_that_has_not_drawn(lab, tmp_path):
    gpt = lab.train(run="gpt", context=200, tokenizer="bytes", steps=1)
    write_dialogues(tmp_path / "dialogues")
    settings = {**TALKING, "steps": 2, "batch_size": 2, "init_from": str(gpt)}
    run = lab.train(run="heads", **settings)
    line = ledger(run)["init_from"]
    assert line["agrees"], line
    assert "bos, eos, pad, speaker1, speaker2 and the choice head drawn" in line["in_effect"]
    assert "positions from 176 of 200 left out" in line["in_effect"]
    c, given, drawn = lab.config(run="heads", **settings), weights(gpt), None
    model = build_model(c, 261, ONE)
    drawn = build_model(replace(c, model=replace(c.model, init_from="")), 261, ONE)
    assert torch.equal(model.token_embedding.weight[:256], given["token_embedding.weight"])
    assert torch.equal(model.token_embedding.weight[256:], drawn.token_embedding.weight[256:])
    assert torch.equal(model.position_embedding.weight, given["position_embedding.weight"][:176])
    assert torch.equal(model.layers[1].mlp.up.weight, given["layers.1.mlp.up.weight"])
    assert torch.equal(model.choice_head.weight, drawn.choice_head.weight)
    again = build_model(lab.config(**{**settings, "init_from": str(run)}), 261, ONE)
    assert torch.equal(again.choice_head.weight, weights(run)["choice_head.weight"])
    with pytest.raises(pretrained.ConfigError, match="context = 300: the weights are for 200"):
        build_model(lab.config(**{**settings, "context": 300}), 261, ONE)


def test_it_starts_from_a_gpt2_in_hugging_face_format(lab, tmp_path):
    gpt = lab.train(run="gpt", context=200, tokenizer="bytes", steps=1)
    export(gpt, tmp_path / "exported")
    model = build_model(lab.config(**{**TALKING, "init_from": str(tmp_path / "exported")}), 261, ONE)
    given = weights(gpt)
    assert torch.equal(model.token_embedding.weight[:256], given["token_embedding.weight"])
    assert torch.equal(model.layers[0].attention.qkv.weight, given["layers.0.attention.qkv.weight"])
    assert model.given_weights[0].agrees


# --- runs


def test_a_run_learns_and_says_so(lab, tmp_path):
    write_dialogues(tmp_path / "dialogues", train=20)
    run = lab.train(**TALKING, steps=40, batch_size=16, lr=5e-3, eval_interval=20, shared_context=True)
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []
    said = ledger(run)["dataset"]["how"]
    assert "60 training, 21 validation and 15 test replies among 4, no persona in two splits" in said
    assert "distractors drawn with a fixed seed" in said
    lm, mc = column(run, "train_lm_loss"), column(run, "train_mc_loss")
    for total, *parts in zip(column(run, "train_loss"), lm, mc, strict=True):
        assert total == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert lm[0] == pytest.approx(math.log(261), rel=0.05) and mc[0] == pytest.approx(math.log(4), rel=0.05)
    assert lm[-1] < lm[0] - 1.5
    metrics = read_json(run / "metrics.json")
    assert metrics["choices"] == 4 and metrics["samples"] == 640
    assert metrics["tokens"] == 640 * (144 + 4 * 32)  # one context, four replies
    assert metrics["val_reply_perplexity"] == pytest.approx(math.exp(metrics["val_lm_loss"]))
    last = rows(run / "evals.csv")[-1]
    assert float(last["val_loss"]) == pytest.approx(
        (float(last["val_lm_loss"]) + float(last["val_mc_loss"])) / 2
    )


def test_a_run_with_summed_gradients_trains_as_one_without(lab, tmp_path):
    write_dialogues(tmp_path / "dialogues", train=20)
    settings = {**TALKING, "steps": 6, "precision": "bf16", "loss_kernel": "fused", "shared_context": True}
    runs = [lab.train(run=kind, gradient_sums=kind, **settings) for kind in ("autograd", "fused")]
    for name, within in (("train_loss", 1e-3), ("grad_norm", 2e-2)):
        assert column(runs[1], name) == pytest.approx(column(runs[0], name), rel=within)
    assert [what for what, line in ledger(runs[1]).items() if not line["agrees"]] == []
    assert ledger(runs[1])["gradient_sums"]["in_effect"] == "fused"


def test_training_rows_are_scored_as_others_are(lab, tmp_path):
    """In eval mode: without dropout, all rows at once; the first rows of the files, not those that were drawn."""
    write_dialogues(tmp_path / "dialogues")
    run = lab.train(**TALKING, steps=2, dropout=0.5, eval_train_rows=10)
    c = lab.config(**TALKING)
    tokens = open_tokens(c.tokens_directory, c.data)
    model = final_model(run, c, tokens.meta["vocabulary_size"])
    first = tokens.train.first(10)
    assert len(first) == 10 and first.gather(np.arange(10), 144, 32)[1].tolist() == (
        tokens.train.gather(np.arange(10), 144, 32)[1].tolist()
    )
    scores, [row] = task.evaluate(model, first, c, ONE), rows(run / "evals.csv")
    assert scores["count"] == 10
    for name in ("loss", "accuracy"):
        assert float(row[f"eval_train_{name}"]) == pytest.approx(scores[name], rel=1e-5)
    with pytest.raises(pretrained.ConfigError, match="eval_train_rows = 999: there are 120 training rows"):
        lab.train(**TALKING, eval_train_rows=999)


def test_the_true_reply_among_more_candidates(lab, tmp_path, monkeypatch, capsys):
    write_dialogues(tmp_path / "dialogues", test=20)
    run = lab.train(**TALKING, steps=2)
    monkeypatch.setattr("sys.argv", ["hits", str(run), "--candidates", "12", "--output", "hits.json"])
    hits.main()
    found = read_json(tmp_path / "hits.json")
    assert (found["candidates"], found["examples"], found["split"]) == (12, 60, "test")
    assert found["chance"] == 1 / 12 and 0 <= found["hits_at_1"] <= 1
    assert (60 * found["hits_at_1"]) % 1 == pytest.approx(0, abs=1e-9)
    assert "of 60 replies the true one among 12" in capsys.readouterr().out
    asked = replace(
        lab.config(**TALKING), evaluation=replace(lab.config(**TALKING).evaluation, hits_candidates=9)
    )
    (run / "config.toml").write_text(rundir.toml(asked), encoding="utf-8")
    assert hits.among(run, None, "test")["candidates"] == 9
    same = ["hits", str(run), "--candidates", "4", "--output", "same.json"]
    monkeypatch.setattr("sys.argv", same)
    hits.main()
    c = lab.config(**TALKING)
    tokens = open_tokens(c.tokens_directory, c.data)
    scores = task.evaluate(final_model(run, c, tokens.meta["vocabulary_size"]), tokens.test, c, ONE)
    assert read_json(tmp_path / "same.json")["hits_at_1"] == scores["accuracy"]
    # Tokens that are there are used again, unless they are of other rows: those of a changed file are made anew.
    made = [(tmp_path / f"tokens/talking_among_{n}/meta.json").stat().st_mtime_ns for n in (4, 12)]
    write_dialogues(tmp_path / "more", test=9)
    (tmp_path / "more/test.jsonl").replace(tmp_path / "dialogues/test.jsonl")
    prepare(replace(c.data, candidates=12), tmp_path / "tokens/talking_among_12")
    hits.main()
    assert (tmp_path / "tokens/talking_among_4/meta.json").stat().st_mtime_ns == made[0]
    write_dialogues(tmp_path / "as_before", test=20)
    (tmp_path / "as_before/test.jsonl").replace(tmp_path / "dialogues/test.jsonl")
    monkeypatch.setattr("sys.argv", ["hits", str(run), "--candidates", "12", "--output", "again.json"])
    hits.main()
    assert read_json(tmp_path / "again.json") == found


def test_an_evaluation_is_the_same_in_any_batches_and_in_both_layouts(lab, tmp_path):
    write_dialogues(tmp_path / "dialogues")
    run = lab.train(**TALKING, steps=2)
    scores = []
    for changes in ({"eval_batch_size": 4}, {"eval_batch_size": 21}, {"shared_context": True}):
        c = lab.config(**TALKING, **changes)
        tokens = open_tokens(c.tokens_directory, c.data)
        model = final_model(run, c, tokens.meta["vocabulary_size"])
        scores.append(task.evaluate(model, tokens.test, c, ONE))
    assert (
        scores[0]["count"] == 15
        and scores[0]["reply_tokens"] == tokens.meta["splits"]["test"]["reply_targets"]
    )
    for one in scores[1:]:
        assert one == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"shared_context": True}, {"redraw_candidates": True, "batch_size": 60}], ids=str
)
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, tmp_path, interrupt, changes):
    write_dialogues(tmp_path / "dialogues")
    settings = {
        **TALKING,
        **changes,
        "steps": 5,
        "dropout": 0.1,
        "checkpoint_interval": 2,
        "eval_interval": 2,
    }
    whole = lab.train(**settings, run="whole")
    interrupt(3, **settings, run="again")
    run = lab.train(**settings, run="again")
    assert events(run) == [{"event": "resumed", "step": 2}]
    for name in ("steps.csv", "evals.csv"):
        assert untimed(run / name) == untimed(whole / name)
    assert all(torch.equal(weights(run)[n], t) for n, t in weights(whole).items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": "full", "shared_context": True},
        {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"},
    ],
    ids=str,
)
def test_its_memory_is_planned(lab, tmp_path, changes):
    write_dialogues(tmp_path / "dialogues")
    settings = {**TALKING, "steps": 3, "layers": 4, "width": 64, "batch_size": 2, **changes}
    metrics = read_json(lab.train(**settings) / "metrics.json")
    planned = plan.estimate(lab.config(**settings), 261, "cpu", 1)
    assert planned.peak / 2**30 == pytest.approx(metrics["peak_memory_gib"], rel=0.02)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"dataset": "stdlib", "data_dir": ""},
            "model = 'double_heads': cannot learn from dataset = 'stdlib'",
        ),
        ({"model": "gpt"}, "model = 'gpt': cannot learn from dataset = 'dialogues'"),
        ({"tokenizer": "words"}, "utterances have no line ends; set it to one of bytes, chars, bpe, gpt2"),
        ({"max_reply_tokens": 10}, "context = 10: must be more than max_reply_tokens = 10"),
        ({"shared_context": True, "positions": "rotary"}, "candidates stand at the same positions"),
        ({"hits_candidates": 3}, "hits_candidates = 3: must be more than candidates = 3, or 0"),
    ],
)
def test_what_cannot_be(changes, problem):
    with pytest.raises(pretrained.ConfigError, match=problem):
        config(**changes)


def test_rows_that_are_longer_than_the_context_are_told_before_anything_is_computed(lab, tmp_path):
    write_dialogues(tmp_path / "dialogues")
    with pytest.raises(
        pretrained.ConfigError, match="context = 100: rows have up to .* set context = 1.. or more"
    ):
        lab.train(**{**TALKING, "context": 100})
