"""The text that every peer trains on, made here or given, and its tokens, made by the engine's own `prepare`.

The synthetic text has Zipf-distributed words or characters: a word's probability is proportional to
1 / (rank + 2.7), as in natural text.
"""

import string
from pathlib import Path

import numpy as np

from benchmarks.sizes import Size
from engine.config import resolve
from engine.data.prepare import prepare

STUDY = "bench"
LINE = 1000  # words or characters a line
ALPHABET = string.ascii_letters + string.digits + " ."


def make_tokens(
    size: Size, work: Path, data_dir: str | None, tokenizer_dir: str | None = None
) -> tuple[dict, dict]:
    """Write the token files under `work`; return the engine's data settings, and the tokens' meta.

    data_dir: a directory with AG News, for a size of classes, with PERSONA-CHAT, for one of choices, or with Tiny
    Shakespeare, for one of characters; None: fetched by name, or a synthetic text. tokenizer_dir: GPT-2's.
    """
    if size.classes:
        settings = {"dataset": "ag_news", "vocab_size": size.vocabulary}
        settings |= {"data_dir": str(Path(data_dir).absolute())} if data_dir else {}
    elif size.choices:
        own = size.tokenizer != "gpt2"
        settings = {"dataset": "dialogues" if own else "personachat", "candidates": size.choices}
        settings |= {"data_dir": str(Path(data_dir).absolute())} if data_dir else {}
        settings |= {"tokenizer_dir": str(Path(tokenizer_dir).absolute())} if tokenizer_dir else {}
    elif data_dir is None:
        write_text(size, work / "text")
        settings = {"dataset": "text", "data_dir": str(work / "text")}
    else:
        settings = {"dataset": "tinyshakespeare", "data_dir": str(Path(data_dir).absolute())}
        if size.target_loss:  # nanoGPT's split
            settings |= {"validation_percent": 10, "test_percent": 0}
    settings |= {"study": STUDY, "tokenizer": size.tokenizer}
    config = resolve(settings, "benchmark", only=("data",))
    return settings, prepare(config.data, work / config.tokens_directory)


def write_text(size: Size, directory: Path) -> None:
    """train.txt, valid.txt and test.txt whose tokens have the size's vocabulary, whole in the training text."""
    draw = np.random.default_rng(1234)
    # The tokenizers add their own: characters the line end and <unk>; words <eos> and <unk>.
    symbols = size.vocabulary - 2
    if size.tokenizer == "chars":
        assert symbols <= len(ALPHABET), (symbols, len(ALPHABET))
        words, between = np.array(list(ALPHABET[:symbols])), ""
    else:
        words, between = draw.permutation(symbols).astype(str), " "
    weights = 1 / (np.arange(symbols) + 2.7)
    cumulative = np.cumsum(weights) / weights.sum()
    directory.mkdir(parents=True)
    for name, tokens in {
        "train": size.train_tokens,
        "valid": 16 * size.context,
        "test": 4 * size.context,
    }.items():
        drawn = words[np.searchsorted(cumulative, draw.random(tokens))]
        if name == "train":
            drawn = np.concatenate([draw.permutation(words), drawn])
        lines = (between.join(drawn[i : i + LINE]) for i in range(0, len(drawn), LINE))
        (directory / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
