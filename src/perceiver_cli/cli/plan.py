"""The plan of a run and one of its steps as lines of text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perceiver_cli.cli.terminal import clock, say_lines, say_notes
from perceiver_cli.errors import counted
from perceiver_cli.files import show_path
from perceiver_cli.training.events import Started, StepDone

ORDER = {"train": 0, "val": 1, "test": 2}  # of splits, for people


def say_start(event: Started) -> None:
    """Print the plan of a run."""
    say_lines([*plan_lines(event.summary), *event.account.brief()])
    say_notes(event.notes)


def plan_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the plan of a run as lines of text: the data, what is read of each file, the model, the length."""
    counts = list(summary["classes"].values())
    splits = [
        f"{name} {count:,}" + (f" ({summary['val_from']})" if name == "val" else "")
        for name, count in sorted(summary["splits"].items(), key=lambda item: ORDER.get(item[0], len(ORDER)))
    ]
    sizes = f"{min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else f"{max(counts):,}"
    shapes = ", ".join(
        f"{' x '.join(map(str, layout['shape']))} inputs of {counted(layout['channels'], 'channel')}"
        for layout in summary["inputs"].values()
    )
    steps = summary["steps"]
    if steps:
        epochs = steps * summary["batch_size"] / summary["splits"]["train"]
        length = f"{counted(steps, 'step')} ({epochs:.3g} epochs) of {summary['batch_size']}"
    else:
        length = f"as many steps of {summary['batch_size']} as fit in {clock(summary['max_time_s'])}"
    data = Path(summary["data"])
    place = data.relative_to(Path.cwd()) if data.is_relative_to(Path.cwd()) else data
    return [
        f"{summary['preset']}: {counted(len(counts), 'class')} of {'+'.join(summary['modalities'])} in "
        f"{show_path(place)}, {sizes} training examples each",
        f"splits: {', '.join(splits)}",
        *(f"{name}: {layout['words']}" for name, layout in summary["inputs"].items()),
        f"model: {shapes}; {summary['parameters']:,} parameters, {summary['flops'] / 1e9:.3g} GFLOP, "
        f"about {summary['training_bytes'] / 2**20:,.0f} MiB",
        f"{length} on {summary['device']} in {summary['precision']}, into {show_path(summary['output'])}",
    ]


def done_of(event: StepDone, limit_s: float | None) -> tuple[float, float]:
    """Return how much of a run is done, and its whole: in steps, or in seconds under a time limit."""
    return (event.step, event.total_steps) if limit_s is None else (min(event.elapsed_s, limit_s), limit_s)


def step_facts(event: StepDone) -> str:
    """Return the facts to print beside a step's number."""
    return f"loss {event.loss:.3f}  {event.samples_per_s:.0f}/s  epoch {event.epoch:.1f}"
