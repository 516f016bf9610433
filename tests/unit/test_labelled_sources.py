"""Where labelled rows come from: a user's own tables, AG News, IMDb and made-up rows."""

import dataclasses
import importlib
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from engine.config import Data
from engine.data import ag_news, imdb, prepare, synthetic, table
from engine.errors import ConfigError

REAL = Path(__file__).resolve().parents[3] / "shared/data"


def real(name: str) -> str:
    directory = REAL / name
    if not directory.is_dir():
        pytest.skip(f"no real files at {directory}")
    return str(directory)


def settings(**values) -> SimpleNamespace:
    return SimpleNamespace(**(dataclasses.asdict(Data()) | values))


# --- a user's own tables


@pytest.fixture
def put(tmp_path):
    """Writes a file of the table's directory: put(name, content) → settings that read it."""

    def write(name: str, content: str | bytes, **values) -> SimpleNamespace:
        raw = content.encode("utf-8") if isinstance(content, str) else content
        (tmp_path / name).write_bytes(raw)
        return settings(dataset="table", data_dir=str(tmp_path), **values)

    return write


CSV = 'label,text,title\nb,"one, ""two""",T1\na,"three\nfour",T2\n\nb,,T3\n'
ROWS = [('one, "two"', 1), ("three\nfour", 0), ("", 1)]


def test_a_csv_file_by_hand(put):
    found = table.load(put("train.csv", CSV))
    assert found.classes == ["a", "b"] and found.train == ROWS
    assert found.validation is None and found.test is None and found.of_rows == {}
    assert table.load(put("train.csv", "\ufeff" + CSV)).train == ROWS
    assert table.load(put("train.csv", CSV.replace("\n", "\r\n"))).train[0] == ROWS[0]


def test_every_format_gives_the_same_rows(put, tmp_path):
    (tmp_path / "x").mkdir()
    for name, content in {
        "train.csv.xz": lzma.compress(CSV.encode()),
        "train.jsonl": '{"text": "one, \\"two\\"", "label": "b", "more": [1]}\n{"label": "a", "text": '
        '"three\\nfour"}\n\n{"text": null, "label": " b "}\n',
    }.items():
        assert table.load(put(name, content)).train == ROWS, name
        (tmp_path / name).unlink()
    columns = {"label": ["b", "a", "b"], "text": ['one, "two"', "three\nfour", None], "n": [[1], [2], [3]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    assert table.load(settings(data_dir=str(tmp_path))).train == ROWS


def test_several_text_columns_are_joined_by_a_space(put):
    wanted = put("train.csv", CSV, text_column="title, text")
    assert [text for text, _ in table.load(wanted).train] == ['T1 one, "two"', "T2 three\nfour", "T3 "]


def test_the_other_splits_are_files_too_and_classes_are_those_of_training(put):
    put("train.csv", CSV)
    put("valid.jsonl", '{"text": "v", "label": "b"}')
    found = table.load(put("test.csv", "text,label\nt,a\n"))
    assert found.validation == [("v", 1)] and found.test == [("t", 0)]


def test_whole_numbers_are_sorted_as_numbers_and_may_be_json_or_parquet(put, tmp_path):
    lines = "".join(f'{{"text": "t{n}", "label": {n}}}\n' for n in (10, 9, -1, 10))
    found = table.load(put("train.jsonl", lines))
    assert found.classes == ["-1", "9", "10"] and [label for _, label in found.train] == [2, 1, 0, 2]
    (tmp_path / "train.jsonl").unlink()
    parquet.write_table(pyarrow.table({"label": [10, 9], "text": ["a", "b"]}), tmp_path / "train.parquet")
    assert table.load(settings(data_dir=str(tmp_path))).classes == ["9", "10"]
    (tmp_path / "train.parquet").unlink()
    assert table.load(put("train.csv", "text,label\nx,10\ny,9\nz,b\n")).classes == ["10", "9", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "", r"train\.csv is empty"),
        ("train.csv", "text,label\n", r"train\.csv has no rows"),
        ("train.jsonl", " \n", r"train\.jsonl is empty"),
        (
            "train.csv",
            "txt,label\na,b\n",
            r"train\.csv:(?s:.*)no column 'text' \(nearest: txt\); .* txt, label; set",
        ),
        (
            "train.csv",
            "text,q\na,b\n",
            "no column 'label'; the columns are text, q; set text_column and label_",
        ),
        ("train.csv", "text,label,text\na,b,c\n", "column 'text' is there twice"),
        (
            "train.csv",
            'text,label\n"a\nb",x\nc, \n',
            r"train\.csv:(?s:.*)line 4: label is empty; every row needs",
        ),
        ("train.csv", 'text,label\na,x\n"b\nc",\n', r"line 3: label is empty"),
        (
            "train.csv",
            "text,label\na,x\nb,x,y\n",
            r"train\.csv:(?s:.*)line 3: 3 fields, and the header has 2",
        ),
        ("train.csv", 'text,label\na,x\n"b,y\n', r"train\.csv:(?s:.*)line 3: not valid CSV: unexpected end"),
        (
            "train.csv",
            "text,label\na,x\nb,x\n",
            r"train\.csv: every label is 'x'; classes must be at least two",
        ),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text"}', r"train\.jsonl:(?s:.*)line 2: not valid JSON"),
        ("train.jsonl", '{"text": "a", "label": 1}\n[1]', "line 2: must be an object with text, label"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "line 2: no column 'label'"),
        ("train.jsonl", '{"text": "a", "label": 0.5}', "line 1: label = 0.5: must be text or a whole number"),
        ("train.jsonl", '{"text": ["a"], "label": 1}', r"line 1: text = \['a'\]: must be text"),
        ("train.parquet", b"no parquet", r"train\.parquet cannot be read as parquet"),
        (
            "train.txt",
            "a",
            r"there is no train\.csv, .*train\.jsonl\.xz or train\.parquet; it holds train\.txt",
        ),
        ("train.csv", b"text,label\n\xff,x\n", r"train\.csv is not UTF-8"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(put, name, content, message):
    with pytest.raises(ConfigError, match=message):
        table.load(put(name, content))


def test_a_class_that_training_lacks_is_told_with_its_line(put):
    put("train.csv", "text,label\nx,a\ny,b\n")
    wanted = put("test.csv", "text,label\nz,b\n\nw,c\n")
    with pytest.raises(
        ConfigError, match=r"1 problem in .*test\.csv:(?s:.*)line 4: label = 'c': no .* are a, b"
    ):
        table.load(wanted)


def test_of_many_problems_the_first_ten_are_listed(put):
    with pytest.raises(
        ConfigError, match=r"11 problems(?s:.*)line 11: label is empty(?s:.*)and 2 more"
    ) as error:
        table.load(put("train.csv", "text,label\n" + "x,\n" * 12))
    assert "line 12" not in str(error.value)


def test_a_nested_column_of_parquet_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"label": ["a"], "text": [["b"]]}), tmp_path / "train.parquet")
    with pytest.raises(
        ConfigError, match=r"train\.parquet:(?s:.*)text: must be a column of text or whole numbers"
    ):
        table.load(settings(data_dir=str(tmp_path)))


def test_two_files_of_a_split_or_settings_without_effect_are_refused(put):
    put("train.csv", CSV)
    wanted = put("valid.csv", "text,label\nv,a\n", validation_rows=7)
    with pytest.raises(
        ConfigError, match=r"validation_rows = 7: would do nothing, because valid\.csv is there"
    ):
        table.load(wanted)
    with pytest.raises(ConfigError, match=r"test_rows = 8: would do nothing, because test\.csv is there"):
        table.load(put("test.csv", "text,label\nt,a\n", test_rows=8))
    with pytest.raises(ConfigError, match=r"train\.csv and train\.jsonl are both there; keep one"):
        table.load(put("train.jsonl", "{}"))


def test_a_directory_is_asked_for():
    with pytest.raises(ConfigError, match="-S data_dir=DIRECTORY"):
        table.load(settings(dataset="table"))


def test_a_text_longer_than_the_csv_modules_limit_is_read(put):
    assert len(table.load(put("train.csv", f"text,label\n{'x' * 200_000},a\ny,b\n")).train[0][0]) == 200_000


# --- AG News


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (
            r"A second\team of  rocketeers for the  #36;10 million",
            "A second team of rocketeers for the $10 million",
        ),
        (r"costs A\$1.6 million\\next", "costs A$1.6 million next"),
        (
            "month #39;s  quot;dismal quot; M amp;S, Marks  amp; Spencer",
            'month\'s "dismal" M&S, Marks & Spencer',
        ),
        ("couldn#39;t &amp; x&#151;y &eacute; #8217;", "couldn't & x—y é’"),
        (
            'Corp. &lt;A HREF="http://x?a=b"&gt;RAD.N&lt;/A&gt;  on &lt;b&gt;...&lt;/b&gt;',
            "Corp. RAD.N on ...",
        ),
        ("Motor Corp. &lt;7269.T&gt; 3 < 4", "Motor Corp. <7269.T> 3 < 4"),
        ("the season; AT&T win; up;", "the season; AT&T win; up;"),
    ],
)
def test_published_text_is_cleaned(raw, clean):
    assert ag_news.cleaned(raw) == clean


def test_both_kinds_of_file_by_hand():
    full = '"3","Title, one","Text ""quoted"""\n"1","T","D"\n'
    assert ag_news.parsed(full, subset=False) == [('Title, one Text "quoted"', 2), ("T D", 0)]
    subset = '"label","text","source"\n"4","""a ""b"" c, d""","zy"\n"2","e ""f"" g","x"\n'
    assert ag_news.parsed(subset, subset=True) == [('a "b" c, d', 3), ('e "f" g', 1)]
    twice = '"label","text","source"\n"1","""a """"b"""" c, d""","zy"\n'
    assert ag_news.parsed(twice, subset=True) == [('a "b" c, d', 0)]


def test_the_real_ag_news(tmp_path):
    wanted = settings(
        dataset="ag_news", data_dir=real("ag_news"), tokenizer="frequent_words", vocab_size=20_000
    )
    found = prepare.prepare(wanted, tmp_path / "tokens")
    assert found["classes"] == ["World", "Sports", "Business", "Sci/Tech"]
    assert found["source_rows"] == {"train": 50_670, "test": 7_600}
    assert found["of_rows"] == {"train": 120_000, "test": 7_600}
    rows = {name: part["rows"] for name, part in found["splits"].items()}
    assert rows["validation"] == 2_000 and rows["test"] == 7_600
    assert rows["train"] + 2_000 + sum(found["dropped"].values()) == 50_670
    assert found["splits"]["test"]["rows_per_class"] == [1_900] * 4
    tokens = prepare.open_tokens(tmp_path / "tokens", wanted, verify=True)
    first = prepare.load_tokenizer(tmp_path / "tokens").decode(tokens.test.row(0))
    assert first.startswith(
        "fears for t n pension after talks unions representing workers at turner <unk> say"
    )


def test_ag_news_from_the_hub_is_the_same_test_set(monkeypatch):
    raw = ag_news._directory(real("ag_news"))
    train = [(f"number {i}", i % 4) for i in range(120_000)]

    def hub(splits: dict) -> None:
        columns = {
            split: {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
            for split, rows in splits.items()
        }
        named = {"fancyzhx/ag_news": columns}
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=named.__getitem__))

    hub({"train": train, "test": raw["test"]})
    found = ag_news.load(settings())
    assert found.test == ag_news.load(settings(data_dir=real("ag_news"))).test and found.train == train
    hub({"train": train[1:], "test": [("other", 1), *raw["test"][1:]]})
    with pytest.raises(
        ConfigError, match="2 problems(?s:.*)'train': 119999(?s:.*)test: wrong sha256: expected b16d"
    ):
        ag_news.load(settings())


@pytest.mark.parametrize("name", ["ag_news", "imdb"])
def test_without_a_network_it_says_what_to_do(monkeypatch, name):
    def no_network(*_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=no_network))
    with pytest.raises(ConfigError, match=rf"dataset={name} could not .* no route.*-S data_dir=DIRECTORY"):
        importlib.import_module(f"engine.data.{name}").load(settings())


def test_missing_and_changed_files_of_ag_news_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"(?s)2 problems.*train\.csv is missing.*nor train_subset\.csv.*test\.csv"
    ):
        ag_news.load(settings(data_dir=str(tmp_path)))
    for name in ("train_subset.csv", "test.csv"):
        (tmp_path / name).write_text("1,a,b\n")
    with pytest.raises(
        ConfigError, match=r"(?s)train_subset\.csv: wrong sha256: expected 75ac.*expected 5214"
    ):
        ag_news.load(settings(data_dir=str(tmp_path)))


# --- IMDb


def test_line_breaks_of_reviews_become_spaces():
    assert imdb.cleaned("a.<br /><br />B  c<br>d") == "a. B c d"


def test_the_real_imdb(tmp_path):
    wanted = settings(dataset="imdb", data_dir=real("imdb"), tokenizer="hashed_words", vocab_size=20_000)
    found = prepare.prepare(wanted, tmp_path / "tokens")
    assert found["source_rows"] == found["of_rows"] == {"train": 25_000, "test": 25_000}
    assert found["splits"]["test"]["rows_per_class"] == [12_500, 12_500]
    assert found["splits"]["train"]["rows"] + 2_000 + sum(found["dropped"].values()) == 25_000
    assert found["dropped"]["also in the test set"] > 0  # it is known for these


def test_imdb_from_the_hub_and_wrong_counts(monkeypatch):
    def hub(count: int) -> None:
        labels = [i % 2 for i in range(count)]
        part = {"text": [f"film<br />{i}" for i in range(count)], "label": labels}
        named = {"stanfordnlp/imdb": {"train": part, "test": part, "unsupervised": None}}
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=named.__getitem__))

    hub(25_000)
    assert imdb.load(settings()).train[:2] == [("film 0", 0), ("film 1", 1)]
    hub(24_999)
    with pytest.raises(
        ConfigError, match="IMDb: expected rows .*12500.*, found .*'neg': 12500, 'pos': 12499"
    ):
        imdb.load(settings())


def test_missing_and_changed_reviews_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data_dir=(?s:.*)reviews\.parquet is missing"):
        imdb.load(settings(data_dir=str(tmp_path)))
    (tmp_path / "reviews.parquet").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"reviews\.parquet: wrong sha256: expected ec6291ab"):
        imdb.load(settings(data_dir=str(tmp_path)))


# --- made-up rows


def test_made_up_rows_are_the_same_everywhere():
    """Recorded once: a change here needs a new VERSION."""
    rows = synthetic.rows(400)
    assert rows[0][0].startswith("fipu bafi babe gero feno kozu bale beda bafo balu fate gesu")
    assert [label for _, label in rows] == [0, 1, 2, 3] * 100
    assert synthetic.rows(2) == rows[:2]


def test_made_up_rows_can_be_learned_but_not_all_of_them():
    rows = synthetic.load(settings()).train
    assert len(rows) == len({text for text, _ in rows}) == 12_000
    lengths = [len(text.split()) for text, _ in rows]
    assert (min(lengths), max(lengths)) == (8, 60)
    vocabulary = {word: i for i, word in enumerate(sorted({w for text, _ in rows for w in text.split()}))}
    ids = [[vocabulary[w] for w in text.split()] for text, _ in rows]
    counts = np.ones((4, len(vocabulary)))
    for row, (_, label) in zip(ids[:8000], rows, strict=False):
        np.add.at(counts[label], row, 1)
    scores = np.log(counts / counts.sum(axis=1, keepdims=True))
    right = [
        scores[:, row].sum(axis=1).argmax() == label
        for row, (_, label) in zip(ids[8000:], rows[8000:], strict=True)
    ]
    assert 0.88 < np.mean(right) < 0.95
