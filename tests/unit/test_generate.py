"""Generation: with a cache as without, every sampling rule by hand, and the vocabulary the run was trained on."""

import json
import shutil
import sys

import finished_run
import pytest
import torch
from engine_runs import events

from engine import checkpoint, evaluate
from engine import generate as command
from engine.data.prepare import prepare
from engine.errors import ConfigError
from engine.generate import LARGEST, SMALLEST, Sampling, encode_prompt, generate, open_run
from engine.models.attention import Cache

VOCABULARY = 37
VARIANTS = {
    "learned": {},
    "rotary": {"positions": "rotary", "activation": "swiglu"},
    "sinusoidal-manual": {"positions": "sinusoidal", "attention": "manual"},
    "post": {"norm_placement": "post", "pad_vocabulary_to": 8},
    "latent": {"attention_form": "latent", "latent_width": 6},
    "latent-rotary": {"attention_form": "latent", "latent_width": 6, "positions": "rotary"},
    "latent-one-query": {
        "attention_form": "latent",
        "latent_width": 6,
        "latent_query": "shared",
        "attention": "manual",
        "reciprocal_alpha": 0.8,
        "reciprocal_window": 3,
    },
    "latent-one-value": {"attention_form": "latent", "latent_width": 6, "latent_value": "shared"},
    "reciprocal": {
        "attention_form": "latent",
        "latent_width": 6,
        "attention": "manual",
        "reciprocal_alpha": 0.8,
        "reciprocal_window": 3,
    },
    "reciprocal-rotary": {
        "attention_form": "latent",
        "latent_width": 6,
        "attention": "manual",
        "positions": "rotary",
        "reciprocal_alpha": -0.8,
    },
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
GREEDY = Sampling(temperature=0.0)


def model_of(variant: dict):
    """Untied, because with a tied head and random weights every token is followed by itself."""
    return finished_run.drawn(finished_run.config(**{"tie_embeddings": False} | variant), VOCABULARY)


def prompt(batch: int = 2, length: int = 3) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))


# --- the cache


@variants
@pytest.mark.parametrize(
    "sampling",
    [Sampling(2.0, 0.0), Sampling(), Sampling(repetition_penalty=1.3, temperature=0.7, top_k=9, top_p=0.9)],
    ids=["greedy", "sampled", "all-rules"],
)
def test_the_text_is_the_same_with_and_without_a_cache(variant, sampling):
    """9 tokens fill the context of 12; 6 more are predicted from a window that slides."""
    model = model_of(variant)
    cached, plain = (
        generate(model, prompt(), count=15, sampling=sampling, seed=5, use_cache=use) for use in (True, False)
    )
    assert cached.shape == (2, 18) and torch.equal(cached[:, :3], prompt())
    assert torch.equal(cached, plain)
    assert len(cached[0].unique()) > 5  # not one token over and over, which would prove little


@variants
def test_the_logits_are_the_same_with_and_without_a_cache(variant):
    model, text, caches = model_of(variant), prompt(length=12), [Cache(), Cache()]
    with torch.no_grad():
        parts = [model.features(part, caches)[0] for part in text.split([5, 1, 1, 1, 1, 1, 1, 1], 1)]
        torch.testing.assert_close(model.logits(torch.cat(parts, 1)), model(text)[0], rtol=1e-5, atol=1e-5)
    assert caches[0].length == caches[1].length == 12


@variants
def test_greedy_takes_the_most_probable_token_of_the_last_context(variant):
    """The definition, written out: what the model says of the last 12 tokens."""
    model, text = model_of(variant), prompt()
    for _ in range(15):
        with torch.no_grad():
            following = model(text[:, -12:])[0][:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, following], 1)
    assert torch.equal(generate(model, prompt(), count=15, sampling=GREEDY), text)
    assert torch.equal(
        generate(model, text[:, :14], count=4, sampling=GREEDY), text
    )  # a prompt beyond the context


@pytest.mark.parametrize("variant", ["learned", "latent-rotary", "reciprocal"])
def test_with_a_cache_each_token_is_computed_once(variant):
    model, lengths = model_of(VARIANTS[variant]), []
    model.layers[0].register_forward_pre_hook(lambda _, given: lengths.append(given[0].size(1)))
    generate(model, prompt(), count=12, sampling=GREEDY)
    assert lengths == [3] + [1] * 9 + [12] * 2
    lengths.clear()
    generate(model, prompt(), count=4, sampling=GREEDY, use_cache=False)
    assert lengths == [3, 4, 5, 6]


def test_the_seed_decides_the_text():
    model = model_of({})
    texts = [generate(model, prompt(), count=9, sampling=Sampling(), seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    same = generate(model, prompt(1).expand(2, -1), count=9, sampling=Sampling(), seed=5)
    assert not torch.equal(*same)  # samples of one prompt differ


# --- the rules, by hand

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()  # probabilities of four tokens
NOTHING = torch.empty(1, 0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),  # at least one token
        ({"top_p": 1e-50}, [0, 1, 0, 0]),  # which fp32 does not have
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),  # the one that crosses 0.6 is in
        ({"top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),  # 4/9 + 3/9 ≥ 0.7
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),  # temperature first: 0.16 / 0.3 ≥ 0.5
    ],
)
def test_the_rules_by_hand(rules, expected):
    found = Sampling(**rules).distribution(LOGITS, NOTHING)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_repetition_penalty_by_hand():
    """CTRL's: logits of tokens in the text are divided if positive and multiplied if not, once each."""
    logits = torch.tensor([[2.0, -1.0, 2.5, 0.5]])
    found = Sampling(repetition_penalty=2.0).distribution(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -2.0, 2.5, 0.5]]).softmax(-1))
    greedy = Sampling(repetition_penalty=2.0, temperature=0.0).distribution(logits, torch.tensor([[2, 2, 2]]))
    assert greedy[0].tolist() == [1, 0, 0, 0]


def test_draws_follow_the_distribution():
    class Constant(torch.nn.Module):
        context, layers, head_weight = 4, [], torch.zeros(1)
        features = staticmethod(lambda text: (torch.zeros(*text.shape, 1), []))
        logits = staticmethod(lambda hidden: LOGITS.expand(len(hidden), -1))

    start = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = generate(Constant(), start, count=1, sampling=Sampling(), use_cache=False)[:, 1]
    assert (drawn.bincount() / 4000).tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)


def test_values_out_of_range_or_without_effect_are_all_named():
    found = Sampling(temperature=-1.0, top_k=38, top_p=0.0, repetition_penalty=0.0).problems(37)
    assert found == [
        "temperature = -1.0: must be 0, or from 1e-06 to 1e+06",
        "top_k = 38: must be from 0 to the vocabulary's 37",
        "top_p = 0.0: must be > 0 and ≤ 1",
        "repetition_penalty = 0.0: must be from 1e-06 to 1e+06",
    ]
    assert Sampling(temperature=0.0, top_k=3, top_p=0.5).problems(37) == [
        "top_k = 3: would do nothing with temperature = 0",
        "top_p = 0.5: would do nothing with temperature = 0",
    ]
    assert Sampling().problems(37) == []


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_refused(name, value):
    [message] = Sampling(**{name: float(value)}).problems(37)
    assert message.startswith(f"{name} = {value}: must be ")


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_the_ends_of_the_range_are_probabilities_and_beyond_them_is_refused(name):
    large = torch.tensor([[100.0, -100.0, 0.0, 1.0]])
    for value, beyond in ((SMALLEST, SMALLEST / 2), (LARGEST, LARGEST * 2)):
        found = Sampling(**{name: value})
        assert found.problems(4) == []
        assert float(found.distribution(large, torch.tensor([[0, 1, 2]])).sum()) == pytest.approx(1)
        assert len(Sampling(**{name: beyond}).problems(4)) == 1


# --- the command


def run_of(lab, tokenizer: str, vocabulary: int | None = None, **changes):
    """A finished run on the lab's text in this tokenizer; its directory."""
    values = {
        "dataset": "text",
        "data_dir": str(lab.directory / "text"),
        "tokenizer": tokenizer,
        "max_train_bytes": 2000,
        **changes,
    }
    config = finished_run.config(**values)
    meta = prepare(config.data, config.tokens_directory)
    finished_run.write(config.directory, vocabulary or meta["vocabulary_size"], **values)
    return config.directory


def said(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    command.main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    return capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "words"])
def test_the_command_goes_on_from_the_prompt(lab, monkeypatch, capsys, tokenizer):
    run = run_of(lab, tokenizer, pad_vocabulary_to=16)
    arguments = [
        run,
        "--prompt",
        "snow and rain",
        "--tokens",
        "20",
        "--seed",
        "3",
        "--top-k",
        "5",
        "--device",
        "cpu",
    ]
    text = said(monkeypatch, capsys, *arguments)
    assert text.startswith("snow and rain") and len(text) > len("snow and rain") + 5
    assert said(monkeypatch, capsys, *arguments, "--no-cache") == text
    several = said(monkeypatch, capsys, *arguments, "--samples", "3")
    assert several.count("snow and rain") >= 3


def test_bf16_runs_generate_in_bf16(lab, monkeypatch, capsys):
    run = run_of(lab, "chars", precision="bf16", residual_precision="bf16")
    text = said(monkeypatch, capsys, run, "--prompt", "snow", "--tokens", "5", "--device", "cpu")
    assert len(text) == len("snow") + 5 + 1


def test_a_vocabulary_that_is_not_the_models_is_refused(lab):
    run = run_of(lab, "chars", pad_vocabulary_to=64)
    size = open_run(run)[1].vocabulary_size
    for vocabulary in (size - 1, size + 1):  # the padded matrices are equally large
        other = run_of(lab, "chars", vocabulary, pad_vocabulary_to=64, run=f"run{vocabulary}")
        message = f"token_embedding.weight: {vocabulary} rows, but the run's tokenizer has {size} tokens"
        with pytest.raises(ConfigError, match=message):
            open_run(other)


def another_vocabulary(path) -> None:
    """As many characters, and others, at tokenizer.json's `path`: nothing but its content tells."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"characters": content["characters"][:-1] + "é"}))


def test_the_vocabulary_is_in_the_runs_own_directory(lab, monkeypatch, capsys):
    run = run_of(lab, "chars")
    arguments = [run, "--prompt", "snow", "--tokens", "9", "--device", "cpu"]
    text = said(monkeypatch, capsys, *arguments)
    another_vocabulary(lab.directory / "tokens/by_hand/tokenizer.json")  # of a later text, say
    assert said(monkeypatch, capsys, *arguments) == text
    shutil.rmtree(lab.directory / "tokens")
    moved = run.rename(lab.directory / "elsewhere")
    assert said(monkeypatch, capsys, moved, *arguments[1:]) == text


def test_another_vocabulary_of_the_same_size_is_refused(lab, monkeypatch, capsys):
    run = run_of(lab, "chars")
    another_vocabulary(run / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer.json is not the model's vocabulary: its sha256 is"):
        open_run(run)
    assert "is not the model's vocabulary" in refused(monkeypatch, capsys, run, "--prompt", "a")
    (run / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer.json of its own, so what its ids mean is not known"):
        open_run(run)


def test_scoring_or_going_on_with_another_vocabulary_is_refused(lab, monkeypatch, capsys):
    """Evaluation, and training from a finished run's weights, on tokens whose ids mean something else."""
    run = lab.train(run="first", tokenizer="chars")
    another_vocabulary(lab.directory / "tokens/by_hand/tokenizer.json")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "validation", "out.json"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    message = "is not that of tokens/by_hand"
    assert message in capsys.readouterr().err and not (lab.directory / "out.json").exists()
    with pytest.raises(ConfigError, match=message):
        lab.train(run="second", tokenizer="chars", init_from=str(run))


def test_a_checkpoint_of_another_vocabulary_is_not_gone_on_from(lab, monkeypatch):
    save = checkpoint.Checkpoints.save

    def stop(self, step, *others):
        save(self, step, *others)
        raise KeyboardInterrupt

    settings = {"tokenizer": "chars", "checkpoint_interval": 2}
    monkeypatch.setattr(checkpoint.Checkpoints, "save", stop)
    for run in ("same", "other"):
        with pytest.raises(KeyboardInterrupt):
            lab.train(run=run, **settings)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert [e["event"] for e in events(lab.train(run="same", **settings))] == ["resumed"]
    another_vocabulary(lab.directory / "tokens/by_hand/tokenizer.json")
    assert events(lab.train(run="other", **settings)) == []


def test_a_prompt_must_be_in_the_vocabulary(lab):
    tokenizer = open_run(run_of(lab, "chars"))[1]
    assert encode_prompt(tokenizer, "a\n").shape == (1, 2)
    with pytest.raises(ConfigError, match="--prompt: 1 of its 3 tokens are not in the run's vocabulary"):
        encode_prompt(tokenizer, "a§a")
    with pytest.raises(ConfigError, match="--prompt: there is no token in it"):
        encode_prompt(tokenizer, "")
    words = open_run(run_of(lab, "words", run="words"))[1]
    assert words.decode(encode_prompt(words, "the snow")[0]) == "the snow"  # without the line end words add
    assert words.decode(encode_prompt(words, "the snow\n")[0]) == "the snow\n"


def test_the_command_names_every_problem(lab, monkeypatch, capsys):
    run = run_of(lab, "chars")
    message = refused(
        monkeypatch,
        capsys,
        *[run, "--prompt", "a", "--tokens", "0", "--samples", "2", "--temperature", "0", "--top-p", "0.5"],
    )
    assert message.splitlines() == [
        "error: 3 problems:",
        "  - top_p = 0.5: would do nothing with temperature = 0",
        "  - tokens = 0: must be ≥ 1",
        "  - samples = 2: with temperature = 0 all are the same",
    ]
    given = ["--temperature", "nan", "--repetition-penalty", "inf", "--top-p", "nan"]
    assert refused(monkeypatch, capsys, run, "--prompt", "a", *given).splitlines() == [
        "error: 3 problems:",
        "  - temperature = nan: must be 0, or from 1e-06 to 1e+06",
        "  - top_p = nan: must be > 0 and ≤ 1",
        "  - repetition_penalty = inf: must be from 1e-06 to 1e+06",
    ]
    (run / "metrics.json").unlink()
    assert "the run is not complete" in refused(monkeypatch, capsys, run, "--prompt", "a")
