"""The scripts for SLURM: bash takes them, and they ask for what the plan says. sbatch is a stand-in with notes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import REPOSITORY, toml

from engine.rundir import write_json

RUNS = {"one": {}, "two": {"processes": 2}, "eight": {"processes": 8}, "cpu": {"device": "cpu"}}
SBATCH = """#!/bin/bash
echo "$@" >> sbatch.log
wc -l < sbatch.log
"""


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """A directory with a planned study of two seeds, and a stand-in sbatch on the path."""
    configs = tmp_path / "results/scaling/configs"
    configs.mkdir(parents=True)
    write_json(configs / "study.json", {"study": "scaling", "baseline": "one", "seeds": [1, 2], "runs": RUNS})
    for run, own in RUNS.items():
        for seed in (1, 2):
            text = toml(study="scaling", run=run, seed=seed, **own)
            (configs / f"{run}-{seed}.toml").write_text(text, encoding="utf-8")
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH, encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def slurm(*arguments: str, gpus: int = 4, time: str = "02:00:00") -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "stages.slurm",
        "results/scaling",
        "--gpus-per-node",
        str(gpus),
        "--time",
        time,
    ]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def script(name: str) -> list[str]:
    return Path(f"slurm/scaling/{name}.sh").read_text(encoding="utf-8").splitlines()


def test_bash_takes_every_script(lab):
    done = slurm("--partition", "gpu", "--setup", "module load cuda", "--setup", ". .venv/bin/activate")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote 10 scripts; send them off with: bash slurm/scaling/submit.sh\n"
    scripts = sorted(Path("slurm/scaling").glob("*.sh"))
    assert len(scripts) == 4 * 2 + 2
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
    two = script("two-1")
    assert two[0] == "#!/bin/bash" and "#SBATCH --partition=gpu" in two
    assert two.index("module load cuda || exit 1") < two.index(". .venv/bin/activate || exit 1")


def test_a_run_is_given_what_it_needs_and_no_more(lab):
    assert slurm().returncode == 0
    two = script("two-2")
    for line in (
        "#SBATCH --job-name=scaling-two-2",
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --time=02:00:00",
        "#SBATCH --output=slurm/scaling/two-2_%j.out",
        "#SBATCH --error=slurm/scaling/two-2_%j.err",
        "export OMP_NUM_THREADS=2",
        "torchrun --standalone --nproc-per-node 2 -m engine.train results/scaling/configs/two-2.toml || status=$?",
        'echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"',
        'echo "$(date -Is) elapsed $SECONDS s, status $status"',
    ):
        assert line in two, line
    assert any("torch.cuda.get_device_name" in line for line in two)
    assert "python -m engine.train results/scaling/configs/one-1.toml || status=$?" in script("one-1")
    assert "#SBATCH --gpus-per-node=1" in script("one-1")
    assert not any("gpus-per-node" in line or "partition" in line for line in script("cpu-1"))


def test_more_processes_than_a_node_has_gpus_take_several_nodes(lab):
    assert slurm().returncode == 0
    eight = script("eight-1")
    assert "#SBATCH --nodes=2" in eight and "#SBATCH --gpus-per-node=4" in eight
    assert 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in eight
    command = (
        "srun torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint "
        "$head:29400 -m engine.train results/scaling/configs/eight-1.toml || status=$?"
    )
    assert command in eight


def test_the_baseline_is_submitted_first_and_the_rest_when_it_is_complete(lab):
    assert slurm().returncode == 0
    (lab / "tokens/scaling").mkdir(parents=True)
    done = subprocess.run(["bash", "slurm/scaling/submit.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, after = "slurm/scaling", "--parsable --dependency=afterok:1:2 slurm/scaling"
    assert Path("sbatch.log").read_text(encoding="utf-8").splitlines() == [
        f"--parsable {first}/one-1.sh",
        f"--parsable {first}/one-2.sh",
        *(f"{after}/{run}-{seed}.sh" for run in ("two", "eight", "cpu") for seed in (1, 2)),
        "--parsable --dependency=afterok:1:2:3:4:5:6:7:8 slurm/scaling/summarize.sh",
    ]
    assert done.stdout.splitlines()[0] == "submitted 1,2,3,4,5,6,7,8,9"
    assert "sacct --jobs 1,2,3,4,5,6,7,8,9 --format JobID" in done.stdout
    last = script("summarize")
    assert "#SBATCH --gpus-per-node=1" in last  # runs that were not told to stay on a CPU are scored on a GPU
    assert "python -m stages.eval results/scaling/two-1 results/scaling/test/two-1.json || status=$?" in last
    assert "python -m stages.summarize results/scaling reports/scaling || status=$?" in last


def test_nothing_is_submitted_without_tokens(lab):
    assert slurm().returncode == 0
    done = subprocess.run(["bash", "slurm/scaling/submit.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not Path("sbatch.log").exists()
    assert (
        "error: no tokens/scaling; make it first: python -m stages.tokenize results/scaling/con"
        in done.stderr
    )


@pytest.mark.parametrize(("says", "status"), [('{"event": "diverged", "step": 3}', 0), ("Traceback", 3)])
def test_a_run_that_diverged_does_not_hold_up_the_others_and_one_that_failed_does(lab, says, status):
    assert slurm().returncode == 0
    python = lab / "bin/python"
    python.write_text('#!/bin/bash\n[ "$2" = engine.train ] && exit 3 || exit 0\n', encoding="utf-8")
    python.chmod(0o755)
    Path("slurm/scaling/one-1_77.out").write_text(says, encoding="utf-8")
    environment = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "a"}
    done = subprocess.run(
        ["bash", "slurm/scaling/one-1.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert f"s, status {status}" in done.stdout.splitlines()[-1]


def test_mistakes_are_named(lab):
    done = slurm(gpus=0, time="two hours")
    assert done.returncode == 2 and not Path("slurm").exists()
    assert "--time = 'two hours': must be minutes, MM:SS, HH:MM:SS or D-HH:MM:SS" in done.stderr
    assert "--gpus-per-node = 0: must be a whole number ≥ 1" in done.stderr
    done = slurm(gpus=3)
    assert done.returncode == 2
    assert "eight-1:\n  - processes = 8: does not divide over 3 nodes of at most 3 GPUs; use a" in done.stderr
    Path("results/scaling/configs/study.json").unlink()
    done = slurm()
    assert done.returncode == 2 and "no study.json; plan it first: python -m stages.plan" in done.stderr


def test_a_run_whose_checklist_fails_is_not_trained(lab):
    assert slurm().returncode == 0
    text = Path("slurm/scaling/one-1.sh").read_text(encoding="utf-8")
    check = "python -m stages.checklist results/scaling/configs/one-1.toml || exit 2\n"
    assert check in text and text.index(check) < text.index("engine.train")
