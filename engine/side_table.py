"""What a run measures beside its steps, now and then: a CSV file of its own, which is there once it has a row."""

from abc import ABC, abstractmethod
from pathlib import Path

from engine.rundir import Table


class SideTable(ABC):
    """Base of what has such a file. The first rank writes it; rows wait until then, and no step waits for them."""

    FILE: str
    columns: list[str]

    @abstractmethod
    def take_rows(self) -> list[dict]:
        """The rows noted since the last call, by column; may wait for the device."""

    def write(self, directory: Path) -> None:
        """Append what was noted to the run's file."""
        if rows := self.take_rows():
            Table(directory / self.FILE, self.columns).append(rows)

    def cut(self, directory: Path, last: int) -> None:
        """Remove the rows after step `last`."""
        if (directory / self.FILE).exists():
            Table(directory / self.FILE, self.columns).cut(last)
