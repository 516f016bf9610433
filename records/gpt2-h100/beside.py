"""The rows here beside those of gpt2-h200: from the repository's root,

PYTHONPATH=. python records/gpt2-h100/beside.py > records/gpt2-h100/beside.txt
"""

from pathlib import Path
from statistics import mean

from metrics import rows, summary, words

RECORDS = Path(__file__).resolve().parents[1]
RULE = " " + "─" * 101
EARLIER, HERE = "H200", "H100"


def means(done: dict, run: str, seeds: list[int]) -> dict[str, str]:
    """What the tables show of a run over these seeds, those that are compared beside the baseline's same seeds."""
    if not seeds:
        return dict.fromkeys(("loss", "above", "step", "ratio", "peak"), "–")
    own, base = ([done[name, seed] for seed in seeds] for name in (run, "adamw"))
    loss, base_loss = ([one.test["test_loss"] for one in ones] for ones in (own, base))
    step, base_step = ([1000 * one.metrics["step_seconds_median"] for one in ones] for ones in (own, base))
    return {
        "loss": f"{mean(loss):.3f}",
        "above": f"{mean(loss) - mean(base_loss):+.3f}",
        "step": f"{mean(step):.1f}",
        "ratio": f"{mean(a / b for a, b in zip(step, base_step, strict=True)):.2f}",
        "peak": f"{mean(one.metrics['peak_memory_gib'] for one in own):.2f}",
    }


def tables() -> str:
    """Losses and costs of every run here, and of the same seeds there."""
    study, before = (
        summary.summarize(rows.read(RECORDS / f"gpt2-{x}" / "results")) for x in ("h100", "h200")
    )
    new, old = ({(one.run, one.seed): one for one in x.results.runs if one.metrics} for x in (study, before))
    losses, costs = [], []
    for run in study.complete:
        name, seeds = run.run, list(run.complete_seeds)
        both = [seed for seed in seeds if (name, seed) in old]
        a, b = means(old, name, both), means(new, name, seeds)
        apart = [abs(new[name, seed].test["test_loss"] - old[name, seed].test["test_loss"]) for seed in both]
        far = f"{max(apart):.3f}" if apart else "–"
        told = words.difference(run.comparison.estimate, study.metric) if run.comparison else b["above"]
        start = f" {name:23} {len(seeds):5}   "
        losses.append(
            f"{start}{a['loss']:>6} {b['loss']:>6} {far:>9}   {a['above']:>6} {told:>17}   {run.status}"
        )
        costs.append(start + "   ".join(f"{a[x]:>6} {b[x]:>6}" for x in ("step", "ratio", "peak")))
    pair = f"   {EARLIER:>6} {HERE:>6}"
    return "\n".join(
        (
            f"Each run on {HERE}s, and the same seeds of it on {EARLIER}s by an earlier engine; furthest: the",
            "largest distance between one seed's two losses; differences to adamw of the same seeds",
            "",
            f"{'':31}     test loss                      difference",
            f" run                     seeds{pair}  furthest   {EARLIER:>6} {HERE:>17}   verdict ({HERE})",
            "\n".join([RULE, *losses]),
            "",
            f"{'':31}     step (ms)        to adamw's       peak (GiB)",
            f" run                     seeds{pair * 3}",
            "\n".join([RULE, *costs]),
        )
    )


if __name__ == "__main__":
    print(tables())
