"""Files of the hub, fetched by name: where that fails, one message says what else would do."""

import contextlib
from collections.abc import Iterator

from engine.errors import ConfigError


@contextlib.contextmanager
def fetching(
    what: str, name: str, files: str, *, setting: str = "data_dir", otherwise: str = ""
) -> Iterator[None]:
    """Around what fetches `name` for `what`, importing the hub's client too, whose errors are of several libraries.

    files: what to put into the directory of `setting` instead. otherwise: what else would do.

    Raises ConfigError for any error inside.
    """
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{what} could not be fetched by name ({name}): {type(error).__name__}: {error}. Either run it where "
            f"there is a network, or put {files} into a directory and set -S {setting}=DIRECTORY{otherwise}"
        ) from error
