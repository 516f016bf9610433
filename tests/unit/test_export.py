"""Export to Hugging Face's format, and weights to start from: equal logits and bits, or a refusal that says why."""

import json
import sys
from pathlib import Path

import finished_run
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import export
from engine.digest import sha256
from engine.errors import ConfigError
from engine.models import gpt2
from engine.pretrained import load_into

VOCABULARY = 37
TOKENS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def exported(tmp_path: Path, **changes) -> torch.nn.Module:
    """A run in tmp_path / "run", exported to tmp_path / "gpt2"; its model."""
    model = finished_run.write(tmp_path / "run", VOCABULARY, **changes)
    export.export(tmp_path / "run", tmp_path / "gpt2")
    return model


def started(directory: Path, vocabulary: int = VOCABULARY, **changes) -> tuple[torch.nn.Module, list]:
    """A model with other weights, then given those of `directory`; and the ledger's lines."""
    config = finished_run.config(init_from=str(directory), **changes)
    model = finished_run.drawn(config, vocabulary, seed=99)
    return model, load_into(model, config.model)


def change(directory: Path, edit) -> None:
    """Rewrite the directory's weights as `edit` leaves them."""
    state = load_file(directory / "model.safetensors")
    save_file(edit(state), directory / "model.safetensors")


def change_config(directory: Path, **entries) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    theirs = dict(expected.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, theirs[name]), name


def test_the_command_writes_what_transformers_loads(tmp_path, monkeypatch, capsys):
    from transformers import GPT2LMHeadModel

    for activation, name in (("gelu_tanh", "gelu_new"), ("gelu", "gelu")):
        run, output = tmp_path / activation, tmp_path / "out" / activation
        model = finished_run.write(run, VOCABULARY, activation=activation, pad_vocabulary_to=8)
        monkeypatch.setattr(sys, "argv", ["export", str(run), str(output)])
        export.main()
        assert str(output) in capsys.readouterr().out
        theirs, report = GPT2LMHeadModel.from_pretrained(output, output_loading_info=True)
        assert not any(report.values())
        assert theirs.config.activation_function == name and theirs.config.vocab_size == VOCABULARY
        with torch.no_grad():
            difference = (theirs.eval()(TOKENS).logits - model(TOKENS)[0]).abs().max()
        assert difference < 1e-4 < model(TOKENS)[0].std()


def test_from_an_export_the_same_bits_come_back(tmp_path):
    model = exported(tmp_path)
    again, lines = started(tmp_path / "gpt2")
    assert_same(again, model)
    path = tmp_path / "gpt2"
    assert [(line.what, line.requested, line.agrees) for line in lines] == [("init_from", str(path), True)]
    assert lines[0].in_effect == "a GPT-2 in Hugging Face format: 28 tensors"
    assert sha256(path / "model.safetensors") in lines[0].how
    assert f"{sum(p.numel() for p in model.parameters()):,} elements" in lines[0].how


def test_a_run_starts_from_a_finished_run(tmp_path):
    for i, changes in enumerate(
        (
            {"tie_embeddings": False, "norm_placement": "post"},
            {"positions": "rotary", "activation": "swiglu"},
            {"attention_form": "latent", "latent_width": 8},
        )
    ):
        run = tmp_path / str(i)
        model = finished_run.write(run, VOCABULARY, **changes)
        again, lines = started(run, **changes, dropout=0.1)
        assert_same(again, model)
        assert lines[0].agrees and lines[0].in_effect.startswith("a finished run: ")


def test_names_without_prefix_a_stored_head_and_old_masks_are_understood(tmp_path):
    model = exported(tmp_path)

    def edit(state):
        plain = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        mask = {"h.0.attn.bias": torch.ones(1, 1, 12, 12), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        return plain | mask | {"lm_head.weight": plain["wte.weight"].clone()}

    change(tmp_path / "gpt2", edit)
    again, lines = started(tmp_path / "gpt2")
    assert_same(again, model)
    assert lines[0].agrees


def test_padding_belongs_to_no_one(tmp_path):
    """A padded run, its export without padding, and models with another padding hold the same weights."""
    model = exported(tmp_path, pad_vocabulary_to=8)
    assert model.head_weight.shape[0] == 40
    stored = load_file(tmp_path / "gpt2/model.safetensors")["transformer.wte.weight"]
    assert torch.equal(stored, model.head_weight[:VOCABULARY])
    for directory in ("run", "gpt2"):
        for multiple in (1, 64):
            again, _ = started(tmp_path / directory, pad_vocabulary_to=multiple)
            assert torch.equal(again.head_weight[:VOCABULARY], model.head_weight[:VOCABULARY])
            assert again.head_weight.shape[0] == (64 if multiple == 64 else VOCABULARY)
            assert not again.head_weight[VOCABULARY:].any()


def test_an_untied_model_starts_with_a_copy_of_the_tied_head(tmp_path):
    model = exported(tmp_path)
    again, _ = started(tmp_path / "gpt2", tie_embeddings=False)
    assert torch.equal(again.head.weight, model.token_embedding.weight)
    torch.testing.assert_close(again(TOKENS)[0], model(TOKENS)[0], rtol=0, atol=1e-6)


# --- refusals


def test_all_that_gpt2_cannot_express_is_named_at_once(tmp_path):
    changes = {
        "norm_placement": "post",
        "positions": "rotary",
        "attention_form": "latent",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    }
    finished_run.write(tmp_path / "run", VOCABULARY, **changes)
    with pytest.raises(ConfigError, match="6 problems in") as raised:
        export.export(tmp_path / "run", tmp_path / "gpt2")
    assert {p.split(" = ")[0] for p in raised.value.problems} == set(changes)
    assert "activation = 'swiglu': GPT-2 has 'gelu_tanh' or 'gelu'" in raised.value.problems
    assert not (tmp_path / "gpt2").exists()
    assert gpt2.problems(finished_run.config(attention="manual", dropout=0.1).model) == []


def test_export_leaves_what_is_there_and_wants_a_complete_run(tmp_path):
    exported(tmp_path)
    with pytest.raises(ConfigError, match="exists and is not an empty directory; it was left as it is"):
        export.export(tmp_path / "run", tmp_path / "gpt2")
    (tmp_path / "run/metrics.json").unlink()
    for refused in (
        lambda: export.export(tmp_path / "run", tmp_path / "new"),
        lambda: started(tmp_path / "run"),
    ):
        with pytest.raises(ConfigError, match="no metrics.json: the run is not complete"):
            refused()


def test_other_shapes_are_named_with_both(tmp_path):
    exported(tmp_path)
    with pytest.raises(ConfigError, match="init_from = ") as raised:
        started(tmp_path / "gpt2", vocabulary=40, context=24)
    assert raised.value.problems == [
        "position_embedding.weight: (24, 16) here, (12, 16) there",
        "token_embedding.weight: (40, 16) here, (37, 16) there",
    ]


def test_missing_and_unknown_tensors_are_named_and_nothing_is_loaded(tmp_path):
    exported(tmp_path)
    change(tmp_path / "gpt2", lambda state: state | {"extra": torch.zeros(1)})
    config = finished_run.config(init_from=str(tmp_path / "gpt2"), layers=3)
    model, untouched = (finished_run.drawn(config, VOCABULARY, seed=9) for _ in range(2))
    with pytest.raises(ConfigError, match="13 problems") as raised:
        load_into(model, config.model)
    assert "extra: unknown here" in raised.value.problems
    assert "layers.2.mlp.up.weight: missing there" in raised.value.problems
    assert_same(model, untouched)


def test_weights_of_another_function_are_refused_though_they_fit(tmp_path):
    exported(tmp_path)
    with pytest.raises(ConfigError, match="2 problems") as raised:
        started(tmp_path / "gpt2", heads=4, activation="gelu")
    assert raised.value.problems == [
        "activation = 'gelu': the weights are for 'gelu_new'; set activation = 'gelu_tanh'",
        "heads = 4: the weights are for 2",
    ]
    with pytest.raises(ConfigError, match="2 problems") as raised:
        started(tmp_path / "run", heads=4, activation="relu")
    assert raised.value.problems == [
        "heads = 4: the weights are for 2",
        "activation = 'relu': the weights are for 'gelu_tanh'",
    ]
    with pytest.raises(ConfigError, match="positions = 'sinusoidal': GPT-2 has 'learned'"):
        started(tmp_path / "gpt2", positions="sinusoidal")
    change_config(tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=1e-6)
    with pytest.raises(ConfigError, match="layer_norm_epsilon = 1e-06: only 1e-05") as raised:
        started(tmp_path / "gpt2")
    assert raised.value.problems[1] == "scale_attn_by_inverse_layer_idx = True: only False is known here"


def test_a_head_of_its_own_is_not_dropped(tmp_path):
    exported(tmp_path)
    change(tmp_path / "gpt2", lambda state: state | {"lm_head.weight": torch.ones(VOCABULARY, 16)})
    with pytest.raises(ConfigError, match="its head is not its token embedding; set tie_embeddings = false"):
        started(tmp_path / "gpt2")
    assert torch.equal(
        started(tmp_path / "gpt2", tie_embeddings=False)[0].head.weight, torch.ones(VOCABULARY, 16)
    )


def test_what_is_no_model_is_refused(tmp_path):
    exported(tmp_path)
    with pytest.raises(ConfigError, match=r"neither a run's directory \(config.toml\) nor a Hugging Face"):
        started(tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        started(tmp_path / "nowhere")
    (tmp_path / "gpt2/model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ConfigError, match="model.safetensors cannot be read: "):
        started(tmp_path / "gpt2")
    (tmp_path / "gpt2/model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no model.safetensors"):
        started(tmp_path / "gpt2")
    change_config(tmp_path / "gpt2", model_type="llama")
    with pytest.raises(ConfigError, match="model_type = 'llama': only 'gpt2' is known here"):
        started(tmp_path / "gpt2")
    (tmp_path / "gpt2/config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not valid JSON"):
        started(tmp_path / "gpt2")
