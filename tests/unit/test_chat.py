"""Chat: what the model reads of a hand-made conversation, what ends a reply, what is cut, and the command."""

import io
import json
import sys

import finished_run
import pytest
import torch

from engine import chat as command
from engine import generate
from engine.chat import Chat, Conversation, open_run, reply, rules
from engine.data.dialogue_tokens import Encoder
from engine.data.prepare import prepare
from engine.data.tokenizers import Chars
from engine.errors import ConfigError
from engine.generate import Sampling
from engine.models.gpt import Layout

SCRIPT = "hello\nand you? and how are the owls?\nhi\nyou like owls and so do i, you see\n"
GREEDY = Sampling(temperature=0.0)
DIALOGUES = {
    "dataset": "dialogues",
    "data_dir": "dialogues",
    "model": "double_heads",
    "tokenizer": "chars",
    "tie_embeddings": False,  # with a tied head and random weights every token is followed by itself
    "candidates": 2,
    "validation_percent": 50,
    "max_reply_tokens": 20,
    "length_percentile": 100.0,
    "context": 120,
}


def letters() -> Encoder:
    """a b c are 0 1 2, what else there is 3; the specials bos eos pad speaker1 speaker2 are 4 to 8."""
    return Encoder(Chars("abc"))


def conversation(context: int = 40, reply_tokens: int = 4) -> Conversation:
    return Conversation(letters(), ("a", "b"), context, reply_tokens)


# --- what the model reads


def test_the_prompt_of_a_conversation_by_hand():
    """Persona "a b", whose space the vocabulary lacks; then "ab", the reply "c" and "ba"; the bot is to speak."""
    c = conversation()
    c.turns = ("ab", "c", "ba")
    tokens, types = c.prompt()
    assert tokens.tolist() == [[4, 0, 3, 1, 7, 0, 1, 8, 2, 7, 1, 0, 8]]
    assert types.tolist() == [[8, 8, 8, 8, 7, 7, 7, 8, 8, 7, 7, 7, 8]]


def test_the_prompt_is_what_training_has_before_a_reply():
    c, encoder = conversation(), letters()
    c.turns = ("ab", "c", "ba")
    ids, speakers = encoder.context(("a", "b"), c.turns)
    said, of_said = encoder.reply("ca")
    tokens, types = c.prompt()
    assert tokens[0].tolist() == [*ids, said[0]] and types[0].tolist() == [*speakers, of_said[0]]


def test_oldest_turns_are_left_out_whole_until_the_reply_fits():
    """Of 20 tokens a reply of 4 needs 3 and its speaker 1: 16 are left, of which bos and persona take 4."""
    c = conversation(context=20)
    assert c.room == 16
    c.turns = ("abc", "cc", "abca")  # 4 + 3 + 5 = 12 with their speakers: just as many
    assert c.prompt()[0].shape == (1, 17) and c.left_out == 0
    c.turns = ("abc", "cc", "abcab")  # one more, and the first turn goes
    tokens, types = c.prompt()
    assert c.left_out == 1
    assert tokens.tolist() == [[4, 0, 3, 1, 8, 2, 2, 7, 0, 1, 2, 0, 1, 8]]
    assert types.tolist() == [[8, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7, 8]]


def test_by_how_many_tokens_a_turn_alone_is_too_long():
    c = conversation(context=20)
    assert [c.over("a" * n) for n in (1, 11, 12, 14)] == [-10, 0, 1, 3]


# --- what it says


class Scripted(torch.nn.Module):
    """Says the tokens of `script`, one after another, and keeps what it was given."""

    context, layers = 40, [None, None]

    def __init__(self, script: list[int]):
        super().__init__()
        self.head_weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.seen = list(script), []

    def features(self, tokens, caches=None, layout=None):
        assert isinstance(layout, Layout) and layout.types.shape == tokens.shape and len(caches) == 2
        self.seen.append((tokens[0].tolist(), layout.types[0].tolist()))
        return torch.zeros(1, tokens.size(1), 1), []

    def logits(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor([self.script.pop(0)]), 9).float() * 100


def said_by(script: list[int], most: int = 4) -> tuple[list[int], bool]:
    ids = letters().ids
    prompt = torch.tensor([[4, 0, 8]]), torch.tensor([[8, 8, 8]])
    draw = torch.Generator().manual_seed(1)
    return reply(Scripted(script), *prompt, most=most, sampling=Sampling(), specials=ids, draw=draw)


@pytest.mark.parametrize("special", [4, 5, 6, 7, 8])
def test_any_special_token_ends_a_reply_and_is_none_of_it(special):
    assert said_by([0, 1, special, 2]) == ([0, 1], True)


def test_a_reply_has_so_many_tokens_at_most():
    assert said_by([0, 1, 2, 0, 1, 2]) == ([0, 1, 2, 0], False)
    assert said_by([5, 0]) == ([], True)


def test_each_token_of_a_reply_is_read_alone_as_the_bots():
    """The cache has what was before; the last token is never read."""
    model, draw = Scripted([0, 1, 2]), torch.Generator().manual_seed(1)
    prompt = torch.tensor([[4, 0, 7, 1, 8]]), torch.tensor([[8, 8, 7, 7, 8]])
    reply(model, *prompt, most=3, sampling=GREEDY, specials=letters().ids, draw=draw)
    assert model.seen == [([4, 0, 7, 1, 8], [8, 8, 7, 7, 8]), ([0], [8]), ([1], [8])]


def test_a_transcript_by_hand():
    model = Scripted([0, 1, 5, 2, 2, 2, 2])
    found = Chat(model, conversation(), GREEDY)
    assert list(found.answer("cab")) == ["bot: ab"]
    assert list(found.answer("a?")) == [
        "(1 of its tokens are not in the run's vocabulary)",
        "bot: cccc",
        "(cut after 4 tokens)",
    ]
    assert found.conversation.turns == ("cab", "ab", "a?", "cccc")
    assert model.seen[3][0] == [4, 0, 3, 1, 7, 2, 0, 1, 8, 0, 1, 7, 0, 3, 8]


def test_what_is_left_out_is_said_once():
    found = Chat(Scripted([2, 5, 2, 5, 5, 5]), conversation(context=23), GREEDY)
    lines = [list(found.answer(line)) for line in ("abcabc", "abcabc", "a", "abcabcabc")]
    assert lines == [
        ["bot: c"],
        ["(the first turn is left out from here on: the model sees 23 tokens)", "bot: c"],
        ["bot: "],
        ["(the first 3 turns are left out from here on: the model sees 23 tokens)", "bot: "],
    ]


def test_temperatures_that_are_not_positive_take_the_most_probable():
    assert rules(0.9, None) == Sampling(temperature=0.9, top_p=0.7)
    assert rules(0.5, 0.3) == Sampling(temperature=0.5, top_p=0.3)
    assert rules(0.0, None) == rules(-1.0, None) == GREEDY
    assert rules(0.0, 0.3).problems(9) == ["top_p = 0.3: would do nothing with temperature = 0"]


# --- a run


def dialogue(number: int) -> dict:
    turns = [f"hello {number}", f"hi {number}", "and you?", f"i like {'xyz'[number % 3]} and {number}"]
    return {"persona": [f"i am {number}.", "i like owls."], "turns": turns}


@pytest.fixture
def run(lab):
    """A finished double-heads run with large random weights; its directory."""
    (lab.directory / "dialogues").mkdir()
    for first, name in ((0, "train"), (30, "test")):
        lines = [json.dumps(dialogue(first + i)) for i in range(20)]
        (lab.directory / "dialogues" / f"{name}.jsonl").write_text("\n".join(lines))
    config = finished_run.config(**DIALOGUES)
    meta = prepare(config.data, config.tokens_directory)
    finished_run.write(config.directory, meta["vocabulary_size"], **DIALOGUES)
    (lab.directory / "persona.txt").write_text("i like owls.\ni am 7.\n")
    (lab.directory / "script.txt").write_text(SCRIPT)
    return config.directory


def anew(model, tokens, types, encoder: Encoder, most: int) -> list[int]:
    """The definition: what the model says is most probable behind all so far, computed whole for each token."""
    ids = []
    with torch.no_grad():
        while len(ids) < most:
            hidden, _ = model.features(tokens, None, Layout(types=types))
            following = int(model.logits(hidden[:, -1]).argmax())
            if following in encoder.ids.values():
                break
            ids.append(following)
            tokens = torch.cat([tokens, torch.tensor([[following]])], 1)
            types = torch.cat([types, torch.tensor([[encoder.ids["speaker2"]]])], 1)
    return ids


def test_greedy_replies_are_those_of_the_definition(run):
    _, encoder, model = open_run(run)
    draw, texts = torch.Generator().manual_seed(1), []
    for line in ("hello", "and you?", "owls", "i am 7", "you like me"):
        found = Conversation(encoder, ("i like owls.",), model.context, 12)
        found.turns = (line,)
        given = found.prompt()
        ids, _ = reply(model, *given, most=12, sampling=GREEDY, specials=encoder.ids, draw=draw)
        assert ids == anew(model, *given, encoder, 12)
        texts.append(tuple(ids))
    assert len(set(texts)) > 2 and max(map(len, texts)) > 2  # noqa: PLR2004  not one reply over and over


def test_token_types_reach_the_model(run):
    """The same tokens said by the other speaker are followed by something else."""
    _, encoder, model = open_run(run)
    tokens, types = Conversation(encoder, ("i like owls.",), model.context, 12).encoder.context(
        ("a",), ("hi",)
    )
    with torch.no_grad():
        hidden = [
            model.features(torch.tensor([tokens]), None, Layout(types=torch.tensor([kinds])))[0]
            for kinds in (types, types[::-1])
        ]
    assert not torch.allclose(*hidden)


def said(monkeypatch, capsys, *arguments, typed: str = "") -> str:
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments), "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    command.main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments, typed: str = "") -> str:
    monkeypatch.setattr(sys, "argv", ["chat", *map(str, arguments), "--device", "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(SystemExit, match="2"):
        command.main()
    return capsys.readouterr().err


def test_the_transcript_of_a_script(run, monkeypatch, capsys):
    given = [run, "--persona", "persona.txt", "--script", "script.txt"]
    text = said(monkeypatch, capsys, *given)
    lines = text.splitlines()
    assert lines[:3] == ["persona: i like owls.", "persona: i am 7.", "user: hello"]
    assert [line[6:] for line in lines if line.startswith("user: ")] == SCRIPT.splitlines()
    assert sum(line.startswith("bot: ") for line in lines) == 4
    assert any("left out from here on: the model sees 120 tokens" in line for line in lines)
    assert said(monkeypatch, capsys, *given) == text
    assert said(monkeypatch, capsys, *given, "--seed", "2") != text
    assert said(monkeypatch, capsys, *given[:3], typed=SCRIPT) == text


def test_a_persons_lines_are_asked_for_and_not_echoed(run, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(
        sys, "argv", ["chat", str(run), "--persona", "persona.txt", "--tokens", "3", "--device", "cpu"]
    )
    monkeypatch.setattr(sys, "stdin", Terminal(f"hello\n\n{'a' * 200}\n"))
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("user: bot: ")
    assert any(line.startswith("user: user: (too long by ") for line in lines)
    assert lines[-1] == "user: "


def test_a_run_of_another_model_is_refused(lab, monkeypatch, capsys):
    values = {"dataset": "text", "data_dir": str(lab.directory / "text")}
    config = finished_run.config(**values)
    meta = prepare(config.data, config.tokens_directory)
    finished_run.write(config.directory, meta["vocabulary_size"], **values)
    message = refused(monkeypatch, capsys, config.directory, "--persona", "persona.txt").splitlines()[1]
    assert message.startswith(
        "  - model = 'gpt': it was not trained on dialogues; a 'double_heads' was; engine."
    )


def test_a_run_that_did_not_finish_is_refused(run, monkeypatch, capsys):
    (run / "metrics.json").unlink()
    assert "the run is not complete" in refused(monkeypatch, capsys, run, "--persona", "persona.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "1 problem in --persona other.txt:\n  - cannot be read: No such file or directory"),
        (b"", "1 problem in --persona other.txt:\n  - has no line"),
        (b"a\n\nb\n \n", "2 problems in --persona other.txt:\n  - line 2 is empty\n  - line 4 is empty"),
        (b"\xff", "1 problem in --persona other.txt:\n  - is not UTF-8 text"),
        (
            b"a" * 90,
            "too long by 13 tokens, beside 40 of a reply: the model sees 120; shorten it, or set --tokens",
        ),
    ],
)
def test_a_persona_that_cannot_be_used_is_refused(run, lab, monkeypatch, capsys, content, message):
    """Of 120 tokens 80 are for what is before the bot's speaker; 90, bos, the user's speaker and a token are 93."""
    if content is not None:
        (lab.directory / "other.txt").write_bytes(content)
    found = refused(monkeypatch, capsys, run, "--persona", "other.txt", "--script", "script.txt")
    assert message in found


def test_a_script_is_checked_before_anything_is_said(run, monkeypatch, capsys):
    given = [run, "--persona", "persona.txt"]
    message = refused(monkeypatch, capsys, *given, typed=f"hello\n{'b' * 200}\n")
    assert "1 problem in standard input:\n  - line 2: too long by 1" in message
    assert "standard input:\n  - line 1 is empty" in refused(monkeypatch, capsys, *given, typed="\nhello\n")
    assert "standard input:\n  - has no line" in refused(monkeypatch, capsys, *given)


def test_values_out_of_range_are_all_named(run, monkeypatch, capsys):
    given = [run, "--persona", "persona.txt", "--top-p", "2", "--tokens", "0"]
    assert refused(monkeypatch, capsys, *given).splitlines()[1:] == [
        "  - top_p = 2.0: must be > 0 and ≤ 1",
        "  - tokens = 0: must be ≥ 1",
    ]


@pytest.mark.parametrize("temperature", ["nan", "inf", "-inf"])
def test_a_temperature_that_is_no_number_is_refused(run, monkeypatch, capsys, temperature):
    message = refused(monkeypatch, capsys, run, "--persona", "persona.txt", f"--temperature={temperature}")
    problem = f"  - temperature = {temperature}: must be 0, or from 1e-06 to 1e+06"
    assert message.splitlines() == ["error: 1 problem:", problem]


def test_generation_says_that_this_command_is_the_one(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", str(run), "--prompt", "a"])
    with pytest.raises(SystemExit, match="2"):
        generate.main()
    assert (
        "  - model = 'double_heads': it answers turns of a dialogue: `python -m engine.chat` does that"
        in (capsys.readouterr().err)
    )


def test_a_vocabulary_that_is_not_the_models_is_refused(run):
    config = finished_run.config(**DIALOGUES, run="other")
    finished_run.write(config.directory, 200, **DIALOGUES, run="other")
    with pytest.raises(ConfigError, match="token_embedding.weight: 200 rows, but the run's tokenizer has"):
        open_run(config.directory)
