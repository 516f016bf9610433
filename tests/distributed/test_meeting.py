"""Processes that do not meet, or do not answer, are named by the others; those that do are in the devices' map."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import Lab, read_json

pytestmark = pytest.mark.slow

HANGING = Path(__file__).with_name("hanging.py")
# Seconds; long for two processes that are there. torch's store asks for the name of its own address when it connects,
# and may wait five seconds for an answer.
WAIT = 8.0


@pytest.fixture
def node(tmp_path) -> Lab:
    return Lab(tmp_path)


def alone(node: Lab, rank: int, world_size: int, port: int, **settings) -> subprocess.CompletedProcess:
    """One process of several, started by hand."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return node.start("-m", "engine.train", node.file(**settings), **environment)


def test_ranks_that_do_not_come_are_named_and_so_is_who_is_there(node):
    done = alone(node, 0, 4, 0, preflight_seconds=0.5, batch_size=8)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert "error: ranks 1, 2, 3 of 4 did not come within 0.5 s; there: rank 0 on host " in done.stderr
    assert ", cpu (" in done.stderr and not (node.directory / "results").exists()


def test_a_first_rank_that_does_not_come_is_named(node):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        port = nobody_listens.getsockname()[1]
        done = alone(node, 1, 2, port, preflight_seconds=0.5)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    place = f"rank 1 did not reach the meeting place 127.0.0.1:{port}, which rank 0 of 2 keeps, within 0.5 s"
    assert place in done.stderr


def test_processes_by_hand_without_a_place_to_meet_are_refused(node):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    done = node.start("-m", "engine.train", node.file(), **place)
    assert done.returncode == 2
    assert "WORLD_SIZE = 2, but no MASTER_ADDR and no MASTER_PORT: start it with torchrun" in done.stderr


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("exchange", "joining the process group; rank 0 on host "),
        ("watched", "came no further than the meeting; rank 0 on host "),
    ],
)
def test_a_rank_that_hangs_before_the_all_reduce_is_named(node, where, words):
    done = node.start(str(HANGING), where, node.file(preflight_seconds=WAIT), processes=2)
    assert done.returncode == 1  # torchrun's own
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told, done.stderr
    for line in told:
        assert (
            f"the first all-reduce did not end within {WAIT:g} s. rank 1 on host " in line and words in line
        )
    assert not (node.directory / "results").exists()


def test_the_map_says_which_rank_is_on_which_device(node):
    done = node.start("-m", "engine.train", node.file(steps=1), processes=2)
    assert done.returncode == 0, done.stderr
    [line] = [x for x in map(json.loads, done.stdout.splitlines()) if x["event"] == "devices"]
    assert [(r["rank"], r["local_rank"], r["device"]) for r in line["ranks"]] == [
        (0, 0, "cpu"),
        (1, 1, "cpu"),
    ]
    assert line["ranks"][0]["host"] == socket.gethostname() and 0 < line["preflight_seconds"] < 60
    kept = read_json(node.directory / "results/by_hand/run-1/env.json")["devices"]
    assert [(r["rank"], r["host"], r["device"]) for r in kept] == [(0, 0, "cpu"), (1, 0, "cpu")]
    assert kept[0]["name"] == line["ranks"][0]["name"] and socket.gethostname() not in json.dumps(kept)


def test_one_process_needs_none_of_it(node):
    """It imports no more for it, and prints nothing of it."""
    code = (
        "import sys, runpy, engine.parallel as p\n"
        "p.preflight.Preflight = p.preflight.tell.__globals__['progress_line'] = None\n"
        "sys.argv = ['train', 'run.toml']\n"
        "from engine.config import load\n"
        "from engine.launch import tokens_for\n"
        "from engine.trainer import run\n"
        "config = load('run.toml')\n"
        "run(config, tokens_for(config))\n"
    )
    node.file(steps=1)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=node.directory,
        env=node.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "devices" not in done.stdout
    assert [r["device"] for r in read_json(node.directory / "results/by_hand/run-1/env.json")["devices"]] == [
        "cpu"
    ]
