"""Which way of spreading settings mean, what is refused, and what the ledger reads off a spread model.

The ranks here are pretended: torch's fake process group lets one process build the meshes and shards of many, and
exchanges nothing. That numbers come out right is tested with real processes in tests/distributed.
"""

import contextlib

import pytest
import torch

from engine import parallel, placement, tensor_parallel, world
from engine.config import resolve
from engine.errors import ConfigError
from engine.models.gpt import build

VOCABULARY = 52
# settings, processes → (replicas, shards, tensor), the ledger's words for it, and the share that a rank holds
WAYS = {
    "one": ({}, 1, (1, 1, 1), "one rank", 1.0),
    "fsdp alone": ({"data_parallel": "fsdp"}, 1, (1, 1, 1), "one rank", 1.0),
    "ddp": ({}, 4, (4, 1, 1), "ddp over 4 ranks", 1.0),
    "fsdp": ({"data_parallel": "fsdp"}, 4, (1, 4, 1), "fsdp over 4 ranks", 1 / 4),
    "hsdp": ({"data_parallel": "hsdp"}, 4, (2, 2, 1), "hsdp, 2 replicas of 2 shards", 1 / 2),
    "hsdp of 4": (
        {"data_parallel": "hsdp", "shard_size": 4},
        8,
        (2, 4, 1),
        "hsdp, 2 replicas of 4 shards",
        1 / 4,
    ),
    "tensor": ({"tensor_parallel": 2}, 2, (1, 1, 2), "tensor parallel over 2 ranks", 1 / 2),
    "fsdp and tensor": (
        {"data_parallel": "fsdp", "tensor_parallel": 2},
        4,
        (1, 2, 2),
        "fsdp over 2 ranks × tensor parallel over 2 ranks",
        1 / 4,
    ),
    "hsdp and tensor": (
        {"data_parallel": "hsdp", "tensor_parallel": 2},
        8,
        (2, 2, 2),
        "hsdp, 2 replicas of 2 shards × tensor parallel over 2 ranks",
        1 / 4,
    ),
}


def config(**settings):
    small = {"layers": 2, "heads": 2, "width": 32, "context": 16, "device": "cpu"}
    return resolve({**small, **settings}, "test")


class Met:
    """A preflight of ranks that do not exist: nobody is waited for."""

    def __init__(self, place, *_):
        self.places, self.wall_seconds, self.store = [place], 0.0, None

    def meet(self):
        pass

    def watched(self):
        return contextlib.nullcontext()

    def exchange(self, _):
        pass


@pytest.fixture
def pretend(monkeypatch):
    """Call it with (config, processes, rank) to join a world of so many processes, that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    join = torch.distributed.init_process_group

    def start(c, processes: int, rank: int = 0) -> parallel.Ranks:
        monkeypatch.setattr(
            torch.distributed,
            "init_process_group",
            lambda *_, **__: join("fake", store=FakeStore(), rank=rank, world_size=processes),
        )
        monkeypatch.setattr(parallel.preflight, "Preflight", Met)
        for name, value in {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": 0}.items():
            monkeypatch.setenv(name, str(value))
        return parallel.start(c.parallel, "cpu")

    yield start
    parallel.stop()


def spread(c, ranks):
    torch.manual_seed(0)
    model = build(c.model, VOCABULARY)
    parallel.apply_tensor_parallel(model, ranks)
    return parallel.spread(model, c.parallel, ranks)


@pytest.mark.parametrize("way", WAYS)
def test_the_ledger_reads_off_the_model_what_the_settings_asked_for(pretend, way):
    settings, processes, sizes, words, share = WAYS[way]
    c = config(**settings)
    assert world.sizes(c.parallel, processes) == sizes
    assert world.check(c, processes) == []
    ranks = pretend(c, processes)
    line, *others = placement.lines(spread(c, ranks), c.parallel, ranks)
    assert (line.what, line.requested, line.in_effect, line.agrees) == ("sharding", words, words, True)
    held = float(line.how.split("holds ")[1].split(" %")[0]) / 100
    assert share <= held < share + 0.03  # a little more: tensor parallel replicates norms and positions
    assert [other.what for other in others] == ["shard_unit", "reshard_after_forward"] * (sizes[1] > 1)


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][1] > 1])
def test_a_model_that_was_not_spread_is_found_out(pretend, way, monkeypatch):
    settings, processes, _, words, _ = WAYS[way]
    c = config(**settings)
    ranks = pretend(c, processes)
    monkeypatch.setattr(parallel, "spread", lambda model, *_: model)
    monkeypatch.setattr(parallel, "apply_tensor_parallel", lambda *_: None)
    lines = placement.lines(spread(c, ranks), c.parallel, ranks)
    assert lines[0].requested == words
    assert lines[0].in_effect == f"not spread: {processes} ranks hold it whole"
    assert not any(line.agrees for line in lines)


def test_half_of_what_was_asked_for_is_found_out(pretend, monkeypatch):
    c = config(data_parallel="fsdp", tensor_parallel=2)
    ranks = pretend(c, 4)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "apply_tensor_parallel", lambda *_: None)
        line = placement.lines(spread(c, ranks), c.parallel, ranks)[0]
    assert (line.in_effect, line.agrees) == ("fsdp over 2 ranks", False)
    monkeypatch.setattr(tensor_parallel, "ROWS", ("mlp.out",))
    model = spread(c, ranks)
    monkeypatch.undo()
    line = placement.lines(model, c.parallel, ranks)[0]
    assert not line.agrees
    assert "not split: layers.0.attention.out.weight, layers.1.attention.out.weight" in line.how


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_whether_blocks_are_freed_is_read_from_their_state(pretend, kind, asked):
    c = config(data_parallel=kind, reshard_after_forward=asked)
    ranks = pretend(c, 4)
    model = spread(c, ranks)
    line = placement.lines(model, c.parallel, ranks)[2]
    assert line.in_effect == f"{2 * asked} of 2 blocks freed" and line.requested == str(asked).lower()
    assert line.agrees
    model.layers[0].set_reshard_after_forward(not asked)
    line = placement.lines(model, c.parallel, ranks)[2]
    assert line.in_effect == "1 of 2 blocks freed" and not line.agrees


def test_what_is_gathered_together_is_read_from_the_modules(pretend):
    c = config(data_parallel="fsdp", shard_unit="model")
    ranks = pretend(c, 2)
    model = spread(c, ranks)
    sharding, unit = placement.lines(model, c.parallel, ranks)
    assert sharding.agrees and (unit.in_effect, unit.agrees) == ("model", True)
    assert model.keep_gathered
    by_block = config(data_parallel="fsdp")
    found = placement.lines(spread(by_block, ranks), c.parallel, ranks)[1]
    assert (found.requested, found.in_effect, found.agrees) == ("model", "block", False)


def test_the_whole_model_is_compiled_only_where_it_is_gathered_as_one():
    assert world.check(config(data_parallel="fsdp", shard_unit="model", compile="model"), 2) == []
    (problem,) = world.check(config(data_parallel="fsdp", compile="model"), 2)
    assert "use compile = 'blocks', or shard_unit = 'model'" in problem


def test_ranks_of_a_tensor_parallel_group_read_the_same_samples(pretend):
    c = config(data_parallel="fsdp", tensor_parallel=2)
    found = {}
    for rank in range(4):
        ranks = pretend(c, 4, rank)
        members = torch.distributed.get_process_group_ranks
        found[rank] = (ranks.data_rank, members(ranks.data_group), members(ranks.tensor_group))
        assert ranks.data_size == 2 and ranks.is_first == (rank == 0)
        parallel.stop()
    assert found == {
        0: (0, [0, 2], [0, 1]),
        1: (0, [1, 3], [0, 1]),
        2: (1, [0, 2], [2, 3]),
        3: (1, [1, 3], [2, 3]),
    }


def test_one_rank_is_a_group_of_its_own():
    ranks = parallel.Ranks(0, 1, torch.device("cpu"))
    assert (ranks.data_rank, ranks.data_size, ranks.data_group, ranks.tensor_group) == (0, 1, None, None)
    t = torch.tensor([1.0, 2.0])
    assert parallel.total(t.clone()).tolist() == parallel.gathered(t).tolist() == [1.0, 2.0]
    assert parallel.summed(t, None) is t and parallel.largest(t, None) is t


def test_sums_leave_out_the_ranks_that_read_the_same(pretend, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _t, group=None: seen.append(group))
    for settings, processes, expected in (
        ({"data_parallel": "fsdp", "tensor_parallel": 2}, 4, [0, 2]),
        ({"tensor_parallel": 2}, 2, None),
        ({"data_parallel": "hsdp"}, 4, [0, 1, 2, 3]),
    ):
        pretend(config(**settings), processes)
        parallel.total(torch.zeros(1))
        if expected is None:
            assert seen == []
        else:
            assert torch.distributed.get_process_group_ranks(seen.pop()) == expected
        parallel.stop()


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        (
            {"processes": 3, "batch_size": 24},
            2,
            "processes = 3, but 2 were launched: use torchrun --nproc-per-node 3",
        ),
        ({"tensor_parallel": 3}, 4, "tensor_parallel = 3: must divide the 4 processes of the run"),
        ({"tensor_parallel": 2}, 1, "tensor_parallel = 2: must divide the 1 processes of the run"),
        (
            {"tensor_parallel": 2},
            4,
            "data_parallel = 'ddp' cannot replicate split matrices 2 times; use 'fsdp' or 'hsdp', or "
            "tensor_parallel = 4",
        ),
        ({"data_parallel": "hsdp", "shard_size": 3}, 4, "shard_size = 3: must divide the 4 processes"),
        (
            {"data_parallel": "hsdp", "tensor_parallel": 2},
            4,
            "shard_size = 2: must divide the 2 processes that read different data into at least 2 groups of "
            "shards; one group alone is data_parallel = 'fsdp'",
        ),
        ({"data_parallel": "hsdp"}, 1, "shard_size = 2: must divide the 1 processes"),
    ],
)
def test_a_number_of_processes_that_does_not_fit_is_refused_before_they_meet(
    monkeypatch, settings, processes, message
):
    c = config(**settings)
    assert message in world.check(c, processes)[0]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match="1 problem") as error:
        parallel.start(c.parallel, "cpu")
    assert message in str(error.value) and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 1}, "heads = 1: must be a multiple of tensor_parallel = 2"),
        ({"attention_form": "latent"}, "attention_form = 'latent': not supported with tensor_parallel = 2"),
        ({"dropout": 0.1}, "dropout = 0.1: not supported with tensor_parallel = 2"),
        ({"token_dropout": 0.1}, "token_dropout = 0.1: not supported with tensor_parallel = 2"),
        ({"output_dropout": 0.1}, "output_dropout = 0.1: not supported with tensor_parallel = 2"),
        ({"activation": "swiglu"}, "activation = 'swiglu': its 85 inner features must be a multiple of"),
        (
            {"float8": True, "precision": "bf16", "device": "auto"},
            "float8 = true: not supported with tensor_parallel = 2",
        ),
    ],
)
def test_what_tensor_parallel_cannot_do_is_refused_by_name(settings, message):
    problems = world.check(config(tensor_parallel=2, **settings), 2)
    assert len(problems) == 1 and problems[0].startswith(message)


def test_a_vocabulary_that_does_not_split_is_refused_with_the_way_out(pretend):
    c = config(tensor_parallel=2)
    ranks = pretend(c, 2)
    with pytest.raises(
        ConfigError,
        match="tensor_parallel = 2: must divide the 53 rows of the vocabulary; set pad_vocabulary_to to a "
        "multiple of 2",
    ):
        parallel.apply_tensor_parallel(build(c.model, 53), ranks)
    padded = config(tensor_parallel=2, pad_vocabulary_to=4)
    model = build(padded.model, 53)
    parallel.apply_tensor_parallel(model, ranks)
    assert model.head_weight.to_local().shape == (28, 32)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_a_whole_compiled_model_is_not_sharded(kind):
    problems = world.check(config(data_parallel=kind, compile="model"), 4)
    assert len(problems) == 1 and "compile = 'model': data_parallel" in problems[0]
    assert "use compile = 'blocks'" in problems[0]
    assert world.check(config(data_parallel=kind, compile="blocks"), 4) == []
    assert world.check(config(compile="model"), 4) == []
    assert world.check(config(data_parallel="fsdp", compile="model"), 1) == []  # nothing to gather


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": False},
        {"tie_embeddings": False},
        {"norm_placement": "post"},
        {"positions": "rotary"},
        {"positions": "sinusoidal"},
        {"activation": "swiglu", "bias": False, "width": 48},
    ],
    ids=str,
)
def test_every_parameter_is_split_by_plan_or_replicated_as_dtensor(pretend, settings):
    """Mixed with plain tensors, they would have no common gradient norm."""
    c = config(tensor_parallel=2, **settings)
    ranks = pretend(c, 2)
    model = build(c.model, VOCABULARY)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parallel.apply_tensor_parallel(model, ranks)
    parameters = dict(model.named_parameters())
    assert {name: p.shape for name, p in parameters.items()} == shapes  # as a whole
    cut = {name: p.placements[0].dim for name, p in parameters.items() if p.placements[0].is_shard()}
    by_output = (
        "qkv.weight",
        "qkv.bias",
        "up.weight",
        "up.bias",
        "gate.weight",
        "gate.bias",
        "embedding.weight",
    )
    by_output += ("head.weight",)
    for name in parameters:
        if name.endswith(by_output) and not name.startswith("position"):
            assert cut.pop(name) == 0
        elif name.endswith("out.weight"):
            assert cut.pop(name) == 1
    assert cut == {}
    if c.model.tie_embeddings:
        assert model.head_weight is model.token_embedding.weight


def test_cuda_graphs_and_shards_are_refused_together():
    c = config(data_parallel="fsdp", compile="blocks", compile_mode="reduce-overhead")
    (problem,) = world.check(c, 2)
    assert "compile_mode = 'reduce-overhead': its CUDA graphs would write over gradients" in problem
    assert world.check(c, 1) == []
