"""The peer of the study persona: its rows and its loss by hand, and that it trains on the engine's tokens."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_runs import prose

from benchmarks.data import make_tokens
from benchmarks.peers import padded
from benchmarks.recipes import best, engine_settings
from benchmarks.rows import complete
from benchmarks.sizes import SIZES, peers
from benchmarks.task import Task
from engine.config import resolve
from engine.data.choices import Choices
from engine.models import double_heads

SMOKE = SIZES["persona_smoke"]


def choices() -> Choices:
    """Two rows of a context and two candidates; 9 is padding, and 7 and 8 are the speakers."""
    parts = [[4, 0, 7, 1], [8, 2, 5], [8, 5], [4, 7], [8, 5], [8, 3, 3, 5]]
    types = [[8, 8, 7, 7], [8, 8, 8], [8, 8], [8, 7], [8, 8], [8, 8, 8, 8]]
    ends = np.cumsum([len(part) for part in parts])
    flat = (np.concatenate(x).astype(np.uint16) for x in (parts, types))
    return Choices(*flat, ends.astype(np.int64), *[np.array([0, 1], np.int32)] * 3, pad=9)


def test_rows_by_hand():
    rows, n = padded.PaddedRows(choices()), padded.NO_LABEL
    assert rows.longest == 7
    ids, types, labels, last, gold = rows[0]
    assert ids.tolist() == [[4, 0, 7, 1, 8, 2, 5], [4, 0, 7, 1, 8, 5, 9]]
    assert types.tolist() == [[8, 8, 7, 7, 8, 8, 8], [8, 8, 7, 7, 8, 8, 9]]
    assert labels.tolist() == [[n, n, n, n, n, 2, 5], [n] * 7]
    assert last.tolist() == [6, 5] and gold.item() == 0
    ids, _, labels, last, gold = rows[1]
    assert ids.tolist() == [[4, 7, 8, 5, 9, 9, 9], [4, 7, 8, 3, 3, 5, 9]]
    assert labels.tolist() == [[n] * 7, [n, n, n, 3, 3, 5, n]]
    assert last.tolist() == [3, 5] and gold.item() == 1


def test_a_model_that_knows_nothing_has_the_loss_of_chance():
    model = padded.TwoHeads(
        resolve({"width": 8, "heads": 2, "layers": 1, "context": 8}, "test").model, 10
    ).eval()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    rows = padded.PaddedRows(choices())
    batch = [torch.stack(x) for x in zip(rows[0], rows[1], strict=True)]
    assert model(*batch).item() == pytest.approx((math.log(10) + math.log(2)) / 2)


def test_its_loss_is_that_of_the_engines_model_of_the_same_weights():
    """As the engine has it: means over the 5 tokens of true replies, and over the 2 rows."""
    shape = {"model": "double_heads", "dataset": "dialogues", "data_dir": "x", "activation": "gelu_tanh"}
    shape |= {"width": 8, "heads": 2, "layers": 2, "context": 8, "max_reply_tokens": 4, "candidates": 2}
    m = resolve(shape, "test").model
    torch.manual_seed(1)
    theirs, mine = padded.TwoHeads(m, 10).eval(), double_heads.build(m, 10).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    mine.ids |= {"pad": 9, "speaker1": 7, "speaker2": 8}
    mine.load_state_dict(as_the_engines(theirs))
    inputs, targets = (torch.from_numpy(x) for x in choices().gather(np.arange(2), 4, 4))
    sums, _ = mine(inputs, targets)
    expected = mine.loss.weighed(sums, mine.loss.counts(targets)).sum()
    rows = padded.PaddedRows(choices())
    batch = [torch.stack(x) for x in zip(rows[0], rows[1], strict=True)]
    assert theirs(*batch).item() == pytest.approx(expected.item(), rel=1e-5)


NAMES = {
    "tokens.": "token_embedding.",
    "positions.": "position_embedding.",
    "choice.": "choice_head.",
    "qkv.": "attention.qkv.",
    "out.": "attention.out.",
    "widen.": "mlp.up.",
    "narrow.": "mlp.out.",
}


def as_the_engines(model: padded.TwoHeads) -> dict[str, torch.Tensor]:
    """Its weights by the engine's names; there the rows of qkv are ordered (head, 3, d)."""
    found = {}
    for name, value in model.state_dict().items():
        own = next((name.replace(mine, theirs) for mine, theirs in NAMES.items() if mine in name), name)
        by_head = value.unflatten(0, (3, 2, -1)).transpose(0, 1).flatten(0, 2) if "qkv" in name else value
        found[own] = by_head
    return found


@pytest.fixture
def task(tmp_path) -> Task:
    home = tmp_path / "dialogues"
    home.mkdir()
    for name, first in (("train", 0), ("valid", 50), ("test", 60)):
        words = [prose(first + i, 40).split() for i in range(10)]
        turns = [[" ".join(own[n : n + 3]) for n in range(0, 24, 4)] for own in words]
        rows = [
            {"persona": [" ".join(own[-4:])], "turns": said} for own, said in zip(words, turns, strict=True)
        ]
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, meta = make_tokens(SMOKE, tmp_path, str(home))
    settings = engine_settings(SMOKE, data) | best(SMOKE)
    return Task(SMOKE, settings, tmp_path / "tokens/bench", meta["dtype"], meta["vocabulary_size"], None)


def test_it_trains_on_the_engines_tokens_from_chance(task):
    assert task.vocabulary == SMOKE.vocabulary == 261  # bytes and the specials
    found = padded.measure(task)
    assert found["loss_first"] == pytest.approx((math.log(261) + math.log(3)) / 2, abs=0.1)
    assert found["loss_last"] < found["loss_first"] and len(found["step_seconds"]) == SMOKE.steps
    row = complete({"status": "ok", **found}, SMOKE, task.vocabulary, "cpu")
    assert row["status"] == "ok" and row["mfu"] is None
    assert row["samples_per_second"] == pytest.approx(4 * 1000 / row["step_ms"])


def test_the_engine_has_as_many_parameters_and_valid_settings(task):
    config = resolve(task.settings, "test")
    model = double_heads.build(config.model, task.vocabulary)
    own = padded.TwoHeads(config.model, task.vocabulary)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in own.parameters())


def test_the_size_of_the_study_is_one_of_dialogues():
    size = SIZES["persona"]
    assert peers(size) == ("engine", "padded") and size.samples == 39
    data = {"dataset": "personachat", "study": "bench", "tokenizer": "gpt2", "candidates": 8}
    config = resolve(engine_settings(size, data) | best(size), "test")
    assert config.model.shared_context and config.training.batch_size == 39
    assert size.chance(50262) == pytest.approx((math.log(50262) + math.log(8)) / 2)
    assert replace(size, choices=0).chance(50262) == pytest.approx(math.log(50262))
