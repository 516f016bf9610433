"""Muon, gradient norms of blocks and the noise scale on a GPU: the CPU's numbers, no waiting, compiled too."""

import pytest
import torch
from engine_runs import assert_same_weights, column, ledger, rows
from test_low_precision_gpu import no_waiting, no_warning_of_the_mode

from engine.config import Optimizer
from engine.guards import step_unless
from engine.noise_scale import NoiseScale
from engine.optimizers import groups, muon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

RUN = {
    "device": "cuda",
    "layers": 3,
    "heads": 4,
    "width": 128,
    "context": 64,
    "batch_size": 16,
    "micro_batch_size": 4,
    "steps": 10,
    "optimizer": "muon",
    "warmup_steps": 2,
    "eval_batch_size": 4,
    "gradient_norm_layers": [0, 1, 2],
}
FAST = {"precision": "bf16", "compile": "model", "loss_kernel": "fused", "gradient_sums": "fused"}


class Blocks(torch.nn.Module):
    """Six matrices of two shapes in blocks, and a table beside them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(50, 256)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(256, 1024), "out": torch.nn.Linear(1024, 256)})
            for _ in range(3)
        )


def built(model, **changes):
    settings = Optimizer(optimizer="muon", **changes)
    return muon.build(groups.of(model, settings), settings)


def test_bf16_products_on_a_gpu_give_nearly_what_fp32_gives_on_a_cpu():
    x = torch.randn(4, 256, 1024, generator=torch.Generator().manual_seed(1))
    exact, found = muon.orthogonal(x), muon.orthogonal(x.cuda().bfloat16()).float().cpu()
    assert ((found - exact).norm() / exact.norm()).item() < 0.03


@no_warning_of_the_mode
def test_the_host_does_not_wait_even_where_a_step_may_be_refused():
    model = Blocks().cuda()
    optimizer = built(model)
    refused = torch.zeros((), device="cuda")
    for turn in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if turn:
            with no_waiting():
                step_unless(refused, optimizer)
        else:
            step_unless(refused, optimizer)


def test_a_refused_step_changes_nothing():
    model = Blocks().cuda()
    optimizer = built(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    step_unless(torch.ones((), device="cuda"), optimizer)
    assert_same_weights(model.state_dict(), before)


def test_a_run_has_the_losses_and_norms_of_the_cpu(lab):
    exact = {"muon_precision": "fp32"}
    runs = [lab.train(run=device, **{**RUN, **exact, "device": device}) for device in ("cpu", "cuda")]
    for name in ("train_loss", "grad_norm", *(f"gradient_norm_{i}" for i in range(3))):
        assert column(runs[1], name) == pytest.approx(column(runs[0], name), rel=5e-3), name


def test_compiled_and_fused_it_trains_and_its_ledger_agrees(lab):
    plain, fast = lab.train(run="plain", **RUN), lab.launch(run="fast", **{**RUN, **FAST})
    lines = ledger(fast)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["muon"]["in_effect"] == "12 of 12 matrices of the blocks, in bfloat16"
    assert column(fast, "train_loss") == pytest.approx(column(plain, "train_loss"), rel=1e-2)


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"precision": "bf16", "compile": "blocks"}], ids=str)
def test_measuring_the_noise_scale_leaves_the_run_alone(lab, changes):
    """On a CPU bit for bit; here kernels add in any order. Other random numbers would show much more."""
    settings = {**RUN, "loss_kernel": "fused", **changes}
    runs = [lab.launch(run=f"n{n}", **{**settings, "noise_scale_interval": n}) for n in (0, 3)]
    losses = [column(run, "train_loss") for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    found = rows(runs[1] / NoiseScale.FILE)
    assert [row["step"] for row in found] == ["2", "5", "8"]
    assert all(0.2 < float(row["coherence"]) < 1.01 for row in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", [{}, {"data_parallel": "fsdp"}], ids=["ddp", "fsdp"])
def test_two_gpus_train_what_one_does(lab, way):
    settings = {**RUN, "muon_precision": "fp32", "epsilon": 1e-4, "noise_scale_interval": 5}
    one = lab.launch(run="one", **settings)
    two = lab.launch(2, run="two", **{**settings, **way})
    lines = ledger(two)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    for name in ("train_loss", "grad_norm", *(f"gradient_norm_{i}" for i in range(3))):
        assert column(two, name) == pytest.approx(column(one, name), rel=5e-3), name
    large = [[float(row["large_square_norm"]) for row in rows(run / NoiseScale.FILE)] for run in (one, two)]
    assert large[1] == pytest.approx(large[0], rel=1e-2)
