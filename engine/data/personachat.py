"""PERSONA-CHAT: two people who were given a few sentences about themselves get to know each other (arXiv:1801.07243).

By name it is the truecased version, whose rows have about 20 candidates of a reply, the true one last. A directory
holds valid_full.jsonl and train_full.jsonl, or instead of that train_partial.jsonl: one dialogue a line, {"persona":
sentences of the second speaker, "turns": utterances, the first speaker's first}; they have no candidates but the true
ones. Licence: not stated by its authors. It must not choose candidates nor splits: that is engine/data/dialogues.py.
"""

from pathlib import Path

from engine.data.dialogue_files import parsed
from engine.data.dialogues import Dialogue, Source, replies
from engine.data.hub import fetching
from engine.data.places import OR_BY_NAME
from engine.data.textdir import read_file
from engine.errors import ConfigError

NAME = "PERSONA-CHAT"
VERSION = 2  # of what is made of the files; tokens of another one are refused
HUB = "bavard/personachat_truecased"
OF_ROWS = {"train": 131_438, "test": 7_801}  # replies of the published training and validation dialogues
FULL, PARTIAL, VALID = "train_full.jsonl", "train_partial.jsonl", "valid_full.jsonl"
SHA256 = {
    PARTIAL: "361dff65d23bd166ca22b74f02a3226bfb751a4419083f4b8c58728f70f41781",
    VALID: "67e129b0bd96b3ba35b519f38a58da6f8f92a8e4c76abf57c54bc7f173a0be3c",
}
HUB_COLUMNS = ("conv_id", "utterance_idx", "personality", "history", "candidates")


def load(settings) -> Source:
    """The dialogues of settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when files are missing, are not the known ones, cannot be fetched, or lack something.
    """
    if not settings.data_dir:
        rows = _fetch()
        return Source(
            train=from_rows(rows["train"], "train"),
            test=from_rows(rows["validation"], "validation"),
            of_rows=OF_ROWS,
        )
    there = Path(settings.data_dir).expanduser()
    train = FULL if any(there.glob(f"{FULL}*")) else PARTIAL
    found, problems = {}, []
    for name in (train, VALID):
        try:
            found[name] = parsed(read_file(settings.data_dir, name, SHA256.get(name, ""), OR_BY_NAME), name)
        except ConfigError as error:
            problems += error.problems
    if FULL in found and (count := replies(found[FULL])) != OF_ROWS["train"]:
        problems.append(f"{FULL}: {count:,} replies, and the published training set has {OF_ROWS['train']:,}")
    if problems:
        raise ConfigError(problems, where=f"data_dir={settings.data_dir}")
    return Source(train=found[train], test=found[VALID], of_rows=OF_ROWS)


def from_rows(rows, split: str) -> list[Dialogue]:
    """Rows of one reply each, as the hub has them, to dialogues with their candidates.

    rows: mappings with HUB_COLUMNS. Raises ConfigError for a missing column, and for a reply's history that is not
    how its dialogue goes.
    """
    conversations: dict[int, list] = {}
    for row in rows:
        if absent := [name for name in HUB_COLUMNS if name not in row]:
            raise ConfigError(
                f"{split}: no column {', '.join(absent)}; there are {', '.join(row)}",
                where=f"{NAME} as fetched",
            )
        conversations.setdefault(row["conv_id"], []).append(row)
    dialogues = []
    for number, said in conversations.items():
        said.sort(key=lambda row: row["utterance_idx"])
        turns = [*said[-1]["history"], said[-1]["candidates"][-1]]
        for place, row in enumerate(said):
            if [*row["history"], row["candidates"][-1]] != turns[: 2 * place + 2]:
                raise ConfigError(
                    f"{split}: dialogue {number}: the history of reply {row['utterance_idx']} is not what was said "
                    "before it",
                    where=f"{NAME} as fetched",
                )
        candidates = tuple(tuple(row["candidates"][:-1]) for row in said)
        dialogues.append(Dialogue(tuple(said[0]["personality"]), tuple(turns), candidates))
    return dialogues


def _fetch() -> dict:
    files = f"{VALID} and {FULL} or {PARTIAL} (or the same names with .xz)"
    with fetching("dataset=personachat", HUB, files):
        import datasets

        return datasets.load_dataset(HUB)
