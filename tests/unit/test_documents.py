"""Text of documents: no document is in two splits or comes twice, and shards read as one array."""

import dataclasses
import hashlib
import json
import lzma
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from engine import launch, observed
from engine.config import Data, resolve
from engine.data import DOCUMENTS, documents, fineweb_edu, gpt2_files, imdb_text, prepare, tokenfiles
from engine.data.batches import TrainOrder, eval_batches
from engine.data.labelled import key
from engine.data.parquet import column
from engine.data.tokenfiles import TokenFiles
from engine.data.tokenizers import Bpe
from engine.errors import ConfigError
from engine.tasks import next_token
from metrics import words

TEXTS = [f"Page {i} tells of things {i * i % 101} and {i % 7}.\nIt ends.\n" for i in range(300)]


def settings(**values) -> SimpleNamespace:
    asked = {"dataset": "fineweb_edu", "tokenizer": "bpe", "vocab_size": 300} | values
    return SimpleNamespace(**(dataclasses.asdict(Data()) | asked))


@pytest.fixture
def pages(tmp_path):
    """A directory with two parquet files of documents, one of them repeated in other case and one empty."""
    directory = tmp_path / "pages"
    directory.mkdir()
    for name, texts in (("b", [*TEXTS[150:], TEXTS[0].upper(), " \n"]), ("a", TEXTS[:150])):
        own = {"id": range(len(texts)), "dump": texts, "url": texts}
        parquet.write_table(pa.table({"text": texts} | own), directory / f"{name}.parquet")
    return directory


def decoded(directory, split: str) -> list[str]:
    tokens, tokenizer = prepare.open_tokens(directory), prepare.load_tokenizer(directory)
    return tokenizer.decode(getattr(tokens, split)[:]).split("<|endoftext|>")


def test_every_document_is_in_one_split_once_behind_a_separator(pages, tmp_path):
    meta = prepare.prepare(settings(data_dir=str(pages)), tmp_path / "tokens")
    assert meta["kind"] == "documents" and meta["dtype"] == "uint16" and meta["separator_id"] == 299
    assert meta["dropped"] == {"repeated": 1, "empty": 1}
    assert set(meta["source"]["sha256_files"]) == {"a.parquet", "b.parquet"}
    parts = {split: decoded(tmp_path / "tokens", split) for split in ("train", "validation", "test")}
    assert all(part.pop(0) == "" for part in parts.values())  # a separator comes first
    assert sorted(text for part in parts.values() for text in part) == sorted(TEXTS)
    hashes = {split: {key(text) for text in part} for split, part in parts.items()}
    assert not hashes["train"] & (hashes["validation"] | hashes["test"])
    for split, part in parts.items():
        facts = meta["splits"][split]
        assert facts["documents"] == len(part) > 0
        assert facts["bytes"] == sum(len(text.encode()) for text in part)
        assert facts["bytes_per_token"] == facts["bytes"] / facts["tokens"]


def test_the_order_of_the_source_and_more_validation_move_no_test_document(pages, tmp_path):
    prepare.prepare(settings(data_dir=str(pages)), tmp_path / "tokens")
    (pages / "a.parquet").rename(pages / "c.parquet")
    prepare.prepare(settings(data_dir=str(pages), validation_percent=20), tmp_path / "again")
    tests = [{key(t) for t in decoded(tmp_path / name, "test")} for name in ("tokens", "again")]
    assert tests[0] == tests[1] and len(tests[0]) > 5
    few, many = (len(decoded(tmp_path / name, "validation")) for name in ("tokens", "again"))
    assert few < 30 < many


def test_a_document_is_placed_by_its_hash():
    digest = int.from_bytes(key("a page")[:8], "big") % 100
    asked = {"test_percent": digest, "validation_percent": 1}
    assert documents.split_of("A  page", SimpleNamespace(**asked)) == "validation"
    assert documents.split_of("A  page", SimpleNamespace(**asked | {"test_percent": digest + 1})) == "test"
    assert (
        documents.split_of("A  page", SimpleNamespace(test_percent=0, validation_percent=digest)) == "train"
    )


def test_whole_documents_up_to_so_many_bytes(pages, tmp_path):
    asked = settings(data_dir=str(pages), max_train_bytes=5000, vocab_size=270, validation_percent=20)
    meta = prepare.prepare(asked, tmp_path / "tokens")
    train = [text for text in TEXTS if documents.split_of(text, asked) == "train"]
    sizes = np.cumsum([len(text.encode()) for text in train])
    count = int((sizes <= 5000).sum())
    assert meta["splits"]["train"]["documents"] == count < len(train)
    assert decoded(tmp_path / "tokens", "train")[1:] == train[:count]


def test_too_few_documents_are_told(tmp_path, pages):
    parquet.write_table(pa.table({"text": TEXTS[:1]}), pages / "a.parquet")
    (pages / "b.parquet").unlink()
    with pytest.raises(ConfigError, match=r"1 document is too few: none is left for .*validation"):
        prepare.prepare(settings(data_dir=str(pages), vocab_size=257), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_column_without_text_and_a_damaged_file_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ConfigError, match="its column 'text' is of int64, not of text"):
        list(column(path, "text"))
    with pytest.raises(ConfigError, match="has no column 'page'; its columns are text"):
        list(column(path, "page"))
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        list(column(path, "text"))


# --- shards


def test_shards_are_the_tokens_that_one_file_would_be(pages, tmp_path, monkeypatch):
    whole = prepare.prepare(settings(data_dir=str(pages)), tmp_path / "whole")
    monkeypatch.setattr(tokenfiles, "SHARD_TOKENS", 1000)
    meta = prepare.prepare(settings(data_dir=str(pages)), tmp_path / "tokens")
    facts = meta["splits"]["train"]
    assert facts["sha256_tokens"] == whole["splits"]["train"]["sha256_tokens"]
    assert [one["file"] for one in facts["shards"]][:2] == ["train.0000.bin", "train.0001.bin"]
    assert [one["tokens"] for one in facts["shards"][:-1]] == [1000] * (len(facts["shards"]) - 1)
    tokens = prepare.open_tokens(tmp_path / "tokens", verify=True)
    one = prepare.open_tokens(tmp_path / "whole", verify=True)
    assert isinstance(tokens.train, TokenFiles) and isinstance(one.train, np.ndarray)
    for a, b in zip(*(list(_batches(t.train)) for t in (tokens, one)), strict=True):
        np.testing.assert_array_equal(a, b)


def _batches(tokens):
    order = TrainOrder(tokens, context=64, batch_size=4, seed=3)
    for step in range(5):
        yield from order.batch(order.sample_ids(step))
    for inputs, targets in eval_batches(tokens, 64, 8):
        yield from (inputs.numpy(), targets.numpy())


def test_an_array_of_several_parts():
    whole = np.arange(10, dtype=np.uint16)
    files = TokenFiles([whole[:3], whole[3:4], whole[4:]])
    assert len(files) == 10 and files.shape == (10,) and files.dtype == np.uint16
    for part in (slice(None), slice(2, 5), slice(4, 4), slice(-3, None), slice(0, 99)):
        np.testing.assert_array_equal(files[part], whole[part])
    at = np.array([[9, 0], [3, 4]])
    np.testing.assert_array_equal(files[at], whole[at])
    np.testing.assert_array_equal(np.bincount(files), np.bincount(whole))
    with pytest.raises(IndexError, match="positions 3 to 10 of 10 tokens"):
        files[np.array([3, 10])]


def test_a_damaged_shard_is_named(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenfiles, "SHARD_TOKENS", 1000)
    prepare.prepare(settings(data_dir=str(pages)), tmp_path / "tokens")
    path = tmp_path / "tokens/train.0001.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"train\.0001\.bin: wrong sha256"):
        prepare.open_tokens(tmp_path / "tokens", verify=True)


# --- no tokens in the place of others


def test_random_tokens_in_the_place_of_the_data_are_refused_before_a_run(pages, tmp_path, monkeypatch):
    """The original trained on them, in silence, where its data was missing."""
    monkeypatch.chdir(tmp_path)
    asked = {"dataset": "fineweb_edu", "data_dir": str(pages), "tokenizer": "bpe", "vocab_size": 300}
    config = resolve({"study": "here", **asked}, "here")
    tokens = launch.tokens_for(config)
    assert len(tokens.train) > 1000
    generator = np.random.default_rng(0)
    generator.integers(0, 300, len(tokens.train), dtype=np.uint16).tofile("tokens/here/train.bin")
    with pytest.raises(ConfigError, match=r"train\.bin: wrong sha256: expected "):
        launch.tokens_for(config)
    for path in pages.iterdir():
        path.unlink()
    (tmp_path / "tokens/here/meta.json").unlink()
    with pytest.raises(ConfigError, match="no tokens in tokens/here"):
        launch.tokens_for(config)
    with pytest.raises(ConfigError, match=r"there is no \.parquet file"):
        prepare.prepare(config.data, tmp_path / "other")


@pytest.mark.parametrize("dataset", DOCUMENTS)
def test_without_a_network_a_data_set_by_name_says_what_to_do(dataset, monkeypatch, tmp_path):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(ConfigError, match=rf"dataset={dataset} could not be fetched by name .*-S data_dir"):
        prepare.prepare(settings(dataset=dataset), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_documents_by_name_are_streamed_and_no_more_than_asked_for(monkeypatch, tmp_path):
    import datasets

    given = []

    def stream(name, config, split, streaming):
        assert (name, config, split, streaming) == (
            "HuggingFaceFW/fineweb-edu",
            "sample-10BT",
            "train",
            True,
        )
        for text in TEXTS:
            given.append(text)
            yield {"text": text, "id": "x"}

    monkeypatch.setattr(datasets, "load_dataset", stream)
    source = fineweb_edu.load(settings())
    asked = settings(max_train_bytes=1000)
    assert len(list(documents.training_documents(source, asked))) < len(given) < 50


# --- IMDb's reviews as text


def reviews(tmp_path, **counts):
    rows = [("train", "pos"), ("train", "neg"), ("test", "pos"), ("train", "unsup")]
    table = {
        "split": [split for split, _ in rows for _ in range(20)],
        "label": [label for _, label in rows for _ in range(20)],
        "text": [f"{split} {label} film {i}" for split, label in rows for i in range(20)],
    }
    parquet.write_table(pa.table(table), tmp_path / imdb_text.FILE)
    return table


def test_imdb_text_is_all_but_the_test_reviews_and_says_what_it_stands_in_for(tmp_path, monkeypatch):
    table = reviews(tmp_path)
    monkeypatch.setitem(imdb_text.SHA256, imdb_text.FILE, None)
    monkeypatch.setattr(imdb_text, "REVIEWS", {"train": 40, "unsupervised": 20})
    source = imdb_text.load(settings(dataset="imdb_text", data_dir=str(tmp_path)))
    assert sorted(source.documents()) == sorted(t for t in table["text"] if not t.startswith("test"))
    assert source.stands_in_for == "text of the web (FineWeb-Edu)"
    monkeypatch.setattr(imdb_text, "REVIEWS", {"train": 40, "unsupervised": 21})
    with pytest.raises(ConfigError, match="IMDb: expected reviews .*21.*found .*20"):
        imdb_text.load(settings(dataset="imdb_text", data_dir=str(tmp_path)))


def test_the_real_reviews_are_75_thousand_documents():
    directory = Path(__file__).resolve().parents[3] / "shared/data/imdb"
    if not directory.is_dir():
        pytest.skip(f"no real files at {directory}")
    texts = list(imdb_text.load(settings(dataset="imdb_text", data_dir=str(directory))).documents())
    assert len(texts) == 75_000 and all(texts) and not any("<br" in text for text in texts)


def test_the_ledger_and_every_tables_notes_say_what_stands_in(pages, tmp_path):
    asked = settings(data_dir=str(pages))
    meta = prepare.prepare(asked, tmp_path / "tokens")
    tokens = prepare.open_tokens(tmp_path / "tokens")
    config = resolve({"dataset": "fineweb_edu", "tokenizer": "bpe", "vocab_size": 300}, "here")
    run = SimpleNamespace(
        tokens=tokens, order=TrainOrder(tokens.train, 16, 4, 1), steps_taken=100, task=next_token
    )
    local = observed.data(config, run, 1)[0]
    assert local.how.endswith(f"; unverified: {meta['unverified']}") and local.agrees
    assert words.PART_OF.search(local.how)[0] == f"unverified: {meta['unverified']}"
    meta["stands_in_for"], meta["unverified"] = "text of the web (FineWeb-Edu)", ""
    (tmp_path / "tokens/meta.json").write_text(json.dumps(meta), encoding="utf-8")
    run.tokens = prepare.open_tokens(tmp_path / "tokens")
    line = observed.data(config, run, 1)[0]
    assert line.how.endswith("; a stand-in for text of the web (FineWeb-Edu)")
    assert words.PART_OF.search(line.how)[0] == "a stand-in for text of the web (FineWeb-Edu)"


def test_other_documents_are_said_to_stand_in_for_the_data_set(pages):
    """Any parquet file of texts will do, but it is not FineWeb-Edu."""
    asked = settings(data_dir=str(pages))
    assert fineweb_edu.load(asked).stands_in_for == ""
    parquet.write_table(pa.table({"text": TEXTS}), pages / "c.parquet")
    source = fineweb_edu.load(asked)
    assert (source.stands_in_for, source.unverified) == ("FineWeb-Edu", "")


def claimed(directory, texts) -> SimpleNamespace:
    """Settings on one parquet file of these texts that has FineWeb-Edu's own columns."""
    table = pa.table(dict.fromkeys(("text", "id", "dump", "url"), list(texts)))
    parquet.write_table(table, directory / "000_00000.parquet")
    return settings(data_dir=str(directory))


def test_columns_do_not_make_files_the_data_set(tmp_path):
    """The first text has 2 of 20 words that are common ones, which is enough; the second 1 of 20."""
    filler = "stone "
    two = fineweb_edu.load(claimed(tmp_path, ["The " + 9 * filler + "OF " + 9 * filler]))
    assert two.unverified == "local files said to be FineWeb-Edu"
    one = fineweb_edu.load(claimed(tmp_path, ["In_" + 19 * filler]))
    assert one.unverified == (
        "local files said to be FineWeb-Edu, whose words are not those of English text (5.0% of them are a, and, in, "
        "of, the, to)"
    )


def test_random_words_with_its_columns_are_noted_to_the_end(tmp_path):
    """From the token files to the ledger's line and what every table says of it."""
    draw = np.random.default_rng(0).integers(0, 5000, (200, 60))
    meta = prepare.prepare(
        claimed(tmp_path, (" ".join(f"w{n}" for n in row) for row in draw)), tmp_path / "tokens"
    )
    assert meta["stands_in_for"] == ""
    assert meta["unverified"].startswith(
        "local files said to be FineWeb-Edu, whose words are not those of English"
    )
    assert "(0.0% of them are" in meta["unverified"]
    tokens = prepare.open_tokens(tmp_path / "tokens")
    run = SimpleNamespace(
        tokens=tokens, order=TrainOrder(tokens.train, 16, 4, 1), steps_taken=100, task=next_token
    )
    config = resolve({"dataset": "fineweb_edu", "tokenizer": "bpe", "vocab_size": 300}, "here")
    entry = vars(observed.data(config, run, 1)[0])
    summary = SimpleNamespace(results=SimpleNamespace(of=lambda run: [SimpleNamespace(ledger=[entry])]))
    assert words.data_notes(summary, SimpleNamespace(run="a")) == [
        f"dataset fineweb_edu: unverified: {meta['unverified']}"
    ]


def test_real_text_of_the_data_set_is_taken_for_english():
    path = Path(__file__).resolve().parents[3] / "shared/data/fineweb_sample/fineweb_sample.txt.xz"
    if not path.is_file():
        pytest.skip(f"no real file at {path}")
    text = lzma.decompress(path.read_bytes()).decode()
    assert all(fineweb_edu._unlike(iter([text[i : i + 20_000]])) == "" for i in range(0, len(text), 20_000))


def test_imdb_text_refuses_another_file(tmp_path):
    reviews(tmp_path)
    with pytest.raises(ConfigError, match="wrong sha256: expected ec6291ab"):
        imdb_text.load(settings(dataset="imdb_text", data_dir=str(tmp_path)))


# --- GPT-2's vocabulary by name


def test_gpt2_files_by_name_must_be_the_known_ones(monkeypatch, tmp_path):
    import huggingface_hub

    def download(hub, name):
        assert hub == "openai-community/gpt2"
        (tmp_path / name).write_bytes(b"{}")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        ConfigError, match=r"2 problems in openai-community/gpt2(?s:.*)merges\.txt: wrong sha256"
    ):
        gpt2_files.read("")
    digest = hashlib.sha256(b"{}").hexdigest()
    monkeypatch.setattr(gpt2_files, "SHA256", dict.fromkeys(gpt2_files.SHA256, digest))
    assert gpt2_files.read("") == {"encoder.json": "{}", "vocab.bpe": "{}"}


def test_a_tokenizer_without_a_separator_is_refused():
    with pytest.raises(
        ConfigError, match="documents are divided by an end-of-text token; set it to one of bpe"
    ):
        resolve({"dataset": "imdb_text", "tokenizer": "bytes"}, "here")


def test_text_that_spells_the_separator_is_ordinary_text(tmp_path):
    tokenizer = Bpe.build_for_documents(TEXTS, settings(vocab_size=300))
    [ids] = tokenizer.encode_documents(["a <|endoftext|> b"])
    assert tokenizer.separator_id == 299 not in ids.tolist() and tokenizer.vocabulary_size == 300
    assert tokenizer.decode(ids) == "a <|endoftext|> b"
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["<|endoftext|>"] == 299
