"""What is read: the data set, how it is split, and how text becomes tokens."""

from dataclasses import dataclass

from engine.data import BY_POSITION, DIALOGUES, DOCUMENTS, LABELLED, TEXTS, TOKENIZERS
from engine.declare import setting


@dataclass(frozen=True)
class Data:
    dataset: str = setting(
        "stdlib",
        "source of the text, of the labelled rows or of the dialogues",
        choices=TEXTS | LABELLED | DIALOGUES,
    )
    data_dir: str = setting(
        "",
        "directory that holds the data set's files; empty: fetch it by name",
        only_if={
            "dataset": (
                "wikitext2",
                "tinyshakespeare",
                "text",
                *DOCUMENTS,
                "ag_news",
                "imdb",
                "table",
                *DIALOGUES,
            )
        },
    )
    data_file: str = setting(
        "", "the file whose text is cut by position into splits", only_if={"dataset": ("text_file",)}
    )
    validation_percent: int = setting(
        5,
        "held out for validation: of the characters, cut off behind the training text; or of the documents, chosen "
        "by a hash of their text; of dialogues, of the personas, so chosen, where there is no file of them",
        unit="%",
        at_least=1,
        at_most=50,
        only_if={"dataset": (*BY_POSITION, *DOCUMENTS, *DIALOGUES)},
    )
    test_percent: int = setting(
        5,
        "held out for the test: of the characters, cut off behind the validation text; or of the documents, chosen "
        "by a hash of their text; 0: no test",
        unit="%",
        at_least=0,
        at_most=49,
        only_if={"dataset": (*BY_POSITION, *DOCUMENTS)},
    )
    tokenizer: str = setting("bytes", "how text becomes tokens", choices=TOKENIZERS)
    vocab_size: int = setting(
        4096,
        "vocabulary of a trained or a hashing tokenizer",
        unit="tokens",
        at_least=257,
        only_if={"tokenizer": ("bpe", "hashed_words", "frequent_words")},
    )
    tokenizer_dir: str = setting(
        "",
        "directory with encoder.json and vocab.bpe; empty: fetch them by name",
        only_if={"tokenizer": ("gpt2",)},
    )
    max_train_bytes: int = setting(
        0,
        "training text is cut after this many bytes, of documents after a whole one; 0: all of it",
        unit="bytes",
        at_least=0,
        only_if={"dataset": tuple(TEXTS)},
    )
    text_column: str = setting(
        "text",
        "column with the text; several, joined by a space: title,description",
        only_if={"dataset": ("table",)},
    )
    label_column: str = setting("label", "column with the label", only_if={"dataset": ("table",)})
    validation_rows: int = setting(
        2000,
        "rows held out of the training rows for validation, chosen by a hash of their text, where there is no file "
        "of them",
        unit="rows",
        at_least=1,
        only_if={"dataset": tuple(LABELLED)},
    )
    test_rows: int = setting(
        2000,
        "rows held out of the training rows for the test, where there is no file of them; the same for any "
        "validation_rows",
        unit="rows",
        at_least=1,
        only_if={"dataset": ("table", "synthetic")},
    )
    max_train_rows: int = setting(
        0,
        "training rows used, chosen by a hash of their text; 0: all",
        unit="rows",
        at_least=0,
        only_if={"dataset": (*LABELLED, *DIALOGUES)},
    )
    candidates: int = setting(
        8,
        "replies to choose from, one of them the true one",
        at_least=2,
        only_if={"dataset": tuple(DIALOGUES)},
    )
    length_percentile: float = setting(
        95.0,
        "share of the training rows, the shortest before the reply, that are used; in validation and test the oldest "
        "turns of longer ones are left out",
        unit="%",
        above=0,
        at_most=100,
        only_if={"dataset": tuple(DIALOGUES)},
    )
    max_reply_tokens: int = setting(
        32,
        "room for a reply with its speaker and its end; training rows with a longer one are left out",
        unit="tokens",
        at_least=3,
        only_if={"dataset": tuple(DIALOGUES)},
    )
