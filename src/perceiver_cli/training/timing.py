"""When a run evaluates, saves and ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from perceiver_cli.config import duration_steps

if TYPE_CHECKING:
    from perceiver_cli.training.loop import Run

TIMED_STEPS = 5  # steps whose rate the first plan of a timed run rests on
TIMED_EVALUATIONS = 10  # of a timed run, at equal intervals
SAFETY = 0.02  # share of a time budget left free for what the plan cannot see


class Timing:
    """When a run evaluates, saves and ends.

    With a time limit the total number of steps is planned again after every step, from the measured rate and with
    room for the last evaluation, so that the learning rate schedule ends with the time.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config.train
        self.limit = self.config.max_time_s
        self.began = time.monotonic()
        self.first = run.step
        self.spent_evaluating = 0.0
        self.evaluations = 0
        self.mark = self.began  # end of the last step or evaluation
        self.next_evaluation_s = run.elapsed
        self._next_by_clock()

    def _next_by_clock(self) -> None:
        if self.limit is not None:
            self.next_evaluation_s = self.run.elapsed + self.limit / TIMED_EVALUATIONS

    def over(self) -> bool:
        """Return whether the plan is fulfilled."""
        late = self.limit is not None and self.run.elapsed >= self.limit
        return self.run.step >= self.run.total_steps or (late and self.run.step > self.first)

    def stepped(self) -> None:
        """Take note of a finished step and, in a timed run, plan the rest."""
        self.mark = time.monotonic()
        if self.limit is None:
            return
        run, done = self.run, self.run.step - self.first
        if done < TIMED_STEPS and run.elapsed < self.limit:
            run.total_steps = max(run.total_steps, run.step + 1)
            return
        per_step = (self.mark - self.began - self.spent_evaluating) / done
        per_evaluation = self.spent_evaluating / self.evaluations if self.evaluations else self._guess(per_step)
        left = self.limit * (1 - SAFETY) - run.elapsed
        coming = max(1, round(TIMED_EVALUATIONS * left / self.limit))
        # From here on the number can only be a real plan: at least this step, at most what the time allows.
        run.total_steps = run.step + max(0, int((left - coming * per_evaluation) / per_step))

    def _guess(self, per_step: float) -> float:
        """Seconds of an evaluation not yet seen: a forward is about a third of a step."""
        train = self.config
        return per_step * len(self.run.plan.val_examples) / (3 * train.batch_size * train.accumulate)

    def evaluation_due(self) -> bool:
        """Return whether to evaluate after the step just done."""
        run = self.run
        if self.over():
            return True
        if self.limit is not None:
            return run.elapsed >= self.next_evaluation_s
        every = duration_steps(self.config.eval_every, run.total_steps, run.plan.steps_per_epoch)
        return run.step % max(1, every) == 0

    def evaluated(self) -> None:
        """Take note of a finished evaluation."""
        now = time.monotonic()
        self.spent_evaluating += now - self.mark
        self.evaluations += 1
        self.mark = now
        self._next_by_clock()

    def save_due(self) -> bool:
        """Return whether to save between evaluations."""
        every = duration_steps(self.config.save_every, self.run.total_steps, self.run.plan.steps_per_epoch)
        return self.run.step % max(1, every) == 0
