"""SLURM: a planned study → one sbatch script a run and seed, and submit.sh, which sends them off in order.

    python -m stages.slurm results/<study> --gpus-per-node 4 --time 02:00:00 [--setup "module load cuda"]

Writes slurm/<study>/. `bash slurm/<study>/submit.sh` submits the baseline first, the other runs once it is complete,
and after all of them one job that scores and summarizes. This command itself submits nothing.
"""

import argparse
import json
import re
import shlex
from pathlib import Path

from engine.config import Config, load
from engine.errors import ConfigError, command

TIME = r"(\d+-)?\d+(:\d\d){0,2}"  # of sbatch: minutes, MM:SS, HH:MM:SS, D-HH …
HOME = "slurm"
MEETING_PORT = 29400
SANITY = (
    'python -c "import sys, torch; n = torch.cuda.device_count(); print(sys.executable, torch.__version__, '
    "torch.version.cuda, [(torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory >> 30) "
    'for i in range(n)])"'
)


def planned(directory: Path) -> tuple[str, list[str], dict[str, Config]]:
    """(study, names of the baseline's runs, every planned run by its name `<run>-<seed>`), the baseline's first.

    Raises ConfigError where the study has not been planned.
    """
    configs = directory / "configs"
    try:
        study = json.loads((configs / "study.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no study.json; plan it first: python -m stages.plan", str(configs)) from None
    order = [study["baseline"], *(run for run in study["runs"] if run != study["baseline"])]
    names = [f"{run}-{seed}" for run in order for seed in study["seeds"]]
    runs = {name: load(configs / f"{name}.toml") for name in names}
    return study["study"], names[: len(study["seeds"])], runs


def nodes(config: Config, gpus_per_node: int) -> tuple[int, int]:
    """(machines, processes on each) of a run. Raises ConfigError where they do not come out even."""
    processes = config.parallel.processes or 1
    machines = -(-processes // gpus_per_node)
    if processes % machines:
        raise ConfigError(
            f"processes = {processes}: does not divide over {machines} nodes of at most {gpus_per_node} GPUs; use a "
            f"multiple of {gpus_per_node}",
            f"{config.run.run}-{config.run.seed}",
        )
    return machines, processes // machines


def launch(config: Config, machines: int, each: int) -> str:
    """The command that trains a planned run."""
    name = f"{config.run.run}-{config.run.seed}"
    train = f"-m engine.train results/{config.run.study}/configs/{name}.toml"
    if machines * each == 1:
        return f"python {train}"
    if machines == 1:
        return f"torchrun --standalone --nproc-per-node {each} {train}"
    meeting = f"--rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $head:{MEETING_PORT}"
    return f"srun torchrun --nnodes {machines} --nproc-per-node {each} {meeting} {train}"


def script(name: str, study: str, body: list[str], asked, *, machines: int = 1, gpus: int = 0) -> str:
    """An sbatch script that does `body`; `asked`: the command's arguments, gpus: on each machine."""
    options = {
        "job-name": f"{study}-{name}",
        "nodes": machines,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus,
        "cpus-per-task": asked.cpus_per_task,
        "time": asked.time,
        "partition": asked.partition,
        "account": asked.account,
        "output": f"{HOME}/{study}/{name}_%j.out",
        "error": f"{HOME}/{study}/{name}_%j.err",
    }
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={value}" for key, value in options.items() if value),
        *(f"{line} || exit 1" for line in asked.setup),
        "set -uo pipefail",
        'echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"',
        "status=0",
        *body,
        'echo "$(date -Is) elapsed $SECONDS s, status $status"',
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def training(config: Config, asked) -> str:
    """The script of one planned run."""
    name, study = f"{config.run.run}-{config.run.seed}", config.run.study
    machines, each = nodes(config, asked.gpus_per_node)
    body = [
        f"export OMP_NUM_THREADS={max(1, asked.cpus_per_task // each)}",
        SANITY,
        *(['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'] if machines > 1 else []),
        f"python -m stages.checklist results/{study}/configs/{name}.toml || exit 2",
        f"{launch(config, machines, each)} || status=$?",
        "# A run that diverged is a result: the others go on.",
        f'if grep -qs \'"event": "diverged"\' {HOME}/{study}/{name}_"$SLURM_JOB_ID".out; then status=0; fi',
    ]
    gpus = 0 if config.run.device == "cpu" else each
    return script(name, study, body, asked, machines=machines, gpus=gpus)


def summary_work(study: str, names: list[str]) -> list[str]:
    """Score every run on the test split, then make the tables."""
    results = f"results/{study}"
    scored = [f"python -m stages.eval {results}/{name} {results}/test/{name}.json" for name in names]
    return [
        f"{one} || status=$?" for one in [*scored, f"python -m stages.summarize {results} reports/{study}"]
    ]


def submit(study: str, first: list[str], names: list[str]) -> str:
    """submit.sh: the baseline's runs, then the others, then the summary."""
    tokens = f"tokens/{study}"
    tokenize = f"python -m stages.tokenize results/{study}/configs/data.toml {tokens}"
    jobs = {name: f"job_{i}" for i, name in enumerate(names)}

    def after(done: list[str]) -> str:
        return "--dependency=afterok:" + ":".join(f"${jobs[name]}" for name in done) + " "

    def send(name: str, done: list[str]) -> str:
        return f"$(sbatch --parsable {after(done) if done else ''}{HOME}/{study}/{name}.sh)"

    lines = [
        "#!/bin/bash",
        "# The baseline first; the others once it is complete; scores and tables once all are.",
        "set -euo pipefail",
        'cd "$(dirname "$0")/../.."',
        f"if [ ! -d {tokens} ]; then",
        f'  echo "error: no {tokens}; make it first: {tokenize}" >&2',
        "  exit 2",
        "fi",
        *(f"{jobs[name]}={send(name, [] if name in first else first)}" for name in names),
        f"last={send('summarize', names)}",
        f'ids="{",".join(f"${job}" for job in jobs.values())},$last"',
        'echo "submitted $ids"',
        'echo "watch:  squeue --jobs $ids"',
        'echo "ended:  sacct --jobs $ids --format JobID,JobName%30,State,ExitCode,Elapsed"',
    ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="results/<study>, once the study has been planned")
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--time", required=True, help="limit of one job, as sbatch has it: 02:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--cpus-per-task", type=int, default=4)
    parser.add_argument("--setup", action="append", default=[], help="a line to run first; may be repeated")
    asked = parser.parse_args()
    problems = []
    if not re.fullmatch(TIME, asked.time):
        problems.append(
            f"--time = {asked.time!r}: must be minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, as sbatch has it"
        )
    problems += [
        f"{option} = {value}: must be a whole number ≥ 1"
        for option, value in (
            ("--gpus-per-node", asked.gpus_per_node),
            ("--cpus-per-task", asked.cpus_per_task),
        )
        if value < 1
    ]
    if problems:
        raise ConfigError(problems)
    return asked


@command
def main() -> None:
    asked = arguments()
    study, first, runs = planned(asked.directory)
    scripts = {name: training(config, asked) for name, config in runs.items()}
    scored_on_gpu = any(config.run.device != "cpu" for config in runs.values())
    scripts["summarize"] = script(
        "summarize", study, summary_work(study, list(runs)), asked, gpus=int(scored_on_gpu)
    )
    scripts["submit"] = submit(study, first, list(runs))
    home = Path(HOME) / study
    home.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (home / f"{name}.sh").write_text(text, encoding="utf-8")
    print(f"wrote {len(scripts)} scripts; send them off with: bash {shlex.quote(str(home / 'submit.sh'))}")


if __name__ == "__main__":
    main()
