"""Labelled rows: nothing in two splits, exact counts, and token directories that say what is wrong with them."""

import csv
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_runs import REPOSITORY

from engine.config import Data, load, resolve
from engine.data import labelled, prepare, table, words
from engine.data.labelled import Source, split
from engine.errors import ConfigError
from engine.launch import tokens_for


def settings(**values) -> SimpleNamespace:
    return SimpleNamespace(**(dataclasses.asdict(Data()) | values))


def held(validation: int, test: int = 1, **values) -> SimpleNamespace:
    return settings(validation_rows=validation, test_rows=test, **values)


def made(count: int) -> list:
    return [(f"text number {i}", i % 3) for i in range(count)]


ABC = ["a", "b", "c"]

# --- splitting


def test_what_is_dropped_and_why():
    train = [
        ("One text", 0),
        ("one  TEXT ", 0),  # the same
        ("two", 0),
        ("two", 1),  # labels differ: neither can be trusted
        ("Two\n", 0),
        ("of the test", 1),
        ("Of  the test", 2),
        ("of the validation", 1),
        ("three", 1),
        ("four", 2),
    ]
    source = Source(
        ABC,
        train,
        validation=[("of the validation", 1), ("Of the TEST", 1)],
        test=[("of the test", 1), ("of the test", 1)],
    )
    found = split(source, settings())
    assert found.dropped == {
        "also in the test set": 2,
        "also in the validation set": 1,
        "of the validation set, also in the test set": 1,
        "repeated": 1,
        "same text with different labels": 3,
    }
    assert sorted(found.rows["train"]) == [("One text", 0), ("four", 2), ("three", 1)]
    assert found.rows["validation"] == [("of the validation", 1)]
    assert found.rows["test"] == source.test  # as published


def test_rows_are_held_out_by_the_hash_of_their_text():
    found = split(Source(ABC, made(20)), held(5, 4))
    ordered = sorted(made(20), key=lambda row: labelled.key(row[0]))
    assert found.rows["test"] == ordered[:4]
    assert found.rows["validation"] == ordered[4:9]
    assert found.rows["train"] == ordered[9:]
    assert labelled.key("A  b\n") == labelled.key("a B") != labelled.key("ab")


def test_the_order_of_the_file_changes_nothing():
    rows = [*made(60), ("Text number 7", 1), ("TEXT  number 8", 2)]
    first = split(Source(ABC, rows), held(10, 5, max_train_rows=30))
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        again = split(Source(ABC, rows), held(10, 5, max_train_rows=30))
        assert again.rows == first.rows and again.dropped == first.dropped


def test_other_numbers_of_rows_move_no_row_that_need_not_move():
    small, large = (split(Source(ABC, made(90)), held(n, 10)).rows for n in (10, 20))
    assert small["test"] == large["test"]
    assert large["validation"][:10] == small["validation"]
    fewer = split(Source(ABC, made(90)), held(10, 10, max_train_rows=25)).rows
    assert fewer["train"] == small["train"][:25] and fewer["validation"] == small["validation"]


@pytest.mark.parametrize("seed", range(10))
def test_no_text_is_in_two_splits_and_every_row_is_accounted_for(seed):
    draw = random.Random(seed)
    texts = ["a b", "A b", "a  B", *(f"{draw.choice('xyzXYZ')} {draw.randint(1, 40)}" for _ in range(150))]
    rows = [(text, int(text[-1], 36) % 2) for text in texts]
    cut = draw.randint(1, 30)
    test = rows[:cut] if seed % 2 else None
    source = Source(["p", "q"], rows[cut if test else 0 :], test=test)
    found = split(source, held(8, 6))
    keys = {name: {labelled.key(text) for text, _ in part} for name, part in found.rows.items()}
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    assert len(keys["train"]) == len(found.rows["train"])
    kept = sum(len(found.rows[name]) for name in ("train", "validation", *(() if test else ("test",))))
    assert kept + sum(found.dropped.values()) == len(source.train)


@pytest.mark.parametrize(
    ("source", "wanted", "message"),
    [
        (Source(ABC, made(9)), held(5, 9), "test_rows = 9: must leave training rows, and there are 9 rows"),
        (
            Source(ABC, made(9)),
            held(7, 2),
            "validation_rows = 7: must leave training rows, and there are 7 rows",
        ),
        (Source(ABC, made(9), test=made(9)), held(1), "validation_rows = 1: .* there are 0 rows"),
        (Source(ABC, made(9), made(3), made(3)), held(1), "all 3 validation rows are also in the test set"),
        (
            Source(ABC, made(90)),
            held(5, 5, max_train_rows=81),
            "max_train_rows = 81: 80 training rows are left",
        ),
        (Source([*ABC, "d", "e"], made(90)), held(5, 5), "no training row is left of d, e; hold out fewer"),
    ],
)
def test_too_few_rows_are_an_error(source, wanted, message):
    with pytest.raises(ConfigError, match=message):
        split(source, wanted)


# --- token directories

TRAIN = [("good", "A fine day, a fine night!"), ("bad", "rain"), ("good", "sun"), ("bad", "a storm")]
TEST = [("bad", "A dull day"), ("good", ""), ("good", "fine")]


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("label", "text")) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def rows_of(tmp_path) -> SimpleNamespace:
    """Settings of a small table; change its files through `data_dir`."""
    source = tmp_path / "source"
    source.mkdir()
    write_csv(source / "train.csv", TRAIN)
    write_csv(source / "test.csv", TEST)
    return held(1, 2000, dataset="table", data_dir=str(source), tokenizer="frequent_words", vocab_size=5)


def test_meta_says_what_was_made(rows_of, tmp_path):
    found = prepare.prepare(rows_of, tmp_path / "tokens")
    assert json.loads((tmp_path / "tokens/meta.json").read_text()) == found
    assert (found["kind"], found["classes"], found["dtype"]) == ("labelled", ["bad", "good"], "uint16")
    assert found["settings"] == vars(rows_of) and found["vocabulary_size"] == 5
    assert found["source_rows"] == {"train": 4, "test": 3} and found["of_rows"] == {}
    test = found["splits"]["test"]
    assert (test["rows"], test["rows_per_class"], test["empty_rows"]) == (3, [1, 2], 1)
    assert (test["tokens"], test["bytes"]) == (5, 14)
    assert found["splits"]["train"]["rows"] == 3 and found["splits"]["validation"]["rows"] == 1
    assert len(list((tmp_path / "tokens").iterdir())) == 11 and not list(tmp_path.glob(".tokens*"))


def test_the_rows_come_back(rows_of, tmp_path):
    prepare.prepare(rows_of, tmp_path / "tokens")
    tokens = prepare.open_tokens(tmp_path / "tokens", rows_of, verify=True)
    tokenizer = prepare.load_tokenizer(tmp_path / "tokens")
    source = split(table.load(rows_of), rows_of).rows
    for name in prepare.SPLITS:
        examples = getattr(tokens, name)
        assert examples.sha256() == tokens.meta["splits"][name]["sha256_rows"]
        assert examples.labels.tolist() == [label for _, label in source[name]]
        assert (np.asarray(examples.lengths()) > 0).all() and (np.asarray(examples.tokens) > 0).all()
        for i, (text, _) in enumerate(source[name]):
            expected = tokenizer.encode(text).tolist() or [tokenizer.unknown_id]
            assert examples.row(i).tolist() == expected
    assert not tokens.train.tokens.flags.writeable and tokens.train.tokens.dtype == np.uint16
    assert tokens.train.ends.dtype == np.int64 and tokens.train.labels.dtype == np.int32
    assert tokens.meta["splits"]["test"]["bytes_per_token"] == pytest.approx(14 / 5)


def test_the_vocabulary_is_of_the_training_rows_alone(rows_of, tmp_path):
    rows_of.vocab_size = 4
    write_csv(Path(rows_of.data_dir, "valid.csv"), [("good", "day day day day"), ("bad", "day")])
    rows_of.validation_rows = 2000
    prepare.prepare(rows_of, tmp_path / "tokens")
    assert prepare.load_tokenizer(tmp_path / "tokens").words == ["<pad>", "<unk>", "a", "fine"]


def test_a_large_vocabulary_takes_four_bytes_a_token(rows_of, tmp_path):
    rows_of.tokenizer, rows_of.vocab_size = "hashed_words", 70_000
    assert prepare.prepare(rows_of, tmp_path / "tokens")["dtype"] == "uint32"
    tokens = prepare.open_tokens(tmp_path / "tokens", verify=True)
    assert tokens.test.row(2).tolist() == [1 + words.fnv1a(b"fine") % 69_999]


@pytest.mark.parametrize("file", ["train.bin", "validation.ends.bin", "test.labels.bin"])
def test_damage_is_named(rows_of, tmp_path, file):
    prepare.prepare(rows_of, tmp_path / "tokens")
    path = tmp_path / "tokens" / file
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    prepare.open_tokens(tmp_path / "tokens")  # same size: only verify can tell
    with pytest.raises(ConfigError, match=f"1 problem(?s:.*){file}: wrong sha256: expected"):
        prepare.open_tokens(tmp_path / "tokens", verify=True)
    path.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=f"{file}: expected {len(content)} bytes, found {len(content) - 1}"):
        prepare.open_tokens(tmp_path / "tokens")
    path.unlink()
    with pytest.raises(ConfigError, match=f"{file}: expected {len(content)} bytes, found 0"):
        prepare.open_tokens(tmp_path / "tokens")


def test_tokens_of_other_settings_or_another_clean_up_are_refused(rows_of, tmp_path, monkeypatch):
    prepare.prepare(rows_of, tmp_path / "tokens")
    other = settings(**vars(rows_of) | {"validation_rows": 2, "label_column": "y"})
    with pytest.raises(
        ConfigError, match="(?s)2 problems.*label_column: .*'label'.*'y'.*validation_rows: .* 1, .* 2"
    ):
        prepare.open_tokens(tmp_path / "tokens", other)
    monkeypatch.setattr(table, "VERSION", 2)
    with pytest.raises(ConfigError, match="made with version 1 of its clean-up, this is version 2"):
        prepare.open_tokens(tmp_path / "tokens", rows_of)


def test_a_failure_half_way_leaves_the_old_tokens_alone(rows_of, tmp_path, monkeypatch):
    before = prepare.prepare(rows_of, tmp_path / "tokens")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(words.FrequentWords, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        prepare.prepare(settings(**vars(rows_of) | {"validation_rows": 2}), tmp_path / "tokens")
    assert prepare.open_tokens(tmp_path / "tokens", rows_of, verify=True).meta == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "tokens"]


def test_a_run_by_hand_makes_its_tokens(rows_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Settings of this size are below what a run may have: vocab_size ≥ 257, so words are hashed.
    values = {
        "dataset": "table",
        "data_dir": rows_of.data_dir,
        "tokenizer": "hashed_words",
        "vocab_size": 300,
    }
    config = resolve(values | {"validation_rows": 1, "model": "classifier"}, "here")
    assert len(tokens_for(config).train) == 3
    assert len(tokens_for(config).test) == 3  # opened, not made again
    assert (tmp_path / "tokens/by_hand/meta.json").is_file()


def test_preparing_rows_imports_no_heavy_library(rows_of, tmp_path):
    code = (
        "import sys; from types import SimpleNamespace; from engine.data.prepare import open_tokens, prepare; "
        f"prepare(SimpleNamespace(**{vars(rows_of)!r}), 'tokens'); open_tokens('tokens'); "
        "print(sorted({'torch', 'datasets', 'tokenizers', 'polars', 'pyarrow'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# --- settings and stages


def test_a_model_takes_the_data_sets_it_can_learn_from():
    words_of = {"tokenizer": "hashed_words"}
    with pytest.raises(
        ConfigError, match="'gpt': cannot learn from .* 'imdb'; .* stdlib, wikitext2, tiny.*, text"
    ):
        resolve({"dataset": "imdb", **words_of}, "here")
    with pytest.raises(ConfigError, match="'classifier': .* 'stdlib'; .* ag_news, imdb, table, synthetic"):
        resolve({"model": "classifier"}, "here")


def test_the_answer_is_no_input():
    table_of = {"dataset": "table", "data_dir": "x", "model": "classifier", "tokenizer": "hashed_words"}
    with pytest.raises(ConfigError, match="label_column = 'y': is a text_column too"):
        resolve({**table_of, "text_column": "x, y", "label_column": "y"}, "here")
    with pytest.raises(ConfigError, match="text_column = 'x,,y': must be names of columns"):
        resolve({**table_of, "text_column": "x,,y"}, "here")


def test_a_file_of_the_data_section_alone_is_complete(tmp_path):
    path = tmp_path / "data.toml"
    path.write_text('[data]\ndataset = "synthetic"\ntokenizer = "hashed_words"\n', encoding="utf-8")
    assert load(path, only=("data",)).data.dataset == "synthetic"
    with pytest.raises(ConfigError, match="'gpt': cannot learn from dataset = 'synthetic'"):
        load(path)  # as a run, it has the default model
    path.write_text('[data]\ndataset = "synthetic"\nmax_train_bytes = 5\n', encoding="utf-8")
    with pytest.raises(
        ConfigError, match="(?s)2 problems.*max_train_bytes = 5: would do nothing.*tokenizer = 'bytes'"
    ):
        load(path, only=("data",))


def test_the_stage_says_rows_and_what_was_dropped(rows_of, tmp_path):
    write_csv(Path(rows_of.data_dir, "train.csv"), [*TRAIN, ("bad", "Rain"), ("good", "a  dull day")])
    (tmp_path / "data.toml").write_text(
        '[data]\ndataset = "table"\ndata_dir = "source"\ntokenizer = "hashed_words"\nvalidation_rows = 1\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "stages.tokenize", "data.toml", "tokens"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert [line.split(", ")[0] for line in lines[:3]] == [
        "tokenize: table train: 3 rows",
        "tokenize: table validation: 1 row",
        "tokenize: table test: 3 rows",
    ]
    assert lines[3:] == [
        "tokenize: table: 1 row dropped: also in the test set",
        "tokenize: table: 1 row dropped: repeated",
    ]
