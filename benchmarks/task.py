"""What a peer's process is told, and how it says that it cannot run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.sizes import Size


class Missing(Exception):
    """The peer cannot run here, and why."""


@dataclass(frozen=True)
class Task:
    """The task of one peer."""

    size: Size
    settings: dict  # the engine's flat settings; only the engine's own peers read them
    tokens: Path  # directory with train.bin
    token_dtype: str
    vocabulary: int
    nanogpt: Path | None  # a checkout
    seed: int = 1  # of a race, another one each turn

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, content: str) -> "Task":
        values = json.loads(content)
        values["size"], values["tokens"] = Size(**values["size"]), Path(values["tokens"])
        values["nanogpt"] = Path(values["nanogpt"]) if values["nanogpt"] else None
        return cls(**values)
