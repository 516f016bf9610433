"""The memory plan against what real runs measured, on CPUs here and on H100s before, and its parts by hand."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from engine_runs import REPOSITORY, read_json
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from engine import dry_gpu, plan
from engine.config import load, resolve
from engine.data.prepare import prepare
from engine.dry_compile import Region
from engine.errors import ConfigError
from engine.tape import Tape

SIZES = {"layers": 4, "heads": 4, "width": 64, "context": 64, "batch_size": 8, "steps": 3}
GPT2 = {  # 124M, as it was measured
    "layers": 12,
    "heads": 12,
    "width": 768,
    "context": 1024,
    "bias": False,
    "pad_vocabulary_to": 64,
    "batch_size": 64,
    "micro_batch_size": 32,
    "precision": "bf16",
    "residual_precision": "bf16",
    "loss_kernel": "fused",
}


def config(**values):
    return resolve(values, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "every_n"},
        {"activation_checkpointing": "full", "micro_batch_size": 2},
        {"loss_kernel": "fused"},
        {"loss_kernel": "chunked", "loss_chunk_tokens": 128},
        {"optimizer": "adamw8bit", "batch_size": 1},
        {"optimizer": "sgd", "precision": "bf16"},
        {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused", "micro_batch_size": 2},
        {"attention": "manual", "activation": "swiglu", "positions": "rotary", "tie_embeddings": False},
    ],
    ids=str,
)
def test_the_plan_is_what_a_real_run_on_a_cpu_measures(lab, changes):
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = {**SIZES, **changes}
    metrics = read_json(lab.train(**settings) / "metrics.json")
    planned = plan.estimate(lab.config(**settings), 256, "cpu", 1)
    assert planned.peak / 2**30 == pytest.approx(metrics["peak_memory_gib"], rel=0.01)
    assert planned.kept / 2**20 == pytest.approx(metrics["activation_mib"], rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # Inductor's import
@pytest.mark.parametrize(
    ("file", "levels"),
    [
        ("smallest", {}),
        ("smallest", {"checkpointing": "selective"}),
        ("smallest", {"checkpointing": "full", "loss": "chunked"}),
        ("checkpointing", {"checkpointing": "budget_0.5"}),
        ("spreading", {"two GPUs": "fsdp, model gathered as one"}),
    ],
    ids=str,
)
def test_the_plan_of_compiled_gpt2_is_what_was_measured_on_a_gpu(file, levels):
    """By the rows of the record; no GPU is needed here."""
    lines = (REPOSITORY / "records" / "speed-h100" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    (row,) = [row for line in lines if (row := json.loads(line))["levels"] == levels]
    planned = plan.estimate(config(**row["settings"]), 50257, "cuda", row["settings"].get("processes") or 1)
    assert planned.peak / 2**30 == pytest.approx(row["peak_gib"], rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # Inductor's import
@pytest.mark.parametrize(("run", "within"), [("baseline", 0.02), ("ac", 0.1)])
def test_the_plan_of_a_compiled_model_with_dropout_and_two_heads_is_what_was_measured(run, within):
    """Whose residual gradients, in fp32, no product reads before they are rounded."""
    row = REPOSITORY / "records" / "persona-cost-h200" / "results" / f"{run}-1"
    planned = plan.estimate(load(row / "config.toml"), 50262, "cuda", 1)
    measured = json.loads((row / "metrics.json").read_text(encoding="utf-8"))["peak_memory_gib"]
    assert planned.peak / 2**30 == pytest.approx(measured, rel=within)


def test_the_kinds_by_hand():
    """One block of width 16; DDP has a place for every gradient at all times."""
    settings = config(layers=1, heads=2, width=16, context=4, batch_size=2)
    planned = plan.estimate(settings, 256, "cpu", 2)
    parameters = 256 * 16 + 4 * 16 + (12 * 16 * 16 + 13 * 16) + 2 * 16
    assert planned.parameters == planned.gradients == 4 * parameters
    steps = 4 * (2 + 12 + 2)  # Adam's step count of each tensor
    assert planned.optimizer == 8 * parameters + steps
    assert planned.libraries == 0 and planned.micro_batch == 1
    rows = dict(planned.as_rows())
    assert rows["peak"] == sum(rows[kind] for kind in plan.KINDS) == planned.peak


def test_eight_bit_moments_and_their_offload_by_hand():
    """Each moment of a matrix: 1 byte a value, and 4 for each 256 of them; vectors stay in 32 bits."""
    sizes = {"layers": 1, "heads": 1, "width": 64, "context": 64, "bias": False, "batch_size": 1}
    adamw, eight, offloaded = (
        plan.estimate(config(**sizes, **changes), 256, "cuda", 1)
        for changes in (
            {},
            {"optimizer": "adamw8bit"},
            {"optimizer": "adamw8bit", "optimizer_offload": True},
        )
    )
    matrices, vectors, allocated = 256 * 64 + 64 * 64 + 12 * 64 * 64, 3, 512  # bytes at the least
    assert adamw.optimizer == 8 * matrices + vectors * 2 * allocated + (6 + vectors) * allocated
    assert eight.optimizer == 2 * (matrices + 6 * allocated) + vectors * 2 * allocated
    assert offloaded.optimizer == 0 and offloaded.peak < eight.peak


def test_tensor_parallel_divides_matrices_and_sharding_everything():
    sizes = {"layers": 2, "heads": 4, "width": 64, "context": 64, "batch_size": 8}
    one = plan.estimate(config(**sizes), 256, "cpu", 1)
    tensor = plan.estimate(config(**sizes, tensor_parallel=4), 256, "cpu", 4)
    sharded = plan.estimate(config(**sizes, data_parallel="fsdp"), 256, "cpu", 4)
    hybrid = plan.estimate(config(**sizes, data_parallel="hsdp"), 256, "cpu", 4)
    replicated = plan.estimate(config(**sizes), 256, "cpu", 4)
    assert one.parameters / 4 < tensor.parameters < one.parameters / 3
    assert sharded.parameters == one.parameters / 4 and hybrid.parameters == one.parameters / 2
    assert replicated.parameters == one.parameters and replicated.micro_batch == 2


def test_what_ranks_cannot_run_is_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel = 2: must divide the 3 processes"):
        plan.estimate(config(tensor_parallel=2), 256, "cpu", 3)
    with pytest.raises(ConfigError, match=r"batch_size = 16: must be a multiple of micro_batch_size × the 3"):
        plan.estimate(config(), 256, "cpu", 3)


def test_a_tape_by_hand():
    with FakeTensorMode():
        tape = Tape(rounding=512)
        with tape:
            kept = torch.empty(100)  # 400 bytes: 512
            tape.relabel(kept, ("parameters", "w"))
            tape.restart()
            tape.mark("start")
            with tape.labelled("activations", "mlp"):
                a = torch.empty(1000) + 1  # 4000 bytes: 4096, twice for a moment
                view = a[10:]
            tape.mark("forward")
            with tape.held(2000, ("temporary", "gathered")), tape.off():
                uncounted = torch.empty(10**6)
            tape.relabel(a, ("gradients", "g"), share=0.5)
            del a, view, uncounted
            b = torch.empty(1)
        del b
    trace = tape.trace()
    assert trace.forward == {("activations", "mlp"): 4096}
    assert trace.peak == {("parameters", "w"): 512, ("activations", "mlp"): 8192}


def test_a_gpus_rules_hold_inside_and_end_outside():
    x, w = torch.ones(2, 1, 8, 16, dtype=torch.bfloat16), torch.ones(16)
    ours = F.scaled_dot_product_attention
    with FakeTensorMode() as fake, torch.autocast("cpu", torch.bfloat16):
        x, w = fake.from_tensor(x), fake.from_tensor(w)
        with dry_gpu.rules("sdpa"):
            assert F.layer_norm(x, (16,), w).dtype is x.softmax(-1).dtype is torch.float32
            assert F.scaled_dot_product_attention(x, x.float(), x).dtype is torch.bfloat16
        assert x.softmax(-1).dtype is torch.bfloat16
    assert F.scaled_dot_product_attention is ours


def region(function, *shapes) -> Region:
    with FakeTensorMode():
        return Region(make_fx(function)(*(torch.empty(shape) for shape in shapes)))


def test_what_a_compiled_region_writes_to_memory():
    """Only what a matrix product reads, and what leaves: the rest of a chain is fused."""

    def function(x, w):
        return [((x + 1).exp() @ w).sin().cos()]

    found = region(function, (4, 8), (8, 2))
    assert [n.target.name() for n in found.nodes if n in found.written] == [
        "aten::exp",
        "aten::mm",
        "aten::cos",
    ]


def test_a_value_that_reads_much_and_is_read_twice_gets_memory():
    """A sum of 5 for two readers, of 4 it is computed twice; for one reader a sum of 9, of 8 it is fused."""

    def for_two(*x):
        total = sum(x[1:], x[0])
        return [(total.sin() @ x[0]).cos(), (total.exp() @ x[0]).cos()]

    def for_one(*x):
        return [(sum(x[1:], x[0]).sin() @ x[0]).cos()]

    for function, most in ((for_two, 4), (for_one, 8)):
        for count in (most, most + 1):
            found = region(function, *[(4, 4)] * count)
            sums = [n for n in found.nodes if n in found.written and n.target.name().startswith("aten::add")]
            assert len(sums) == (count > most), (function.__name__, count)


@pytest.mark.parametrize(("columns", "floats"), [(2, 32 + 16 + 8), (8, 32 + 16 + 32)])
def test_a_fused_kernel_writes_over_what_it_reads_last(columns, floats):
    """x (4, 8) → exp, over x, which nobody else holds; then the product; then its cosine over it."""
    found = region(lambda x, w: [((x + 1).exp() @ w).cos()], (4, 8), (8, columns))
    tape = Tape()
    with FakeTensorMode(), tape:
        args = [torch.empty(4, 8), torch.empty(8, columns)]
        tape.mark("start")
        (out,) = found(args, tape, ("activations", "x"))
        tape.mark("forward")
    assert args == [] and out.shape == (4, columns)
    assert sum(tape.trace().peak.values()) == 4 * (32 + 8 * columns + 4 * columns)


def test_extending_a_deep_model_by_hand():
    half, whole = Counter(a=60, b=10), Counter(a=120, b=10, c=6)
    assert plan._extended(half, whole, 48) == {"a": 480, "b": 10, "c": 42}


def test_the_micro_batch_that_would_fit_by_hand():
    def planned(micro: int, peak: int) -> plan.Plan:
        kinds = dict.fromkeys(plan.KINDS, 0) | {"activations": peak}
        return plan.Plan(micro, **kinds, parts=(), kept=0)

    one, eight = planned(1, 300), planned(8, 1000)
    assert plan.largest_micro_batch(one, eight, 650) == 4
    assert plan.largest_micro_batch(one, eight, 1099) == 8
    assert plan.largest_micro_batch(one, eight, 299) == 0
    plan.check(one, 1, config(), 1, 300)
    with pytest.raises(ConfigError, match=r"micro-batches of 8 needs .* micro_batch_size = 4 would fit"):
        plan.check(eight, 6, config(batch_size=8), 1, 650)
    with pytest.raises(ConfigError, match="not even micro_batch_size = 1 would fit"):
        plan.check(one, 0, config(batch_size=8), 1, 299)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 256),
        ({"tokenizer": "bpe", "vocab_size": 5000}, 5000),
        ({"tokenizer": "gpt2", "tokenizer_dir": "x"}, 50257),
    ],
)
def test_the_vocabulary_without_the_data(lab, settings, size):
    assert plan.sizes(config(study="none_yet", **settings)) == (size, 0)


def test_classes_that_only_the_data_knows(lab):
    labelled = {"model": "classifier", "dataset": "synthetic", "tokenizer": "hashed_words", "vocab_size": 600}
    asked = config(study="none_yet", **labelled)
    with pytest.raises(ConfigError, match="'synthetic': its classes are those of the data; run python -m"):
        plan.sizes(asked)
    prepare(asked.data, asked.tokens_directory)
    assert plan.sizes(asked) == (600, 4)


def test_a_vocabulary_that_only_the_data_knows(lab):
    asked = lab.config(tokenizer="chars")
    with pytest.raises(ConfigError, match=r"'chars': its vocabulary is that of the data; run python -m"):
        plan.sizes(asked)
    lab.train(tokenizer="chars", steps=1)
    assert 30 < plan.sizes(asked)[0] < 60


def test_the_command_fits_or_refuses(lab, capsys):
    file = lab.file(batch_size=8)
    plan.main([file])
    out = capsys.readouterr().out
    assert "One training step on cpu, 1 rank: micro-batch 8 of 16 tokens" in out and "there is" not in out
    matrices, vectors = 2 * 12 * 32**2 + (256 + 16) * 32, 2 * 13 * 32 + 2 * 32
    decay = [line.split() for line in out.splitlines() if "decay" in line]
    assert decay[0][-2:] == ["weight", "decay"]
    assert decay[1:] == [["decay", f"{matrices:,}", "0.1"], ["no_decay", f"{vectors:,}", "0"]]
    plan.main([file, "--device-memory-gib", "1"])
    out = capsys.readouterr().out
    assert "on cuda" not in out and "micro-batch that would fit" in out
    with pytest.raises(SystemExit, match="^2$"):
        plan.main([lab.file(batch_size=8, memory_limit_gib=0.0003), "--ranks", "1"])
    said = capsys.readouterr().err
    assert said.startswith("error: 1 problem:\n  - out of memory: a step with micro-batches of 8 needs ")
    assert "micro_batch_size = " in said and len(said.splitlines()) == 2


@pytest.mark.slow
def test_billions_of_parameters_are_planned_in_seconds(tmp_path):
    """GPT-2 XL, with no memory to speak of."""
    big = config(
        **(GPT2 | {"layers": 48, "heads": 25, "width": 1600, "micro_batch_size": 8, "batch_size": 8})
    )
    planned = plan.estimate(big, 50257, "cuda", 1)
    assert planned.parameters / 4 == pytest.approx(1.555e9, rel=0.01)
    assert planned.optimizer == pytest.approx(2 * planned.parameters, rel=0.01)
