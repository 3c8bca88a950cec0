"""When a run evaluates, saves and ends, computed from step numbers and seconds. No clock is read here."""

from __future__ import annotations

from typing import NamedTuple

from perceiver_cli.config import TrainConfig, duration_steps

TIMED_STEPS = 5  # steps measured before the first plan of a timed run
TOLD_STEPS = 20  # steps before the planned number is shown: the first ones are slow
TIMED_EVALUATIONS = 10  # evaluations of a timed run, at equal intervals
SAFETY = 0.02  # share of the time limit kept free
STEPS_PER_FORWARD = 1 / 3  # time of a forward, in steps, until an evaluation has been measured


class Progress(NamedTuple):
    """The position of a run. elapsed_s: seconds of training, including those before a resume."""

    step: int
    total_steps: int
    elapsed_s: float


def steps_after_resume(saved: Progress, limit_s: float, limit_before_s: float | None) -> int:
    """Return the planned steps of a resumed run with a time limit: as saved, or more if an ended run got more time.

    The first steps after the resume are measured, and change this plan.
    """
    # The last evaluation may have taken what was left for more steps.
    late = limit_before_s is not None and saved.elapsed_s >= limit_before_s
    if saved.step < saved.total_steps and not late:
        return saved.total_steps
    if limit_s <= (limit_before_s or 0):
        return saved.step
    return max(saved.step + 1, int(saved.step * limit_s / max(saved.elapsed_s, 1e-9)))


class Timing:
    """Decides when a run evaluates, saves and ends.

    With a time limit the total number of steps is planned anew after every step, from the measured rate and with time
    for the last evaluation, so that the learning rate schedule ends with the time.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int, num_val_examples: int, start: Progress) -> None:
        self.config, self.steps_per_epoch, self.start = config, steps_per_epoch, start
        self.limit_s = config.max_time_s
        self.steps_per_evaluation = STEPS_PER_FORWARD * num_val_examples / config.examples_per_step
        self.evaluating_s, self.evaluations = 0.0, 0
        self.mark_s = start.elapsed_s  # end of the last step or evaluation
        self.evaluated_s = start.elapsed_s  # end of the last evaluation

    def over(self, at: Progress) -> bool:
        """Return whether the run has reached its end."""
        late = self.limit_s is not None and at.elapsed_s >= self.limit_s
        return at.step >= at.total_steps or (late and at.step > self.start.step)

    def stepped(self, at: Progress) -> int:
        """Record a finished step; return the planned number of steps, which a time limit changes."""
        self.mark_s = at.elapsed_s
        if self.limit_s is None:
            return at.total_steps
        done = at.step - self.start.step
        if done < TIMED_STEPS and at.elapsed_s < self.limit_s:
            return max(at.total_steps, at.step + 1)
        step_s = (at.elapsed_s - self.start.elapsed_s - self.evaluating_s) / done
        evaluation_s = self.evaluating_s / self.evaluations if self.evaluations else step_s * self.steps_per_evaluation
        left_s = self.limit_s * (1 - SAFETY) - at.elapsed_s
        coming = max(1, round(TIMED_EVALUATIONS * left_s / self.limit_s))
        return at.step + max(0, int((left_s - coming * evaluation_s) / step_s))

    def planned_first(self, step: int) -> bool:
        """Return whether the last step gave the first plan that is worth showing, of a run with a time limit."""
        return self.limit_s is not None and step - self.start.step == TOLD_STEPS

    def evaluation_due(self, at: Progress) -> bool:
        """Return whether to evaluate after the last step."""
        if self.over(at):
            return True
        if self.limit_s is not None:
            return at.elapsed_s >= self.evaluated_s + self.limit_s / TIMED_EVALUATIONS
        return self._falls_on(self.config.eval_every, at)

    def evaluated(self, elapsed_s: float) -> None:
        """Record the end of an evaluation."""
        self.evaluating_s += elapsed_s - self.mark_s
        self.evaluations += 1
        self.mark_s = self.evaluated_s = elapsed_s

    def save_due(self, at: Progress) -> bool:
        """Return whether to save between evaluations."""
        return self._falls_on(self.config.save_every, at)

    def _falls_on(self, every: str, at: Progress) -> bool:
        """Return whether the last step is a multiple of a duration, for example "2 epochs"."""
        return at.step % max(1, duration_steps(every, at.total_steps, self.steps_per_epoch)) == 0
