"""A race: which peer is the first to have a validation loss, in seconds of training; pure arithmetic on rows.

Evaluations are in no one's seconds. Seconds are given twice: as they were, and with each step that compiles counted
as a median one, because a compiled program is kept.
"""

import statistics

COMPILING = 10  # a step that took this many times the median was spent on compiling


def evaluations(steps_and_losses: list[tuple[int, float]], step_seconds: list[float]) -> list[dict]:
    """Each evaluation, (steps taken, loss), with the seconds of training before it."""
    median = statistics.median(step_seconds)
    steady = [min(seconds, median) if seconds > COMPILING * median else seconds for seconds in step_seconds]
    return [
        {
            "steps": steps,
            "val_loss": loss,
            "train_seconds": sum(steady[:steps]),
            "train_seconds_compiling": sum(step_seconds[:steps]),
        }
        for steps, loss in steps_and_losses
    ]


def outcome(evals: list[dict], target: float) -> dict:
    """What a row says of its evaluations: the best, and the first that reached `target`; None where none did."""
    best = min(evals, key=lambda one: one["val_loss"])
    reached = next((one for one in evals if one["val_loss"] <= target), {})
    return {
        "target_loss": target,
        "best_val_loss": best["val_loss"],
        "best_val_loss_steps": best["steps"],
        "last_val_loss": evals[-1]["val_loss"],
        "steps_to_target": reached.get("steps"),
        "seconds_to_target": reached.get("train_seconds"),
        "seconds_to_target_compiling": reached.get("train_seconds_compiling"),
        "evals": evals,
    }
