"""Tokenizers: text to ids and back. The vocabulary comes from the training text and travels with the tokens.

Each class has `build(train_text, settings)`, `vocabulary_size`, `encode`, `encode_counted`, `decode`,
`save(directory)` and `load(directory)`. Characters or words that the vocabulary lacks become an explicit
<unk>, and are counted. It must not import the `tokenizers` library until a byte-pair encoding is asked for.
"""

import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from engine.data import gpt2_files
from engine.errors import ConfigError

FILENAME = "tokenizer.json"
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
END_OF_TEXT = "<|endoftext|>"  # stands between documents


class Tokenizer(ABC):
    """What every tokenizer can do."""

    vocabulary_size: int

    @classmethod
    @abstractmethod
    def build(cls, train_text: str, settings) -> "Tokenizer":
        """Make the tokenizer for this training text. Raises ConfigError where the settings cannot be met."""

    @abstractmethod
    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        """The ids of `text`, shape (tokens,), and how many of them are <unk> for want of a vocabulary entry.

        An <unk> that stands in the text itself, as in WikiText-2, is a word like any other and is not
        counted.
        """

    @abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """The text of `ids`."""

    @abstractmethod
    def to_json(self) -> str:
        """Everything needed to make the same tokenizer again."""

    @classmethod
    @abstractmethod
    def from_json(cls, content: str) -> "Tokenizer":
        """The inverse of `to_json`."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, shape (tokens,), an unsigned integer type."""
        return self.encode_counted(text)[0]

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json into `directory`."""
        Path(directory, FILENAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read back what `save` wrote."""
        return cls.from_json(Path(directory, FILENAME).read_text(encoding="utf-8"))


class Bytes(Tokenizer):
    """UTF-8 bytes: 256 ids, nothing unknown, decode(encode(x)) == x."""

    vocabulary_size = 256

    @classmethod
    def build(cls, train_text: str, settings) -> "Bytes":
        return cls()

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8), 0

    def decode(self, ids: np.ndarray) -> str:
        """The text; a byte sequence cut inside a character gives U+FFFD there."""
        return bytes(np.asarray(ids, dtype=np.uint8)).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"tokenizer": "bytes"})

    @classmethod
    def from_json(cls, content: str) -> "Bytes":
        return cls()


class Chars(Tokenizer):
    """The sorted characters of the training text, then <unk> as the last id."""

    def __init__(self, characters: str):
        self.characters = characters
        self.vocabulary_size = len(characters) + 1
        self.unknown_id = len(characters)
        points = _code_points(characters)
        self._ids = np.full(int(points.max(initial=0)) + 1, self.unknown_id, dtype=np.uint32)
        self._ids[points] = np.arange(len(points), dtype=np.uint32)

    @classmethod
    def build(cls, train_text: str, settings) -> "Chars":
        return cls("".join(sorted(set(train_text))))

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        points = _code_points(text)
        in_table = points < len(self._ids)
        ids = np.where(in_table, self._ids[np.where(in_table, points, 0)], np.uint32(self.unknown_id))
        return ids, int((ids == self.unknown_id).sum())

    def decode(self, ids: np.ndarray) -> str:
        """The text; <unk> becomes U+FFFD."""
        table = self.characters + "\ufffd"
        return "".join(table[i] for i in np.asarray(ids).tolist())

    def to_json(self) -> str:
        return json.dumps({"tokenizer": "chars", "characters": self.characters})

    @classmethod
    def from_json(cls, content: str) -> "Chars":
        return cls(json.loads(content)["characters"])


class Words(Tokenizer):
    """Words between white space, and <eos> at each line end: the word-level protocol of WikiText-2.

    An empty line is one <eos>; <eos> written in the text is a line end too. Ids follow first appearance in
    the training text. Space itself is not encoded, so decode(encode(x)) == x only where words are separated
    by single spaces.
    """

    def __init__(self, words: list[str]):
        self.words = words
        self.vocabulary_size = len(words)
        self._ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def build(cls, train_text: str, settings) -> "Words":
        vocabulary = {}
        for line in _lines(train_text):
            vocabulary.update(dict.fromkeys(line.split()))
            vocabulary[END_OF_LINE] = None
        return cls(list(vocabulary | {END_OF_LINE: None, UNKNOWN: None}))

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        found, look_up, end = array("q"), self._ids.get, self._ids[END_OF_LINE]
        for line in _lines(text):
            found.extend([look_up(word, -1) for word in line.split()])
            found.append(end)
        ids = np.frombuffer(found, dtype=np.int64) if found else np.empty(0, dtype=np.int64)
        unknown = ids < 0
        return np.where(unknown, self._ids[UNKNOWN], ids).astype(np.uint32), int(unknown.sum())

    def decode(self, ids: np.ndarray) -> str:
        """The words with single spaces between them, and a line end for each <eos>."""
        text, line = [], []
        for i in np.asarray(ids).tolist():
            if self.words[i] == END_OF_LINE:
                text.append(" ".join(line) + "\n")
                line = []
            else:
                line.append(self.words[i])
        return "".join(text) + " ".join(line)

    def to_json(self) -> str:
        return json.dumps({"tokenizer": "words", "words": self.words}, ensure_ascii=False)

    @classmethod
    def from_json(cls, content: str) -> "Words":
        return cls(json.loads(content)["words"])


class Bpe(Tokenizer):
    """Byte-level byte-pair encoding trained on the training text: nothing unknown, decode(encode(x)) == x.

    tokenizer.json is the `tokenizers` library's own format, so other programs can read it too.
    """

    def __init__(self, model):
        self.model = model  # a tokenizers.Tokenizer
        self.vocabulary_size = model.get_vocab_size()

    @classmethod
    def build(cls, train_text: str, settings) -> "Bpe":
        return cls(_trained(_chunks(train_text), settings.vocab_size, settings.vocab_size))

    @classmethod
    def build_for_documents(cls, documents: Iterable[str], settings) -> "Bpe":
        """The same with an end-of-text token, the last id, which no text encodes to; as in GPT-2's vocabulary."""
        from tokenizers import models

        model = _trained(documents, settings.vocab_size - 1, settings.vocab_size)
        bpe = json.loads(model.to_str())["model"]
        vocabulary = bpe["vocab"] | {END_OF_TEXT: len(bpe["vocab"])}
        return cls(_byte_level(models.BPE(vocabulary, [tuple(pair) for pair in bpe["merges"]])))

    @property
    def separator_id(self) -> int:
        """The id of the token between documents."""
        return self.model.token_to_id(END_OF_TEXT)

    def encode_documents(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The ids of each text, uint32 of shape (tokens,), encoded on all cores."""
        return (np.array(one.ids, dtype=np.uint32) for one in self.model.encode_batch_fast(texts))

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        # One string of a whole data set would hold every token's offsets at once.
        parts = [np.array(self.model.encode(chunk).ids, dtype=np.uint32) for chunk in _chunks(text)]
        return (np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)), 0

    def decode(self, ids: np.ndarray) -> str:
        return self.model.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        return self.model.to_str()

    @classmethod
    def from_json(cls, content: str) -> "Bpe":
        from tokenizers import Tokenizer as LibraryTokenizer

        return cls(LibraryTokenizer.from_str(content))


class Gpt2(Bpe):
    """GPT-2's byte-pair encoding, 50,257 ids, from OpenAI's encoder.json and vocab.bpe (modified MIT).

    Text is taken as it is: '<|endoftext|>' written in it is ordinary characters, not the special token.
    """

    @classmethod
    def build(cls, train_text: str, settings) -> "Gpt2":
        from tokenizers import models

        files = gpt2_files.read(settings.tokenizer_dir)
        lines = files["vocab.bpe"].split("\n")[1:]  # the first line is a version
        merges = [tuple(line.split(" ")) for line in lines if line]
        return cls(_byte_level(models.BPE(json.loads(files["encoder.json"]), merges)))

    @classmethod
    def build_for_documents(cls, documents: Iterable[str], settings) -> "Gpt2":
        return cls.build("", settings)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _lines(text: str) -> list[str]:
    """The lines of `text`; a final line counts whether or not it ends with a newline."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _trained(texts: Iterable[str], size: int, asked: int):
    """The library's byte-level tokenizer with a vocabulary of `size`, of the `asked` in the settings."""
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    model = _byte_level(models.BPE())
    model.train_from_iterator(texts, trainer)
    if (found := model.get_vocab_size() + asked - size) != asked:
        raise ConfigError(
            f"vocab_size = {asked}: this training text gives a byte-pair vocabulary of {found}; set vocab_size to "
            "that, or use more text"
        )
    return model


def _byte_level(bpe):
    """The library's tokenizer around `bpe`, with GPT-2's splitting into pieces and its byte alphabet."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, pre_tokenizers

    model = LibraryTokenizer(bpe)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = decoders.ByteLevel()
    return model


def _chunks(text: str, size: int = 1 << 18) -> Iterator[str]:
    """`text` in pieces of about `size` characters that encode as the whole does.

    A cut is made only between a visible ASCII character and a space or newline: no piece of GPT-2's splitting
    pattern goes on from a visible character to white space, and none looks back.
    """
    boundary = re.compile(r"(?<=[!-~])(?=[ \n])")
    start = 0
    while start < len(text):
        found = boundary.search(text, start + size)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end
