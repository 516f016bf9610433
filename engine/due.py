"""What is due after which steps of a run: progress, an evaluation, a checkpoint. Steps are counted from 0."""

from engine.config import Config


class Due:
    """Of one run. Progress and an evaluation come after the last step too, whatever their intervals."""

    def __init__(self, config: Config):
        self._steps = config.training.steps
        self._progress = config.logging.log_interval
        self._evaluation = config.evaluation.eval_interval
        self._checkpoint = config.saving.checkpoint_interval  # 0: none

    def progress(self, step: int) -> bool:
        return (step + 1) % self._progress == 0 or self.is_last(step)

    def evaluation(self, step: int) -> bool:
        return (step + 1) % self._evaluation == 0 or self.is_last(step)

    def checkpoint(self, step: int) -> bool:
        """Never after the last step: a run resumed there would have no step left to measure."""
        return bool(self._checkpoint) and (step + 1) % self._checkpoint == 0 and step + 1 < self._steps

    def is_last(self, step: int) -> bool:
        return step + 1 == self._steps
