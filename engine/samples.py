"""A text that a run leaves at each evaluation, so that a person can read what it has learned.

It is written by a plain copy of the model on one process's CPU, whatever way the run's own is spread or compiled: so
it takes no memory of a GPU that a plan would have to know of. It draws from random numbers of its own: a run with
samples trains as one without.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import parallel, rundir
from engine.config import Config
from engine.data.prepare import Tokens, load_tokenizer
from engine.errors import ConfigError
from engine.evaluate import plain_model
from engine.generate import Sampling, encode_prompt, generate
from engine.step import autocast

PROMPT_TOKENS = 16  # of the validation text, where no prompt is set
SAMPLING = Sampling(temperature=0.8)


class Sampler:
    """Writes samples of one run. Raises ConfigError for a prompt that the run's tokenizer cannot read."""

    def __init__(self, config: Config, tokens: Tokens):
        self.config, self.vocabulary_size = config, tokens.meta["vocabulary_size"]
        self.tokenizer = load_tokenizer(config.tokens_directory)
        if config.evaluation.sample_prompt:
            try:
                self.prompt = encode_prompt(self.tokenizer, config.evaluation.sample_prompt)
            except ConfigError as error:
                raise ConfigError([p.replace("--prompt", "sample_prompt") for p in error.problems]) from None
        else:
            self.prompt = torch.from_numpy(tokens.validation[:PROMPT_TOKENS].astype(np.int64))[None]

    def leave(self, step: int, model: torch.nn.Module, directory: Path, ranks: parallel.Ranks) -> None:
        """Add one of `model` to the run's samples; every rank must call this."""
        weights = parallel.full_weights(model)
        if ranks.is_first:
            rundir.append_sample(directory, step, self(weights))

    def __call__(self, weights: dict[str, torch.Tensor]) -> dict[str, str]:
        """`prompt` and the `text` that goes on from it; weights: whole, by their plain names."""
        with torch.random.fork_rng(devices=[]):  # building a model draws weights, which are replaced
            model = plain_model(self.config, self.vocabulary_size, weights).eval()
        # The run's choice of a kernel holds for the whole process; a CPU may not have it.
        kernel = sdpa_kernel(SDPBackend.MATH)
        with kernel, autocast(self.config.training.precision, torch.device("cpu")):
            ids = generate(model, self.prompt, count=self.config.evaluation.sample_tokens, sampling=SAMPLING)
        new = ids[0, self.prompt.size(1) :]
        return {
            "prompt": self.tokenizer.decode(self.prompt[0].numpy()),
            "text": self.tokenizer.decode(new.numpy()),
        }
