"""Progress of several runs in one folder, and what `train --seeds` and `train --folds` print."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_cli.cli.plan import done_of, say_start, step_facts
from perceiver_cli.cli.progress import PLAIN_EVERY_S
from perceiver_cli.cli.terminal import bar, clock, emit, end_by_signal, on_first_signal, say, say_lines, say_notes
from perceiver_cli.errors import UsageError, counted
from perceiver_cli.files import perceiver_command, show_path
from perceiver_cli.run_folder import MODEL_FILE, PREDICTIONS_FILE, RUNS_FILE, make_next_run
from perceiver_cli.training.events import Event, Finished, Loaded, Note, Started, StepDone

if TYPE_CHECKING:
    from perceiver_cli.training.several import Began, Ended, Request, RunEntry, Several


def is_several(folder: Path | None) -> bool:
    """Return whether a folder holds several runs."""
    return folder is not None and (folder / RUNS_FILE).exists()


def folder_for(kind: str, output: Path | None, *, replace: bool) -> Path:
    """Return the folder of new runs: the named one, or the next in runs/. Raises UsageError if it holds something."""
    if output is None:
        return make_next_run(kind)
    if (output / RUNS_FILE).exists() or (output / MODEL_FILE).exists():
        if not replace:
            ways = "pass --resume to go on with them, or --replace" if is_several(output) else "pass another -o"
            raise UsageError(f"{show_path(output)}: already holds {'runs' if is_several(output) else 'a run'}", ways)
        for name in (RUNS_FILE, MODEL_FILE):
            (output / name).unlink(missing_ok=True)
    return output


def train_several(request: "Request", folder: Path) -> None:
    """Train the runs of seeds or folds; the last line on stdout is the path of their ensemble."""
    from perceiver_cli.training.several import Several

    several = Several(folder, request, latest=True)
    follow(several, ["perceiver", "train", "--resume", "-o", os.fspath(folder)])
    say_lines(summary_of(several))
    compare, evaluate = ["compare", os.fspath(folder)], ["evaluate", request.data, "-m", os.fspath(folder)]
    say(f"the ensemble of {len(several.members)} answers with the mean of their probabilities; next:")
    for words in (compare, evaluate):
        say(f"  {perceiver_command(['perceiver', *words])}")
    emit(f"{folder / MODEL_FILE}\n")


def summary_of(several: "Several") -> list[str]:
    """Return lines about the scores of seeds or folds."""
    from perceiver_cli.inference.statistics import mean_interval
    from perceiver_cli.model.checkpoint import read_info

    scores = [member.score for member in several.members if member.score is not None]
    count = counted(len(several.members), several.request.kind[:-1])
    if len(scores) < 2:
        return [f"{count}: no validation scores"]
    whole = read_info(several.folder / MODEL_FILE).metrics
    low, high = mean_interval(scores)
    spread = f"{min(scores):.4f} to {max(scores):.4f}, 95 % interval of the mean {low:.4f} to {high:.4f}"
    line = f"{count}: validation {_figure(whole)} {sum(scores) / len(scores):.4f} on average, {spread}"
    if several.request.kind == "seeds":
        return [line]
    where = show_path(several.folder / PREDICTIONS_FILE)
    right = f"{whole['val_accuracy']:.4f}"
    return [line, f"right answers of the models to examples that they were not trained on: {right}, in {where}"]


def _figure(metrics: Mapping[str, Any]) -> str:
    """Return the name of the score that decides."""
    return "mAP" if "val_mAP" in metrics else "accuracy"


def follow(several: "Several", again: list[str]) -> None:
    """Print the runs as they come; an interrupted one is saved, and the process ends by the signal.

    again: the command that continues them.
    """
    received = on_first_signal(several.stop)
    display = _Progress()
    with display.bar:
        for event in several.events():
            display.show(event)
    if received:
        say(f"stopped and saved; to continue: {perceiver_command(again)}")
        end_by_signal(received[0])


class _Progress:
    """A live bar of the run in progress, and a line for each run that ended."""

    def __init__(self) -> None:
        self.has_told_plan = False
        self.bar = bar("{task.fields[facts]}")
        self.task: Any = self.bar.add_task("reading", total=None, facts="")
        self.title, self.last_line = "", time.monotonic()
        self.width, self.figure = 8, ""
        self.limit_s: float | None = None

    def show(self, event: "Began | Ended | Event") -> None:
        """Print an event or update the bar."""
        from perceiver_cli.training.several import Began, Ended

        match event:
            case Began(member, place, total):
                self.title = f"{member.name} ({place} of {total})"
                self.bar.update(self.task, description=self.title, completed=0, total=None, facts="")
            case Started(summary):
                self.limit_s = summary["max_time_s"]
                if not self.has_told_plan:  # the plans of later runs differ little
                    say_start(event)
                self.has_told_plan = True
            case Loaded(done, total, _):
                self.bar.update(self.task, completed=done, total=total, facts="reading")
            case Note(message):
                say_notes([f"{self.title}: {message}"])
            case StepDone(step, total):
                facts = step_facts(event)
                at, end = done_of(event, self.limit_s)
                self.bar.update(self.task, completed=at, total=end, facts=facts)
                if self.bar.disable and time.monotonic() - self.last_line > PLAIN_EVERY_S:
                    self.last_line = time.monotonic()
                    say(f"{self.title}: step {step} of {total}  {facts}")
            case Finished():
                self.figure = _figure(event.metrics)
            case Ended(member):
                self.last_line = time.monotonic()
                self.width = max(self.width, len(member.name))
                say(f"{member.name:<{self.width}}  {_outcome(member, self.figure)}")


def _outcome(member: "RunEntry", figure: str) -> str:
    score = "" if member.score is None else f"{figure} {member.score:.4f}"
    spent = "" if member.seconds is None else f"in {clock(member.seconds)}"
    state = {"done": "", "begun": "interrupted"}.get(member.state, member.state)
    note = f"{state}: {member.note}" if member.note else state
    return "  ".join(filter(None, (score, spent, note)))
