"""The classifier: what it computes by hand, padding that is left out, its scores, and its runs from start to end."""

import math
import sys

import numpy as np
import pytest
import torch
from engine_runs import ledger, read_json, rows

from engine import evaluate, export, generate
from engine.build import build_model
from engine.config import resolve
from engine.data.examples import Examples
from engine.errors import ConfigError
from engine.models.classifier import Classifier, build
from engine.objectives import ClassLabel
from engine.parallel import Ranks
from engine.tasks import classes

ONE = Ranks(0, 1, torch.device("cpu"))
VOCABULARY, CLASSES = 61, 3
SETTINGS = {
    "device": "cpu",
    "model": "classifier",
    "dataset": "synthetic",
    "data_dir": "",
    "tokenizer": "frequent_words",
    "vocab_size": 500,
    "validation_rows": 60,
    "test_rows": 50,
    "layers": 2,
    "heads": 2,
    "width": 32,
    "context": 16,
    "eval_batch_size": 8,
}
PAD = torch.zeros(1, 5, dtype=torch.int64)


def config(**changes):
    return resolve({**SETTINGS, **changes}, "test")


def classifier(**changes) -> Classifier:
    torch.manual_seed(5)
    return build(config(**changes).model, VOCABULARY, classes=CLASSES).eval()


def words(length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["sdpa", "manual", "math", "flash"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_padding_changes_nothing_where_it_is_masked(attention, positions):
    model = classifier(attention=attention, positions=positions, norm_placement="post")
    with torch.no_grad():
        plain, padded = model(words())[0], model(torch.cat([words(), PAD], 1))[0]
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-6)


def test_padding_is_seen_where_it_is_not_masked():
    model = classifier(padding_mask=False)
    with torch.no_grad():
        plain, padded = model(words())[0], model(torch.cat([words(), PAD], 1))[0]
    assert (plain - padded).abs().max() > 1e-3


def test_both_attentions_are_the_same_function():
    inputs = torch.cat([torch.cat([words(), PAD], 1), words(14, seed=1)])
    with torch.no_grad():
        sdpa, manual = (classifier(attention=name)(inputs)[0] for name in ("sdpa", "manual"))
    torch.testing.assert_close(sdpa, manual, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [True, False])
def test_the_mean_is_over_tokens_by_hand(mask):
    """Without blocks that mix, the logits are the head of the mean of the embeddings with their positions."""
    model = classifier(padding_mask=mask, norm_placement="post")
    model.layers = torch.nn.ModuleList()
    inputs = torch.cat([words(), PAD], 1)
    embedded = model.token_embedding(inputs) + model.position_embedding(torch.arange(14))
    pooled = embedded[:, :9].sum(1) / 9 if mask else embedded.sum(1) / 14
    torch.testing.assert_close(model(inputs)[0], model.head(pooled), rtol=0, atol=1e-6)


def test_every_token_sees_every_other():
    """The first position's output moves with the last token: nothing is causal."""
    model, seen = classifier(), []
    model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    changed = words()
    changed[0, -1] = changed[0, -1] % (VOCABULARY - 1) + 1
    with torch.no_grad():
        model(words()), model(changed)
    assert (seen[0][0, 0] - seen[1][0, 0]).abs().max() > 1e-5


def test_a_row_of_nothing_but_padding_has_logits():
    """Evaluation fills up its last batch with such rows; NaN in them could reach a sum."""
    assert classifier()(torch.zeros(2, 16, dtype=torch.int64))[0].isfinite().all()


def test_dropped_tokens_are_the_asked_share_and_only_in_training():
    model = classifier(token_dropout=0.25)
    model.position_embedding = None
    inputs = words(16).repeat(400, 1)
    assert model._embedded(inputs).abs().amin((0, 1)).max() > 0  # evaluating, every token is there
    model.train()
    gone = (model._embedded(inputs) == 0).all(-1).float().mean().item()
    assert gone == pytest.approx(0.25, abs=0.03)  # 6,400 draws: 0.005 standard deviation


def test_the_loss_by_hand_with_a_row_that_does_not_count():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 0.0]], requires_grad=True)
    targets = torch.tensor([1, 0, -100])
    loss = ClassLabel()(logits, targets, torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2))
    loss.backward()  # softmax minus one-hot, times the scale
    expected = 2 * torch.tensor([[0.25, -0.25], [-0.5, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_scores_are_over_every_row_whatever_the_batch(batch):
    draw = np.random.Philox(key=3).random_raw(200) % (VOCABULARY - 1) + 1
    ends = np.array([3, 9, 40, 41, 60, 61, 100], dtype=np.int64)  # 31 and 39 tokens are cut at 16
    examples = Examples(draw[:100], ends, np.array([0, 1, 2, 0, 1, 2, 2], dtype=np.int32))
    settings = config(eval_batch_size=batch)
    model = build_model(settings, VOCABULARY, ONE, CLASSES)
    found = classes.evaluate(model, examples, settings, ONE)
    nats = right = 0.0
    for number, label in enumerate(examples.labels.tolist()):
        logits = model.eval()(torch.from_numpy(examples.row(number)[:16].astype(np.int64))[None])[0][
            0
        ].double()
        nats -= logits.log_softmax(-1)[label].item()
        right += logits.argmax().item() == label
    assert found == {
        "loss": pytest.approx(nats / 7, rel=1e-6),
        "accuracy": pytest.approx(right / 7),
        "count": 7,
    }


def test_a_run_leaves_accuracies_and_no_perplexity(lab, monkeypatch):
    run = lab.train(**SETTINGS, steps=40, lr=0.01, batch_size=16, eval_interval=20)
    metrics, evals = read_json(run / "metrics.json"), rows(run / "evals.csv")
    assert list(evals[0]) == ["step", "tokens_seen", "val_loss", "val_accuracy"]
    accuracies = [float(row["val_accuracy"]) for row in evals]
    assert metrics["val_accuracy"] == accuracies[-1] > 0.35  # of four classes
    assert metrics["best_val_accuracy"] == max(accuracies)
    assert not {"val_perplexity", "val_bits_per_byte"} & set(metrics)
    assert [line for line in ledger(run).values() if not line["agrees"]] == []
    assert "training and 60 validation rows, 4 classes" in ledger(run)["dataset"]["how"]
    steps = rows(run / "steps.csv")
    assert float(steps[-1]["samples_per_second"]) == pytest.approx(float(steps[-1]["tokens_per_second"]) / 16)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "validation", "again.json"])
    evaluate.main()
    again = read_json(lab.directory / "again.json")
    assert (again["validation_accuracy"], again["examples"]) == (metrics["val_accuracy"], 60)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 4},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
    ],
    ids=str,
)
def test_what_changes_no_number(lab, changes):
    whole = lab.train(**SETTINGS | {"context": 48}, run="whole", steps=5, batch_size=16)
    run = lab.train(**SETTINGS | {"context": 48}, run="other", steps=5, batch_size=16, **changes)
    for name in ("train_loss", "grad_norm"):
        found, expected = ([float(row[name]) for row in rows(r / "steps.csv")] for r in (run, whole))
        assert found == pytest.approx(expected, rel=1e-5)
    assert [line for line in ledger(run).values() if not line["agrees"]] == []


def test_padding_takes_no_part_in_training_wherever_it_is_looked_up():
    """Rows of the table that no token names get no gradient at all, though padding looks them up."""
    model = classifier(context=32)
    inputs = torch.cat([words(), torch.zeros(1, 20, dtype=torch.int64)], 1)
    model(inputs, torch.tensor([1]))[0].backward()
    touched = model.token_embedding.weight.grad.abs().amax(1).nonzero()[:, 0].tolist()
    assert touched == sorted(set(inputs[0, :9].tolist()))


def test_trimmed_batches_must_not_be_compiled_one_by_one():
    with pytest.raises(ConfigError, match="compiled code is made for one; set compile = 'none'"):
        config(trim_to=8, compile="model")
    with pytest.raises(ConfigError, match="would do nothing with .*padding_mask = false; it needs .*= true"):
        config(trim_to=8, padding_mask=False)


def test_a_mask_that_is_silently_off_is_found(lab, monkeypatch):
    """The model is built as asked, and forgets its mask."""
    forward = Classifier.features

    def unmasked(self, inputs):
        self.padding_mask = False
        return forward(self, inputs)

    monkeypatch.setattr(Classifier, "features", unmasked)
    run = lab.train(**SETTINGS | {"context": 64}, steps=3)
    line = ledger(run)["padding_mask"]
    assert (line["requested"], line["in_effect"], line["agrees"]) == ("true", "padding seen", False)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (generate, ["--prompt", "a"], "model = 'classifier': it writes no text"),
        (export, ["out"], "model = 'classifier': GPT-2 has 'gpt'"),
    ],
    ids=["generate", "export"],
)
def test_tools_for_language_models_refuse_it(lab, monkeypatch, capsys, tool, arguments, message):
    run = lab.train(**SETTINGS, steps=2)
    monkeypatch.setattr(sys, "argv", ["tool", str(run), *arguments])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sample_tokens", "tensor_parallel", "eval_tokens", "eval_stride"])
def test_settings_of_language_models_would_do_nothing(name):
    with pytest.raises(ConfigError, match=f"{name} = 5: would do nothing with model = classifier"):
        config(**{name: 5})
