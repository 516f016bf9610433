"""What preflight says of ranks and devices, by hand; that processes find each other is in tests/distributed."""

import torch

from engine import preflight
from engine.preflight import Place


def place(rank: int, device: str = "cuda:0", host: str = "a", uuid: str = "", visible: str = "0") -> Place:
    return Place(rank, rank, host, device, "A GPU", 80.0, visible, uuid)


def test_two_ranks_on_one_gpu_of_one_host_are_refused():
    (problem,) = preflight.shared_gpus([place(0), place(1), place(2, "cuda:1"), place(3, host="b")])
    assert problem.startswith(
        "ranks 0, 1 share one GPU of host a: cuda:0 of CUDA_VISIBLE_DEVICES = 0, cuda:0"
    )
    assert "launch one process a GPU, each with its own LOCAL_RANK" in problem


def test_a_gpu_is_known_by_its_own_number_whatever_a_process_calls_it():
    assert preflight.shared_gpus([place(0, uuid="x", visible="3"), place(1, uuid="y", visible="5")]) == []
    (problem,) = preflight.shared_gpus([place(0, uuid="x"), place(1, "cuda:1", uuid="x", visible="1,0")])
    assert problem.startswith(
        "ranks 0, 1 share one GPU of host a: cuda:0 of CUDA_VISIBLE_DEVICES = 0, cuda:1 of"
    )


def test_a_cpu_may_be_shared():
    assert preflight.shared_gpus([place(0, "cpu"), place(1, "cpu")]) == []


def test_a_rank_that_sees_no_gpu_is_named():
    assert preflight.unlike([place(0), place(1, "cuda:1")]) == preflight.unlike([place(0, "cpu")]) == []
    (problem,) = preflight.unlike([place(0), place(1, "cpu"), place(2, "cuda:1")])
    assert problem == (
        "rank 0 on host a, cuda:0 (A GPU), rank 2 on host a, cuda:1 (A GPU); rank 1 on host a, cpu (A GPU): all must "
        "compute on one kind of device; look at CUDA_VISIBLE_DEVICES there, or set device = 'cpu'"
    )


def test_who_is_behind_is_named_first():
    places = [place(rank, f"cuda:{rank}") for rank in range(3)]
    told = preflight.stuck(places, ["exchanging", "joining", "done"], "did not end within 5 s")
    assert told == (
        "the first all-reduce did not end within 5 s. rank 1 on host a, cuda:1 (A GPU): joining the process group; "
        "rank 0 on host a, cuda:0 (A GPU): waiting in the first all-reduce; rank 2 on host a, cuda:2 (A GPU): done "
        "with it"
    )
    told = preflight.stuck(places, ["exchanging"] * 3, "failed after 0.2 s")
    assert told.endswith(
        "waiting in the first all-reduce; all are there, so look at the network between them"
    )


def test_the_map_that_is_kept_numbers_hosts_and_names_none():
    places = [place(0, host="left"), place(1, "cuda:1", host="left"), place(2, host="right")]
    kept = preflight.device_map(places)
    assert [(one["rank"], one["host"], one["device"]) for one in kept] == [
        (0, 0, "cuda:0"),
        (1, 0, "cuda:1"),
        (2, 1, "cuda:0"),
    ]
    assert (
        "left" not in str(kept) and not {"uuid", "visible"} & set(kept[0]) and kept[0]["memory_gib"] == 80.0
    )


def test_a_process_on_a_cpu_tells_its_processor():
    found = preflight.here(3, 1, torch.device("cpu"))
    assert (found.rank, found.local_rank, found.device, found.memory_gib) == (3, 1, "cpu", None)
    assert found.name and found.host
