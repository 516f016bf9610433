"""A user's own dialogues: a directory with train.jsonl and test.jsonl, and valid.jsonl if validation is not held out.

One dialogue a line, {"persona": sentences about the second speaker, "turns": utterances in turn, the first speaker's
first}; also {"candidates": for each reply of the second speaker a list of wrong ones}, of all dialogues of a file or
of none. Also the one place that reads such files. It must not split or change what is said.
"""

import json
from pathlib import Path

from engine.data.dialogues import Dialogue, Source
from engine.data.textdir import read_file
from engine.errors import ConfigError

NAME = "dialogues of files"
VERSION = 2
FILES = {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"}
SHOWN = 5  # problems of a file that are named


def load(settings) -> Source:
    """The dialogues of settings.data_dir. Raises ConfigError with what is missing or wrong."""
    if not settings.data_dir:
        raise ConfigError(
            "dataset=dialogues needs a directory with train.jsonl and test.jsonl: -S data_dir=DIRECTORY"
        )
    there = Path(settings.data_dir).expanduser()
    found, problems = {}, []
    for split, name in FILES.items():
        if split == "validation" and not any(there.glob(f"{name}*")):
            continue
        try:
            found[split] = parsed(read_file(settings.data_dir, name), name)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems, where=f"data_dir={settings.data_dir}")
    return Source(**found)


def parsed(content: str, name: str) -> list[Dialogue]:
    """The dialogues of a JSONL file. Raises ConfigError naming the line of whatever is not one."""
    dialogues, problems = [], []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            problem = _problem(row)
        except ValueError as error:
            problem = f"not valid JSON: {error}"
        if problem:
            problems.append(f"{name}, line {number}: {problem}")
        else:
            wrong = tuple(tuple(texts) for texts in row.get("candidates", ()))
            dialogues.append(Dialogue(tuple(row["persona"]), tuple(row["turns"]), wrong))
    if not dialogues and not problems:
        problems.append(f"{name} is empty")
    if len({bool(one.candidates) for one in dialogues}) > 1:
        problems.append(f"{name}: some dialogues have candidates and some have none")
    if problems:
        more = [f"{name}: {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ConfigError(problems[:SHOWN] + more)
    return dialogues


def _problem(row) -> str:
    """What is wrong with one line, or nothing."""
    if not isinstance(row, dict):
        return "must be an object with persona and turns"
    for key, least in (("persona", 1), ("turns", 2)):
        if key not in row:
            return f"lacks {key!r}; it has {', '.join(sorted(row)) or 'nothing'}"
        if not _texts(row[key]):
            return f"{key}: must be a list of texts that are not empty"
        if len(row[key]) < least:
            return f"{key}: has {len(row[key])}, and {least} are needed"
    wrong, replies = row.get("candidates", []), len(row["turns"]) // 2
    if wrong and not (isinstance(wrong, list) and len(wrong) == replies and all(map(_texts, wrong))):
        return f"candidates: must be a list of texts for each of the {replies} replies"
    return ""


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
