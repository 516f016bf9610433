"""The one reader of parquet files. pyarrow is imported when one is read."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ConfigError


def read_parquet(path: Path, sha256: str = "", instead: str = "") -> tuple[list[str], dict]:
    """The names of the columns, and the columns with a text, integer or other simple type as lists by name.

    The file must have the `sha256` if given. Raises ConfigError for a missing (saying what would do `instead`),
    damaged or changed file.
    """
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    if not path.is_file():
        raise ConfigError(f"{path} is missing{instead}")
    if sha256 and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ConfigError(f"{path}: wrong sha256: expected {sha256}, found {found}")
    try:
        table = parquet.ParquetFile(path).read()
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from None
    simple = [f.name for f in table.schema if not types.is_nested(f.type)]
    return table.schema.names, {name: table[name].to_pylist() for name in simple}


def columns(path: Path) -> list[str]:
    """The names of the columns. Raises ConfigError for a damaged file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_schema(path).names
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from None


def column(path: Path, name: str) -> Iterator[str]:
    """The texts of one column, read in parts. Raises ConfigError for a damaged file or one without such texts."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if name not in schema.names:
                raise ConfigError(f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}")
            kind = schema.field(name).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise ConfigError(f"{path}: its column {name!r} is of {kind}, not of text")
            for part in file.iter_batches(columns=[name]):
                for text in part.column(0).to_pylist():
                    yield text or ""
    except (ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {error}") from None
