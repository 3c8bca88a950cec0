"""The plan of a timed run, from numbers alone."""

from __future__ import annotations

import pytest

from perceiver_cli.config import TrainConfig
from perceiver_cli.training.timing import TIMED_STEPS, Progress, Timing, steps_after_resume


def simulated(limit_s: float, step_s: float, evaluation_s: float, start: Progress) -> list[Progress]:
    """Return where each step leaves a run whose steps and evaluations always take the same time."""
    timing = Timing(TrainConfig(max_time_s=limit_s, batch_size=10), 7, 300, start)
    places, at, evaluations = [], start, 0
    while not timing.over(at):
        at = Progress(at.step + 1, at.total_steps, at.elapsed_s + step_s)
        at = at._replace(total_steps=timing.stepped(at))
        places.append(at)
        if timing.evaluation_due(at):
            at = at._replace(elapsed_s=at.elapsed_s + evaluation_s)
            timing.evaluated(at.elapsed_s)
            evaluations += 1
    assert 9 <= evaluations <= 11 or start.elapsed_s
    return places


def test_a_time_limit_becomes_a_number_of_steps_that_fits() -> None:
    places = simulated(100, 0.1, 1.0, Progress(0, 50, 0.0))
    assert places[TIMED_STEPS - 2].total_steps == 50  # nothing is measured yet
    # A forward is taken for a third of a step: (98 - 0.5 - 10 x 10 x 0.1) / 0.1 and the step itself.
    assert places[TIMED_STEPS - 1].total_steps == pytest.approx(5 + 875, abs=2)
    assert places[-1].total_steps == places[-1].step == pytest.approx(880, abs=10)  # evaluations took 10 s
    assert 95 < places[-1].elapsed_s < 99


def test_a_resumed_run_has_what_time_is_left() -> None:
    places = simulated(100, 0.1, 1.0, Progress(500, 880, 60.0))
    assert places[-1].step == pytest.approx(500 + 340, abs=15)
    assert places[-1].elapsed_s < 99
    # Without any time left it does one step, so that there is something to save.
    assert [place.step for place in simulated(100, 0.1, 1.0, Progress(500, 880, 120.0))] == [501]


def test_an_ended_run_goes_on_with_more_time_only() -> None:
    ended = Progress(880, 880, 98.0)
    assert steps_after_resume(ended, 100, 100) == steps_after_resume(ended, 50, 100) == 880
    assert steps_after_resume(ended, 200, 100) == 1795
    assert steps_after_resume(ended, 200, None) == 1795  # it had a number of steps
    assert steps_after_resume(Progress(880, 880, 300.0), 200, 100) == 881  # it took longer than it had
    assert steps_after_resume(Progress(2, 3, 101.0), 100, 100) == 2  # its last evaluation took longer than planned
    assert steps_after_resume(Progress(2, 3, 101.0), 303, 100) == 6
    assert steps_after_resume(Progress(500, 880, 60.0), 200, 100) == 880  # killed: the first steps change the plan


def test_without_a_limit_the_plan_stays_and_durations_decide() -> None:
    config = TrainConfig(eval_every="1 epoch", save_every="2 steps")
    timing = Timing(config, 3, 300, Progress(0, 8, 0.0))
    due = []
    for step in range(1, 9):
        at = Progress(step, 8, 1000.0 * step)
        assert timing.stepped(at) == 8
        due.append((timing.evaluation_due(at), timing.save_due(at), timing.over(at)))
    assert [index + 1 for index, (evaluate, _, _) in enumerate(due) if evaluate] == [3, 6, 8]  # and at the end
    assert [index + 1 for index, (_, save, _) in enumerate(due) if save] == [2, 4, 6, 8]
    assert [over for _, _, over in due] == [False] * 7 + [True]
