"""Whether the directories and files that settings name are there: what can be told before any is read.

Imports nothing but the standard library, because the plan asks too. It must not read a file.
"""

from pathlib import Path

from engine.data import BY_NAME
from engine.errors import ConfigError

OR_BY_NAME = "; or leave data_dir empty to fetch it by name"  # where a file of BY_NAME is missing


def problems(settings) -> list[str]:
    """What data_dir, data_file and tokenizer_dir name and is not there; none of those that are empty."""
    instead = {"tokenizer_dir": "; or leave it empty to fetch GPT-2's vocabulary by name"}
    if settings.dataset in BY_NAME:
        instead["data_dir"] = f"; or leave it empty to fetch {settings.dataset} by name"
    found = []
    for name in ("data_dir", "tokenizer_dir"):
        value = getattr(settings, name)
        path = Path(value).expanduser()
        if value and not path.is_dir():
            what = "is a file, not a directory" if path.exists() else "no such directory"
            found.append(f"{name} = {value!r}: {what}{instead.get(name, '')}")
    if settings.data_file and not _is_there(Path(settings.data_file).expanduser()):
        found.append(f"data_file = {settings.data_file!r}: no such file (nor one with .xz behind its name)")
    return found


def require(settings) -> None:
    """Raise ConfigError with all `problems`."""
    if found := problems(settings):
        raise ConfigError(found, where=f"dataset={settings.dataset}")


def _is_there(file: Path) -> bool:
    """As engine/data/textfile.py reads it: plain, or packed."""
    plain = file.with_name(file.name.removesuffix(".xz"))
    return plain.is_file() or plain.with_name(f"{plain.name}.xz").is_file()
