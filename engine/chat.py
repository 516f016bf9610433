"""Chat: a finished double-heads run answers a person, as the one whom a file describes.

    python -m engine.chat RUN_DIRECTORY --persona FILE [--script FILE]

The persona has one sentence a line. What the model reads is what it was trained on
(engine/data/dialogue_tokens.py): the persona, the turns so far and the bot's speaker token; its reply ends before any
special token. With --script, or where standard input is no terminal, the user's turns are lines read beforehand, and
what is printed is a transcript: the same text for the same seed. A reply computes what was said before once, then a
token at a time, with a cache of keys and values.

A conversation may grow beyond what the model sees. Then its oldest turns, whole ones, are left out, and a line in
brackets says how many. The persona always stays.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from engine import best, parallel
from engine.config import Config, Parallel
from engine.data.dialogue_tokens import SPECIALS, Encoder
from engine.errors import ConfigError, command
from engine.generate import CHATBOT, Sampling, opened
from engine.models.attention import Cache
from engine.models.gpt import Layout
from engine.pretrained import finished
from engine.step import autocast

REPLY_TOKENS = 40  # at most
TEMPERATURE, TOP_P = 0.9, 0.7
USER, BOT = "user", "bot"


class Conversation:
    """What was said, as a model reads it that sees `context` tokens, of which a reply needs up to `reply_tokens`."""

    def __init__(
        self, encoder: Encoder, persona: tuple[str, ...], context: int, reply_tokens: int = REPLY_TOKENS
    ):
        self.encoder, self.persona, self.context, self.reply_tokens = encoder, persona, context, reply_tokens
        self.turns: tuple[str, ...] = ()  # the user's first
        self.left_out = 0  # of the turns, from the first on

    @property
    def room(self) -> int:
        """Tokens that there may be before the bot's speaker token: the last one of a reply is never read."""
        return self.context - 1 - (self.reply_tokens - 1)

    def over(self, line: str) -> int:
        """By how many tokens the persona and this turn of the user alone are more than there is room for."""
        return len(self.encoder.context(self.persona, (line,))[0]) - self.room

    def prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and types (1, t): the persona, the latest turns that there is room for, the bot's speaker token.

        The last turn must be the user's, and not `over`.
        """
        while True:
            tokens, types = self.encoder.context(self.persona, self.turns[self.left_out :])
            if len(tokens) <= self.room:
                break
            self.left_out += 1
            assert self.left_out < len(self.turns)
        bot = self.encoder.ids["speaker2"]
        return torch.tensor([[*tokens, bot]]), torch.tensor([[*types, bot]])


@torch.no_grad()
def reply(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    types: torch.Tensor,
    *,
    most: int,
    sampling: Sampling,
    specials: dict[str, int],
    draw: torch.Generator,
) -> tuple[list[int], bool]:
    """At most `most` ids that follow `tokens` (1, t) of `types` (1, t); and whether a special token ended them."""
    device, said = model.head_weight.device, []
    caches = [Cache() for _ in model.layers]
    while len(said) < most:
        hidden, _ = model.features(tokens.to(device), caches, Layout(types=types.to(device)))
        probabilities = sampling.distribution(model.logits(hidden[:, -1]).cpu(), tokens)
        tokens = torch.multinomial(probabilities, 1, generator=draw)
        types = torch.full_like(tokens, specials["speaker2"])
        if int(tokens) in specials.values():
            return said, True
        said.append(int(tokens))
    return said, False


class Chat:
    """A model in a conversation, in words."""

    def __init__(self, model, conversation: Conversation, sampling: Sampling, seed: int = 1):
        self.model, self.conversation, self.sampling = model, conversation, sampling
        self.draw = torch.Generator().manual_seed(seed)

    def problem(self, line: str) -> str:
        """Why the user cannot say this line; nothing if it can be said."""
        over = self.conversation.over(line)
        return (
            f"too long by {over} token{'s' if over > 1 else ''}: say it in several turns" if over > 0 else ""
        )

    def answer(self, line: str) -> Iterator[str]:
        """What the transcript has behind the user's line: the reply, and in brackets what must be known of it."""
        c = self.conversation
        if unknown := unknown_in(c.encoder, line):
            yield f"({unknown} of its tokens are not in the run's vocabulary)"
        c.turns, before = (*c.turns, line), c.left_out
        tokens, types = c.prompt()
        if c.left_out > before:
            turns = "turn is" if c.left_out == 1 else f"{c.left_out} turns are"
            yield f"(the first {turns} left out from here on: the model sees {c.context} tokens)"
        ids, ended = reply(
            self.model,
            tokens,
            types,
            most=c.reply_tokens,
            sampling=self.sampling,
            specials=c.encoder.ids,
            draw=self.draw,
        )
        said = c.encoder.tokenizer.decode(torch.tensor(ids, dtype=torch.int64).numpy()).strip()
        c.turns = (*c.turns, said)
        yield f"{BOT}: {said}"
        if not ended:
            yield f"(cut after {c.reply_tokens} tokens)"


def unknown_in(encoder: Encoder, text: str) -> int:
    """How many tokens of the text stand for what the vocabulary lacks."""
    before = encoder.unknown
    encoder.text(text)
    return encoder.unknown - before


def open_run(directory: Path, which: str = "final") -> tuple[Config, Encoder, torch.nn.Module]:
    """(configuration, encoder of its dialogues, model on the CPU) of a finished double-heads run.

    Raises ConfigError for a run of another model, and as engine.generate.opened does.
    """
    config = finished(directory)
    if config.model.model != CHATBOT:
        problem = f"model = {config.model.model!r}: it was not trained on dialogues; a {CHATBOT!r} was"
        more = "; engine.generate lets this one write" if config.model.model == "gpt" else ""
        raise ConfigError(problem + more, str(directory))
    tokenizer, model = opened(directory, config, len(SPECIALS), which)
    return config, Encoder(tokenizer), model


def lines_of(path: Path, name: str) -> list[str]:
    """The lines of a file. Raises ConfigError, which calls it `name`, if it cannot be read or is not `checked`."""
    where = f"{name} {path}"
    try:
        return checked(path.read_text(encoding="utf-8").splitlines(), where)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", where) from None


def checked(lines: list[str], where: str) -> list[str]:
    """The lines without white space around them. Raises ConfigError if there are none, or some are empty."""
    if not lines:
        raise ConfigError("has no line", where)
    if empty := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise ConfigError([f"line {number} is empty" for number in empty], where)
    return [line.strip() for line in lines]


def typed() -> Iterator[str]:
    """What a person types, until the end of the input."""
    while True:
        try:
            line = input(f"{USER}: ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def converse(chat: Chat, lines: Iterable[str], *, echo: bool) -> None:
    """Print the transcript of a conversation in which the user says `lines`; echo: those too."""
    for line in lines:
        if echo:
            print(f"{USER}: {line}")
        if problem := chat.problem(line):
            print(f"({problem})", flush=True)
            continue
        for said in chat.answer(line):
            print(said, flush=True)


def rules(temperature: float, top_p: float | None) -> Sampling:
    """How a token is chosen; a top_p that is not given is TOP_P where it would do something."""
    if -math.inf < temperature <= 0:
        return Sampling(temperature=0.0, top_p=1.0 if top_p is None else top_p)
    return Sampling(temperature=temperature, top_p=TOP_P if top_p is None else top_p)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--persona", type=Path, required=True, metavar="FILE", help="one sentence a line")
    parser.add_argument("--script", type=Path, metavar="FILE", help="what the user says, one turn a line")
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="≤ 0: most probable token (%(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, help=f"only the most probable that hold p ({TOP_P}; of temperature ≤ 0 none)"
    )
    parser.add_argument("--tokens", type=int, default=REPLY_TOKENS, help="of a reply at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random choices (%(default)s)")
    best.add_argument(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def _script(path: Path | None) -> tuple[list[str] | None, str]:
    """What the user says, and where that was read; None where a person sits at a terminal."""
    if path:
        return lines_of(path, "--script"), f"--script {path}"
    where = "standard input"
    return (None if sys.stdin.isatty() else checked(sys.stdin.read().splitlines(), where)), where


@command
def main() -> None:
    a = _arguments()
    config, encoder, model = open_run(a.directory, a.weights)
    sampling = rules(a.temperature, a.top_p)
    problems = sampling.problems(encoder.vocabulary_size)
    problems += [f"tokens = {a.tokens}: must be ≥ 1"] if a.tokens < 1 else []
    if problems:
        raise ConfigError(problems)
    persona = tuple(lines_of(a.persona, "--persona"))
    conversation = Conversation(encoder, persona, model.context, a.tokens)
    if (over := conversation.over("") + 1) > 0:  # and a token of the user's
        raise ConfigError(
            f"too long by {over} token{'s' if over > 1 else ''}, beside {a.tokens} of a reply: the model sees "
            f"{model.context}; shorten it, or set --tokens lower",
            f"--persona {a.persona}",
        )
    chat = Chat(model, conversation, sampling, a.seed)
    script, where = _script(a.script)
    wrong = [f"line {n}: {p}" for n, line in enumerate(script or [], start=1) if (p := chat.problem(line))]
    if wrong:
        raise ConfigError(wrong, where)
    ranks = parallel.start(Parallel(), a.device)
    chat.model = model.to(ranks.device)
    for sentence in persona:
        print(f"persona: {sentence}")
    if unknown := unknown_in(encoder, " ".join(persona)):
        print(f"({unknown} of its tokens are not in the run's vocabulary)")
    with autocast(config.training.precision, ranks.device):
        converse(chat, typed() if script is None else script, echo=script is not None)


if __name__ == "__main__":
    main()
