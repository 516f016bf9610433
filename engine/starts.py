"""What `init_from` names: a finished run's directory, or that of a GPT-2 in Hugging Face format. Or neither, and why.

Imports no torch, so that the plan can tell before anything is trained. Whether the weights fit is found by
engine/pretrained.py, which reads them. It must not write anything.
"""

import json
from pathlib import Path

from engine.config import SETTINGS
from engine.errors import ConfigError
from engine.rundir import read_outcome

RUN, GPT2 = "a finished run", "a GPT-2 in Hugging Face format"
WEIGHTS = "model.safetensors"
KINDS = "neither a run's directory (config.toml) nor a Hugging Face model's (config.json)"


def kind(init_from: str) -> str:
    """RUN or GPT2, with a file of weights. Raises ConfigError, with the study to train first if its name says one."""
    directory, where = Path(init_from), f"init_from = {init_from!r}"
    if (directory / "config.json").is_file() and not (directory / "config.toml").is_file():
        gpt2_config(directory)
        if not (directory / WEIGHTS).is_file():
            raise ConfigError(f"no {WEIGHTS}", where)
        return GPT2
    if not directory.is_dir():
        raise ConfigError(f"no such directory{_first(directory)}", where)
    if not (directory / "config.toml").is_file():
        raise ConfigError(f"{KINDS}{_first(directory)}", where)
    if not (directory / "metrics.json").is_file():
        raise ConfigError(f"no metrics.json: the run is not complete{_first(directory)}", where)
    require_complete(directory)
    if not (directory / WEIGHTS).is_file():
        raise ConfigError(f"no {WEIGHTS}{_first(directory)}", where)
    return RUN


def require_complete(directory: Path) -> None:
    """Raise ConfigError unless the run in `directory` came to its last step."""
    metrics = read_outcome(directory)
    if metrics["status"] != "complete":
        raise ConfigError(
            f"the run has {metrics['status']} at step {metrics['step']}, so there is no final model",
            str(directory),
        )


def gpt2_config(directory: Path) -> dict:
    """The config.json of a GPT-2. Raises ConfigError for another model's and for what is not JSON."""
    where = f"init_from = {str(directory)!r}"
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"config.json is not valid JSON: {error}", where) from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "gpt2":
        raise ConfigError(f"model_type = {found!r}: only 'gpt2' is known here", where)
    return config


def _first(directory: Path) -> str:
    """The study to train before, if the directory's name is results/STUDY/RUN-SEED."""
    parts = directory.parts
    if len(parts) != 3 or parts[0] != "results" or parts[1] == SETTINGS["study"].default:  # noqa: PLR2004
        return ""
    return f"; train it first: dvc exp run -S study={parts[1]}"
