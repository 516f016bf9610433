"""Sources, tokenizers and token directories: what goes in comes out, and what is wrong is refused by name."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import Data
from engine.data import (
    DATASETS,
    DOCUMENTS,
    LABELLED,
    TOKENIZERS,
    prepare,
    stdlib,
    textdir,
    tinyshakespeare,
    tokenizers,
    wikitext2,
)
from engine.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = Path(__file__).resolve().parents[3] / "shared/data"


def real(name: str) -> str:
    directory = REAL / name
    if not directory.is_dir():
        pytest.skip(f"no real files at {directory}")
    return str(directory)


def settings(**values) -> SimpleNamespace:
    return SimpleNamespace(**(dataclasses.asdict(Data()) | values))


TEXTS = {"train": "a cat sat\non a mat\n\nthe end\n" * 50, "valid": "a dog sat\n\n", "test": "an owl\n"}


@pytest.fixture
def text_settings(tmp_path):
    """Settings of a small text directory; change its files through `data_dir`."""
    source = tmp_path / "source"
    source.mkdir()
    for name, text in TEXTS.items():
        (source / f"{name}.txt").write_text(text, encoding="utf-8")
    return settings(dataset="text", data_dir=str(source))


# --- registries and imports


@pytest.mark.parametrize(
    "entry", [*DATASETS.values(), *DOCUMENTS.values(), *LABELLED.values(), *TOKENIZERS.values()]
)
def test_every_registered_name_exists(entry):
    module, _, attribute = entry.partition(":")
    found = importlib.import_module(module)
    if attribute:
        assert issubclass(getattr(found, attribute), tokenizers.Tokenizer)
    else:
        assert callable(found.load) and found.NAME
        assert "licence" in found.__doc__.lower()


def test_preparing_bytes_imports_no_heavy_library(text_settings, tmp_path):
    code = (
        "import sys; from types import SimpleNamespace; from engine.data.prepare import prepare; "
        f"prepare(SimpleNamespace(**{vars(text_settings)!r}), {str(tmp_path / 'tokens')!r}); "
        "print(sorted({'torch', 'datasets', 'tokenizers', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- sources


def test_stdlib_splits_are_disjoint_by_file_and_by_content():
    splits = stdlib.split_files(Path(os.__file__).parent)
    paths = [path for files in splits.values() for path, _ in files]
    texts = [text for files in splits.values() for _, text in files]
    assert len(paths) == len(set(paths)) > 300
    assert len(texts) == len(set(texts))
    assert not [p for p in paths if "test" in p.split("/")[:-1] or "site-packages" in p]
    assert "os.py" in paths
    total = sum(map(len, texts))
    shares = {name: sum(len(text) for _, text in files) / total for name, files in splits.items()}
    assert 0.85 < shares["train"] < 0.95
    assert shares["validation"] > 0.03 and shares["test"] > 0.03


def test_stdlib_keeps_one_of_identical_files_and_skips_what_is_no_library_text(tmp_path):
    contents = {
        "a.py": b"x = 1\n",
        "b/copy.py": b"x = 1\n",
        "c.py": b"\xff",
        "d.py": b"",
        "e.txt": b"no",
        "site-packages/p.py": b"p = 1\n",
        "json/test/t.py": b"t = 1\n",
        "f.py": b"f = 1",
    }
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    files = [f for split in stdlib.split_files(tmp_path).values() for f in split]
    assert sorted(files) == [("a.py", "x = 1\n"), ("f.py", "f = 1")]


def test_stdlib_split_is_a_fixed_function_of_the_path():
    assert [stdlib.split_of(p) for p in ("os.py", "json/decoder.py")] == ["train", "train"]
    counts = {name: 0 for name in ("train", "validation", "test")}
    for i in range(10_000):
        counts[stdlib.split_of(f"package/module_{i}.py")] += 1
    # Three standard deviations of a binomial count are 90 and 65.
    assert abs(counts["train"] - 9000) < 90 and abs(counts["validation"] - 500) < 65


def test_stdlib_without_source_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match="no Python source for train, validation, test"):
        stdlib.load(settings())


@pytest.mark.parametrize("dataset", ["text", "tinyshakespeare"])
def test_a_directory_is_asked_for(dataset):
    module = importlib.import_module(DATASETS[dataset])
    with pytest.raises(ConfigError, match="-S data_dir=DIRECTORY"):
        module.load(settings(dataset=dataset))


def test_every_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*train\.txt is missing.*valid\.txt.*test\.txt"):
        textdir.load(settings(data_dir=str(tmp_path / "nowhere")))


def test_an_empty_or_wrongly_encoded_file_is_refused(text_settings):
    path = Path(text_settings.data_dir, "test.txt")
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"test\.txt is empty"):
        textdir.load(text_settings)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"test\.txt is not UTF-8"):
        textdir.load(text_settings)
    path.unlink()
    path.with_name("test.txt.xz").write_bytes(b"not xz")
    with pytest.raises(ConfigError, match=r"test\.txt\.xz cannot be unpacked"):
        textdir.load(text_settings)


def test_a_changed_public_file_is_refused_with_both_digests(tmp_path):
    (tmp_path / "input.txt").write_text("First Citizen:\n")
    expected = tinyshakespeare.SHA256["input.txt"]
    with pytest.raises(ConfigError, match=f"wrong sha256: expected {expected}, found [0-9a-f]{{64}}"):
        tinyshakespeare.load(settings(data_dir=str(tmp_path)))
    for name in textdir.FILES.values():
        (tmp_path / name).write_text("something else\n")
    with pytest.raises(ConfigError, match=f"3 problems(?s:.*)expected {wikitext2.SHA256['test']}, found"):
        wikitext2.load(settings(data_dir=str(tmp_path)))


def test_tiny_shakespeare_splits_rebuild_the_text():
    texts = tinyshakespeare.load(settings(data_dir=real("tinyshakespeare")))
    assert [len(texts[s]) for s in ("train", "validation", "test")] == [1_003_854, 55_770, 55_770]
    assert texts["train"].startswith("First Citizen:\nBefore we proceed any further, hear me speak.")


def test_wikitext2_has_the_published_counts(tmp_path):
    wanted = settings(dataset="wikitext2", data_dir=real("wikitext2"), tokenizer="words")
    made = prepare.prepare(wanted, tmp_path)
    assert {name: split["tokens"] for name, split in made["splits"].items()} == {
        "train": 2_088_628,
        "validation": 217_646,
        "test": 245_569,
    }
    assert made["vocabulary_size"] == 33_278
    assert {name: split["unknown_tokens"] for name, split in made["splits"].items()} == {
        "train": 0,
        "validation": 0,
        "test": 0,
    }
    tokens = prepare.open_tokens(tmp_path)
    assert prepare.load_tokenizer(tmp_path).decode(tokens.test[:6]) == "\n= Robert <unk> =\n"


def test_wikitext2_from_the_hub_is_the_same_text(monkeypatch):
    texts = wikitext2.load(settings(data_dir=real("wikitext2")))
    # The public builder's rule: a row for each line, and '' for a line of white space.
    rows = {
        split: [line if line.strip() else "" for line in text.splitlines(keepends=True)]
        for split, text in texts.items()
    }
    monkeypatch.setattr(wikitext2, "_fetch", lambda: rows)
    assert wikitext2.load(settings()) == texts
    rows["validation"][1] = " = Homarus = \n"
    with pytest.raises(ConfigError, match="validation: wrong sha256: expected f0737ed3"):
        wikitext2.load(settings())


def test_wikitext2_without_a_network_says_what_to_do(monkeypatch):
    def no_network(*_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=no_network))
    with pytest.raises(ConfigError, match=r"(?s)no route.*train\.txt, valid\.txt, test\.txt.*-S data_dir="):
        wikitext2.load(settings())


# --- tokenizers


SAMPLE = "Größe: 1 €\n\n  def f(x):\n\treturn x  # naïve 😀\r\nlast line"


@pytest.mark.parametrize("name", ["bytes", "chars", "bpe"])
@pytest.mark.parametrize("text", [SAMPLE, "", "\n", " ", SAMPLE * 40])
def test_lossless_tokenizers_give_the_text_back(name, text, tmp_path):
    cls = getattr(tokenizers, TOKENIZERS[name].partition(":")[2])
    made = cls.build(SAMPLE * 20, settings(vocab_size=270))
    made.save(tmp_path)
    again = cls.load(tmp_path)
    ids, unknown = again.encode_counted(text)
    assert again.decode(ids) == text and unknown == 0
    assert again.vocabulary_size == made.vocabulary_size
    np.testing.assert_array_equal(ids, made.encode(text))


def test_bytes_are_the_utf8_bytes():
    assert tokenizers.Bytes().encode("é!").tolist() == [0xC3, 0xA9, 0x21]


def test_chars_are_sorted_and_the_unknown_is_explicit():
    made = tokenizers.Chars.build("bca\n", settings())
    assert made.vocabulary_size == 5
    ids, unknown = made.encode_counted("bad 😀")
    assert ids.tolist() == [2, 1, 4, 4, 4] and unknown == 3
    assert made.decode(ids) == "ba\ufffd\ufffd\ufffd"


def test_words_end_every_line_and_count_only_what_the_vocabulary_lacks(tmp_path):
    made = tokenizers.Words.build(" a <unk> b \n \n", settings())
    assert made.words == ["a", "<unk>", "b", "<eos>"]
    ids, unknown = made.encode_counted("b <unk> z\n\na")
    assert ids.tolist() == [2, 1, 1, 3, 3, 0, 3] and unknown == 1
    assert made.decode(ids) == "b <unk> <unk>\n\na\n"
    made.save(tmp_path)
    assert tokenizers.Words.load(tmp_path).words == made.words
    assert tokenizers.Words.build("only\n", settings()).words == ["only", "<eos>", "<unk>"]
    assert made.encode("").tolist() == []


def test_bpe_is_the_same_in_another_process(tmp_path):
    text = (REPOSITORY / "engine/config.py").read_text(encoding="utf-8")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    code = (
        "import sys; from types import SimpleNamespace; from engine.data.tokenizers import Bpe; "
        "t = open(sys.argv[1], encoding='utf-8').read(); "
        "sys.stdout.write(Bpe.build(t, SimpleNamespace(vocab_size=400)).to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "text")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    made = tokenizers.Bpe.build(text, settings(vocab_size=400))
    assert done.stdout == made.to_json()
    assert made.vocabulary_size == 400 and len(made.encode(text)) < len(text) / 1.5


def test_bpe_says_when_the_text_is_too_small():
    with pytest.raises(ConfigError, match="vocab_size = 4096: this training text gives"):
        tokenizers.Bpe.build("too small", settings(vocab_size=4096))


@pytest.mark.parametrize("size", [1, 7, 40])
def test_pieces_encode_as_the_whole_does(size):
    text = SAMPLE * 5 + "x \n = Title = \n it 's  two   spaces\n\n\n"
    made = tokenizers.Bpe.build(text, settings(vocab_size=300))
    pieces = list(tokenizers._chunks(text, size))
    assert len(pieces) > 5 and "".join(pieces) == text
    assert [i for piece in pieces for i in made.model.encode(piece).ids] == made.model.encode(text).ids


def test_gpt2_gives_the_published_ids(tmp_path):
    made = tokenizers.Gpt2.build("", settings(tokenizer="gpt2", tokenizer_dir=real("gpt2_tokenizer")))
    made.save(tmp_path)
    made = tokenizers.Gpt2.load(tmp_path)
    assert made.vocabulary_size == 50_257
    assert made.encode("Hello world").tolist() == [15496, 995]
    assert made.decode(made.encode(SAMPLE)) == SAMPLE


def test_gpt2_asks_for_its_files(tmp_path, monkeypatch):
    def no_network(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(ConfigError, match="-S tokenizer_dir=DIRECTORY"):
        tokenizers.Gpt2.build("", settings(tokenizer="gpt2"))
    with pytest.raises(ConfigError, match=r"2 problems in tokenizer_dir=(?s:.*)vocab\.bpe is missing"):
        tokenizers.Gpt2.build("", settings(tokenizer="gpt2", tokenizer_dir=str(tmp_path)))


# --- token directories


def test_meta_says_what_was_made(text_settings, tmp_path):
    text_settings.tokenizer = "words"
    made = prepare.prepare(text_settings, tmp_path / "tokens")
    assert json.loads((tmp_path / "tokens/meta.json").read_text()) == made
    assert made["dtype"] == "uint16" and made["vocabulary_size"] == 9  # 7 words, <eos>, <unk>
    assert made["settings"] == vars(text_settings)
    validation = made["splits"]["validation"]
    assert (validation["tokens"], validation["bytes"], validation["unknown_tokens"]) == (5, 11, 1)
    tokens = prepare.open_tokens(tmp_path / "tokens", text_settings, verify=True)
    assert tokens.meta["splits"]["validation"]["bytes_per_token"] == pytest.approx(2.2)
    assert prepare.load_tokenizer(tmp_path / "tokens").decode(tokens.validation) == "a <unk> sat\n\n"
    assert not tokens.train.flags.writeable and tokens.train.dtype == np.uint16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "tokens"]


def test_a_large_vocabulary_takes_four_bytes_a_token(text_settings, tmp_path):
    words = "\n".join(f"word{i}" for i in range(70_000)) + "\n"
    Path(text_settings.data_dir, "train.txt").write_text(words)
    text_settings.tokenizer = "words"
    made = prepare.prepare(text_settings, tmp_path / "tokens")
    assert made["dtype"] == "uint32"
    tokens = prepare.open_tokens(tmp_path / "tokens")
    assert prepare.load_tokenizer(tmp_path / "tokens").decode(tokens.train) == words


def test_training_text_is_cut_at_a_line_end(text_settings, tmp_path):
    text_settings.max_train_bytes = 25
    made = prepare.prepare(text_settings, tmp_path / "tokens")
    train = prepare.open_tokens(tmp_path / "tokens").train
    assert bytes(train.astype(np.uint8)) == b"a cat sat\non a mat\n\n"
    assert made["splits"]["train"]["bytes"] == 20 and made["settings"]["max_train_bytes"] == 25
    assert made["splits"]["test"]["bytes"] == len(TEXTS["test"])
    assert prepare.cut_at_line_end("é\né\n", 5) == "é\n" and prepare.cut_at_line_end("é\n", 3) == "é\n"
    with pytest.raises(ConfigError, match="max_train_bytes = 5: the first line"):
        prepare.cut_at_line_end("a cat sat\n", 5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("valid", TEXTS["train"], "validation text is contained in the train text"),
        ("test", TEXTS["valid"], "test text is contained in the validation text"),
        ("test", "on a mat\n\nthe end\n", "test text is contained in the train text"),
    ],
)
def test_overlapping_splits_are_refused(text_settings, tmp_path, name, text, message):
    Path(text_settings.data_dir, f"{name}.txt").write_text(text)
    with pytest.raises(ConfigError, match=message):
        prepare.prepare(text_settings, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_failure_half_way_leaves_the_old_tokens_alone(text_settings, tmp_path, monkeypatch):
    directory = tmp_path / "tokens"
    before = prepare.prepare(text_settings, directory)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tokenizers.Bytes, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        prepare.prepare(settings(**vars(text_settings) | {"max_train_bytes": 25}), directory)
    assert prepare.open_tokens(directory, text_settings, verify=True).meta == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "tokens"]


def test_a_process_killed_half_way_leaves_nothing_that_looks_finished(text_settings, tmp_path):
    code = (
        "import os; from types import SimpleNamespace; from engine.data import prepare, tokenizers; "
        "tokenizers.Bytes.save = lambda *_: os._exit(9); "
        f"prepare.prepare(SimpleNamespace(**{vars(text_settings)!r}), {str(tmp_path / 'tokens')!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 9
    with pytest.raises(ConfigError, match="no tokens in .*run the tokenize stage"):
        prepare.open_tokens(tmp_path / "tokens")
    prepare.prepare(text_settings, tmp_path / "tokens")
    assert prepare.open_tokens(tmp_path / "tokens", text_settings, verify=True)


def test_a_directory_of_something_else_is_left_alone(text_settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a token directory; it was left as it is"):
        prepare.prepare(text_settings, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_tokens_of_other_settings_are_refused_with_both_values(text_settings, tmp_path):
    prepare.prepare(text_settings, tmp_path / "tokens")
    other = settings(**vars(text_settings) | {"tokenizer": "chars", "max_train_bytes": 100})
    with pytest.raises(ConfigError, match="(?s)'bytes'.*'chars'.*max_train_bytes: .* 0, .* 100"):
        prepare.open_tokens(tmp_path / "tokens", other)


def test_damaged_token_files_are_refused(text_settings, tmp_path):
    prepare.prepare(text_settings, tmp_path / "tokens")
    path = tmp_path / "tokens/test.bin"
    content = path.read_bytes()
    path.write_bytes(b"\x01" + content[1:])
    prepare.open_tokens(tmp_path / "tokens")  # same size: only verify can tell
    with pytest.raises(ConfigError, match=r"test\.bin: wrong sha256: expected"):
        prepare.open_tokens(tmp_path / "tokens", verify=True)
    path.write_bytes(content[:-2])
    with pytest.raises(ConfigError, match=r"test\.bin: expected 14 bytes, found 12"):
        prepare.open_tokens(tmp_path / "tokens")
    (tmp_path / "tokens/meta.json").write_text("{")
    with pytest.raises(ConfigError, match=r"meta\.json is damaged"):
        prepare.open_tokens(tmp_path / "tokens")


def test_the_command_writes_where_the_run_will_look(text_settings, tmp_path):
    (tmp_path / "run.toml").write_text(
        '[run]\nstudy = "mine"\n[data]\ndataset = "text"\ndata_dir = "source"\n'
    )
    command = [sys.executable, "-m", "engine.data.prepare", "run.toml"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["splits"]["test"]["tokens"] == len(TEXTS["test"])
    assert prepare.open_tokens(tmp_path / "tokens/mine").meta["dataset"] == "text"
    (tmp_path / "source/valid.txt").unlink()
    failed = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2 and "valid.txt is missing" in failed.stderr
    assert "Traceback" not in failed.stderr
