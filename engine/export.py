"""Export: a finished run as a Hugging Face GPT-2.

`python -m engine.export RUN_DIRECTORY OUTPUT_DIRECTORY` writes config.json and model.safetensors, which
transformers' GPT2LMHeadModel.from_pretrained loads. A model that GPT-2 cannot express is refused.
"""

import argparse
from pathlib import Path

from engine.errors import ConfigError, command
from engine.models import gpt2
from engine.pretrained import WEIGHTS, finished, read_weights, true_rows
from engine.rundir import write_json

END_OF_TEXT = 50256  # GPT-2's <|endoftext|>


def export(run: Path, output: Path) -> None:
    """Write the final model of `run` into the new directory `output`.

    Raises ConfigError for what GPT-2 cannot express, an incomplete run, and a directory that holds something.
    """
    from safetensors.torch import save_file

    config = finished(run)
    if problems := gpt2.problems(config.model):
        raise ConfigError(problems, str(run))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("exists and is not an empty directory; it was left as it is", str(output))
    state = read_weights(run)
    embedding = state["token_embedding.weight"]
    state["token_embedding.weight"] = embedding = embedding[
        : true_rows(embedding, config.model.pad_vocabulary_to)
    ]
    output.mkdir(parents=True, exist_ok=True)
    save_file(gpt2.to_gpt2(state, config.model.heads), output / WEIGHTS, metadata={"format": "pt"})
    end = END_OF_TEXT if config.data.tokenizer == "gpt2" else None
    write_json(output / "config.json", gpt2.configuration(config.model, len(embedding), end))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIRECTORY")
    arguments = parser.parse_args()
    export(arguments.run, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
