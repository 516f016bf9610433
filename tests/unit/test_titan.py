"""torchtitan behind its one door: little of it is loaded, and nothing of it outlives a model."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from engine_runs import REPOSITORY

from engine import titan
from engine.config import resolve
from engine.models.gpt import build

PROBE = """
import json, logging, sys
import engine.titan
print(json.dumps([sorted({name.split(".")[0] for name in sys.modules}), logging.getLogger().level,
                  sorted(name for name in sys.modules if name.startswith("torchtitan."))]))
"""


def test_importing_it_loads_no_heavy_library_and_leaves_logging_alone():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    packages, level, modules = json.loads(done.stdout)
    assert "torchtitan" in packages
    assert not {"triton", "datasets", "tensorboard", "torchao", "wandb", "torchdata"} & set(packages)
    assert level == logging.WARNING and done.stderr == ""
    assert "torchtitan.distributed.activation_checkpoint" in modules
    assert not [
        name for name in modules if name.startswith(("torchtitan.models", "torchtitan.components.quant"))
    ]


def test_a_missing_torchtitan_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "torchtitan")
    with pytest.raises(ModuleNotFoundError, match=r"pip install torchtitan==0\.2\.2"):
        titan._load_package()


def small(layers: int = 5):
    return build(resolve({"layers": layers, "heads": 2, "width": 16, "context": 8}, "test").model, 17)


def wrapped(model) -> list[int]:
    return [i for i, block in enumerate(model.layers) if hasattr(block, "_checkpoint_wrapped_module")]


def test_every_nth_layer_is_counted_anew_for_each_model():
    """torchtitan's own count goes on from model to model, so the second model would get other layers."""
    for _ in range(3):
        model = small()
        titan.checkpoint_activations(model, "every_n", 2, keep_rng=False)
        assert wrapped(model) == [1, 3]
    model = small()
    titan.checkpoint_activations(model, "every_n", 3, keep_rng=False)
    assert wrapped(model) == [2]


def test_full_checkpointing_wraps_every_layer_in_place():
    model = small()
    titan.checkpoint_activations(model, "full", 2, keep_rng=False)
    assert wrapped(model) == [0, 1, 2, 3, 4]


def test_clipping_to_zero_means_no_clipping():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert titan.clip_gradients([p], 0.0).item() == pytest.approx(5.0) and p.grad.tolist() == [3.0, 4.0]
    assert titan.clip_gradients([p], 2.5).item() == pytest.approx(5.0)
    assert p.grad.tolist() == pytest.approx([1.5, 2.0])
