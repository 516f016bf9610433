"""Generation: text from a finished run's model.

    python -m engine.generate RUN_DIRECTORY --prompt TEXT

With a cache of keys and values or without one, the text is the same. A model sees at most `context` tokens: once the
text is longer, every token is predicted from the last `context` ones, which then all move by one position, so the
cache is of no more use and each step computes its window anew.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import best, parallel, runtime, tasks, vocabulary
from engine.config import Config, Parallel
from engine.errors import ConfigError, command
from engine.evaluate import plain_model
from engine.models.attention import Cache
from engine.pretrained import VOCABULARY_ROWS, finished, true_rows
from engine.step import autocast
from engine.tasks import next_token

CHATBOT = "double_heads"  # the model that engine.chat lets answer
SMALLEST, LARGEST = 1e-6, 1e6  # of what logits are divided by: fp32 has room for both


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits, in this order."""

    repetition_penalty: float = (
        1.0  # logits of tokens in the text: divided if positive, multiplied if negative
    )
    temperature: float = 1.0  # logits are divided by it; 0: the most probable token
    top_k: int = 0  # only the k most probable; 0: all
    top_p: float = 1.0  # only the fewest most probable whose probabilities add up to p

    def problems(self, vocabulary_size: int) -> list[str]:
        """Values that are out of range or would do nothing."""
        greedy = self.temperature == 0
        between = f"from {SMALLEST:g} to {LARGEST:g}"
        checks = [
            (
                not (greedy or SMALLEST <= self.temperature <= LARGEST),
                f"temperature = {self.temperature}: must be 0, or {between}",
            ),
            (
                not 0 <= self.top_k <= vocabulary_size,
                f"top_k = {self.top_k}: must be from 0 to the vocabulary's {vocabulary_size}",
            ),
            (not 0 < self.top_p <= 1, f"top_p = {self.top_p}: must be > 0 and ≤ 1"),
            (
                not SMALLEST <= self.repetition_penalty <= LARGEST,
                f"repetition_penalty = {self.repetition_penalty}: must be {between}",
            ),
            (greedy and self.top_k, f"top_k = {self.top_k}: would do nothing with temperature = 0"),
            (greedy and self.top_p != 1, f"top_p = {self.top_p}: would do nothing with temperature = 0"),
        ]
        return [message for broken, message in checks if broken]

    def distribution(self, logits: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, V), fp32, from logits (B, V) and the text so far (B, t)."""
        logits = logits.float()
        if self.repetition_penalty != 1:
            seen = logits.gather(1, text)
            penalised = torch.where(seen > 0, seen / self.repetition_penalty, seen * self.repetition_penalty)
            logits = logits.scatter(1, text, penalised)
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
        ordered, tokens = (logits / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered[:, self.top_k :] = float("-inf")
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of all that are more probable
        left_out = before >= self.top_p
        left_out[:, 0] = False  # however small top_p is
        kept = probabilities.masked_fill(left_out, 0.0)
        return torch.zeros_like(logits).scatter(1, tokens, kept / kept.sum(-1, keepdim=True))


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    text: torch.Tensor,
    *,
    count: int,
    sampling: Sampling,
    seed: int = 1,
    use_cache: bool = True,
) -> torch.Tensor:
    """Token ids (B, t) → (B, t + count). The same seed gives the same text, on any device up to rounding."""
    device = model.head_weight.device
    generator = torch.Generator().manual_seed(seed)
    caches = [Cache() for _ in model.layers]
    for _ in range(count):
        if use_cache and text.size(1) <= model.context:
            hidden, _ = model.features(text[:, caches[0].length :].to(device), caches)
        else:
            hidden, _ = model.features(text[:, -model.context :].to(device))
        probabilities = sampling.distribution(model.logits(hidden[:, -1]).cpu(), text)
        text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return text


def open_run(directory: Path, which: str = "final") -> tuple[Config, object, torch.nn.Module]:
    """(configuration, tokenizer, model on the CPU) of a finished run.

    It needs nothing but the directory. Raises ConfigError if the run is not complete, or its vocabulary is missing,
    changed or not the model's.
    """
    config = finished(directory)
    if config.model.model == CHATBOT:
        problem = "it answers turns of a dialogue: `python -m engine.chat` does that with this run"
        raise ConfigError(f"model = {CHATBOT!r}: {problem}", str(directory))
    if tasks.of(config) is not next_token:
        raise ConfigError(f"model = {config.model.model!r}: it writes no text; a 'gpt' does", str(directory))
    return config, *opened(directory, config, which=which)


def opened(
    directory: Path, config: Config, specials: int = 0, which: str = "final"
) -> tuple[object, torch.nn.Module]:
    """(tokenizer, model on the CPU) of a finished run whose model writes; specials: tokens beside the tokenizer's.

    which: of its weights, of engine.best.KINDS.

    Raises ConfigError as `open_run` does.
    """
    tokenizer = vocabulary.of_run(directory, config)
    weights = best.read(directory, which)
    size, padded_to = tokenizer.vocabulary_size + specials, config.model.pad_vocabulary_to
    found = {name: true_rows(weights[name], padded_to) for name in VOCABULARY_ROWS if name in weights}
    problems = [
        f"{name}: {rows} rows, but the run's tokenizer has {size} tokens"
        for name, rows in found.items()
        if rows != size
    ]
    if problems:
        raise ConfigError(problems, str(directory))
    return tokenizer, plain_model(config, size, weights).eval()


def encode_prompt(tokenizer, prompt: str) -> torch.Tensor:
    """The ids of the prompt, (1, t). Raises ConfigError if there are none, or the vocabulary lacks some of it."""
    ids, unknown = tokenizer.encode_counted(prompt)
    if len(ids) and tokenizer.decode(ids).endswith("\n") and not prompt.endswith("\n"):
        ids = ids[:-1]  # the line end that a tokenizer of words adds
    if not len(ids):
        raise ConfigError("--prompt: there is no token in it; the model needs one to begin with")
    if unknown:
        raise ConfigError(f"--prompt: {unknown} of its {len(ids)} tokens are not in the run's vocabulary")
    return torch.as_tensor(ids.astype("int64"))[None]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: most probable token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="only the k most probable; 0: all (%(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="only the most probable that hold p (%(default)s)"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="> 1: fewer (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random choices (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="texts to generate (%(default)s)")
    best.add_argument(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--no-cache", action="store_true", help="compute every token anew; the text is the same"
    )
    return parser.parse_args()


@command
def main() -> None:
    a = _arguments()
    config, tokenizer, model = open_run(a.directory, a.weights)
    sampling = Sampling(a.repetition_penalty, a.temperature, a.top_k, a.top_p)
    problems = sampling.problems(tokenizer.vocabulary_size)
    problems += [
        f"{name} = {getattr(a, name)}: must be ≥ 1" for name in ("tokens", "samples") if getattr(a, name) < 1
    ]
    if a.samples > 1 and a.temperature == 0:
        problems.append(f"samples = {a.samples}: with temperature = 0 all are the same")
    if problems:
        raise ConfigError(problems)
    prompt = encode_prompt(tokenizer, a.prompt).expand(a.samples, -1)
    ranks = parallel.start(Parallel(), a.device)
    runtime.after_torch(config.runtime, ranks.device, trains=False)
    with autocast(config.training.precision, ranks.device):
        texts = generate(
            model.to(ranks.device),
            prompt,
            count=a.tokens,
            sampling=sampling,
            seed=a.seed,
            use_cache=not a.no_cache,
        )
    for i, ids in enumerate(texts):
        if a.samples > 1:
            print(f"--- sample {i + 1} of {a.samples}", file=sys.stderr)
        print(tokenizer.decode(ids.numpy()))


if __name__ == "__main__":
    main()
