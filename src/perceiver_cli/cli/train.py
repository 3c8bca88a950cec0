"""The commands `train` and `lr-find`, and their output."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perceiver_cli.cli import completion, options, processes, terminal
from perceiver_cli.cli.plan import done_of, plan_lines, say_start, step_facts
from perceiver_cli.cli.progress import PLAIN_EVERY_S, counting, working
from perceiver_cli.cli.several import folder_for, is_several, train_several
from perceiver_cli.cli.terminal import (
    bar,
    clock,
    emit,
    emit_json,
    end_by_signal,
    is_terminal,
    on_first_signal,
    say,
    say_advice,
    say_notes,
)
from perceiver_cli.data.account import Account
from perceiver_cli.errors import UsageError, counted
from perceiver_cli.files import check_plot, perceiver_command, show_path
from perceiver_cli.training.events import Evaluated, Event, Finished, Loaded, Note, Started, StepDone

if TYPE_CHECKING:
    from perceiver_cli.config import Config
    from perceiver_cli.model.ranks import Ranks
    from perceiver_cli.training.trainer import Trainer

STARTED_AT = time.monotonic()  # a time limit counts from here, the import of torch included


def train(
    data: Annotated[str | None, typer.Argument(help=options.DATA_HELP)] = None,
    output: Annotated[
        Path | None,
        options.output("Run folder [default: runs/PRESET-N].", completion.runs),
    ] = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    changes: options.Changes = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Length in passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length in optimiser steps.")] = None,
    max_time: Annotated[str | None, typer.Option(help="Length in time, e.g. 300, 5m or 1h30m.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after this many evaluations without a higher validation score.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples of a batch; a step has train.accumulate of these.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for weights, data order and augmentation.")] = None,
    device: Annotated[str | None, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")] = None,
    precision: Annotated[options.Floats | None, typer.Option(help="Precision of matrix products.")] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Save memory: compute activations a second time for the gradient.")
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Run through torch.compile, for GPUs.")] = False,
    devices: options.Devices = None,
    timeout: options.Timeout = None,
    workers: options.WorkersOfRecipe = None,
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    label_column: options.LabelColumn = None,
    pair: options.Pair = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Give rare classes, or labels, more weight, so that all count the same.")
    ] = False,
    group_by: options.GroupBy = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Train this number of runs, each with its own seed.")
    ] = None,
    folds: Annotated[int | None, typer.Option(min=2, max=1000, help="Train a run for each fold of the data.")] = None,
    max_bad: Annotated[float | None, typer.Option(min=0, max=1, help="Share of unreadable files to accept.")] = None,
    limit: options.Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in -o, or runs/latest.")] = False,
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue", help="Start the run in -o, or continue it if it exists: for schedulers that restart commands."
        ),
    ] = False,
    init_from: Annotated[
        str | None, typer.Option(autocompletion=completion.models, help="Start from weights of a run or model file.")
    ] = None,
    freeze: Annotated[Literal["none", "trunk"] | None, typer.Option(help="Train the head only (trunk).")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the run that -o already holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, sizes and time, then stop.")] = False,
    on: options.On = None,
    log: Annotated[Literal["none", "tensorboard"], typer.Option(help="Log each step to RUN/tensorboard.")] = "none",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a model on labelled files. The last line on stdout is the path of the best model.

    Several modalities make one model: files of one stem in a class folder (cat/017.png, cat/017.wav), a manifest with a
    column for each (image,audio,label), or videos with their sound. An example may lack a modality.
    """
    from perceiver_cli.config import Flag
    from perceiver_cli.training.tensorboard import check_tensorboard, logged

    recipe = options.recipe_of(preset, config)
    flags = {
        "--epochs": ("train.epochs", epochs),
        "--patience": ("train.patience", patience),
        "--batch-size": ("train.batch_size", batch_size),
        "--lr": ("train.lr", lr),
        "--seed": ("train.seed", seed),
        "--device": ("train.device", device),
        "--precision": ("train.precision", precision),
        "--freeze": ("train.freeze", freeze),
        "--recompute": ("train.recompute", recompute or None),
        "--compile": ("train.compile", compile_ or None),
        "--workers": ("data.workers", workers),
        "--max-bad": ("data.max_bad", max_bad),
        "--group-by": ("data.group_by", group_by),
        "--balance": ("data.class_weight_power", 1.0 if balance else None),
    }
    overrides = list(changes or [])
    if epochs is not None or steps is not None or max_time is not None:
        # One length on the command line replaces all lengths of the recipe.
        overrides += options.length_changes(steps, options.seconds(max_time), seeds or folds or 1)
    overrides += [Flag(f"{flag} {value}", key, value) for flag, (key, value) in flags.items() if value is not None]
    overrides += options.data_changes(options.data_options(root, path_columns, label_column, pair, columns))
    overrides += options.limit_changes(limit)
    if resume and output is None:
        output = Path("runs/latest").resolve()
    options.check_data(data)
    if log == "tensorboard":
        check_tensorboard()
    if (resume and is_several(output)) or ((seeds or folds) and not dry_run and on is None):
        if devices is not None:
            raise UsageError("--devices trains one run, --seeds and --folds train several", "leave one out")
        if go_on:
            raise UsageError("--continue takes one run", "continue several with --resume -o FOLDER")
        several_runs(data, output, recipe, overrides, seeds, folds, resume, init_from, replace, log)
        return
    ranks = processes.shared(devices, timeout, [data])
    if go_on:
        resume, replace = _where_it_was_cut(output, ranks)
    with working("looking at the files"):
        from perceiver_cli.training.trainer import Trainer  # imports torch: after every check that needs none

        trainer = Trainer(
            data, output, recipe, overrides=overrides, resume=resume, init_from=init_from, replace=replace, latest=True,
            started_at=STARTED_AT, dry_run=dry_run or on is not None, ranks=ranks,
        )  # fmt: skip
    if dry_run or on is not None:
        show_dry_run(trainer, on)
        ranks.meet()
        return
    events = trainer.fit()
    follow_training(logged(events) if log == "tensorboard" and ranks.first else events, trainer.stop)


def _where_it_was_cut(output: Path | None, ranks: "Ranks") -> tuple[bool, bool]:
    """Return whether --continue resumes the run, and whether it replaces a run without a saved state."""
    from perceiver_cli.run_folder import MANIFEST, METRICS_FILE, STATE_FOLDER

    if output is None:
        raise UsageError("--continue needs the run folder", "pass -o RUN")
    files = output / STATE_FOLDER / MANIFEST, output / METRICS_FILE
    resume, begun = ranks.from_first(lambda: [os.path.exists(file) for file in files])
    return resume, begun and not resume


def lr_find(
    data: Annotated[str, typer.Argument(help="Folder of class folders, or a manifest (CSV, TSV, JSON).")],
    output: Annotated[Path, options.output("Plot: FILE.png or FILE.svg.")] = Path("lr-find.png"),
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    changes: options.Changes = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples of a batch; a step has train.accumulate of these.")
    ] = None,
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    label_column: options.LabelColumn = None,
    pair: options.Pair = None,
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Maximum steps, from rate 1e-5 to 1.")] = 100,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Suggest a learning rate. A fresh model trains while the rate grows; the suggestion is below the lowest loss."""
    from perceiver_cli.config import DataConfig

    recipe = options.recipe_of(preset, config)
    flags = {"--preset": preset, "--config": config, "--batch-size": batch_size}
    flags |= {} if device == "auto" else {"--device": device}
    words = [word for name, value in flags.items() if value is not None for word in (name, str(value))]
    words += [word for change in changes or [] for word in ("--set", change)]
    given = options.data_options(root, path_columns, label_column, pair, columns)
    read = DataConfig(**given).words()
    words += read
    overrides = [*(changes or []), *options.data_changes(given), f"train.device={device}"]
    overrides += [] if batch_size is None else [f"train.batch_size={batch_size}"]
    check_plot(output)
    from perceiver_cli.advice.data import after_lr_find
    from perceiver_cli.training import lr_find as finder
    from perceiver_cli.training.trainer import Trainer

    with counting("training") as progress:
        curve = finder.range_test(Trainer(data, None, recipe, overrides=overrides), steps, progress)
    finder.draw_curve(curve, output)
    command = perceiver_command(["perceiver", "train", data, *words, "--lr", f"{curve.suggestion:g}"])
    say_notes(curve.notes)
    if json:
        emit_json({**vars(curve), "plot": os.fspath(output), "command": command})
        return
    again = ["perceiver", "lr-find", data, *words]
    advice = after_lr_find(again, steps, read, fell=curve.fell, fell_to_the_end=curve.fell_to_the_end)
    say(f"the curve of {len(curve.rates)} steps is in {show_path(output)}; next:")
    say_advice(advice)
    emit(f"{command}\n")


def several_runs(
    data: str | None, output: Path | None, recipe: "Config | None", overrides: list[str], seeds: int | None,
    folds: int | None, resume: bool, init_from: str | None, replace: bool, log: str,
) -> None:  # fmt: skip
    """Train the runs of seeds or folds, or continue them."""
    from perceiver_cli.training.several import Request, load_request, repeated

    if resume and output is not None:
        request = load_request(output)
        if request.kind == "sweep":
            raise UsageError(f"{show_path(output)}: holds a sweep", "go on with perceiver sweep --resume -o")
        if overrides or seeds or folds:
            raise UsageError("--resume of several runs changes nothing", f"leave out all but -o {show_path(output)}")
        train_several(request, output)
        return
    if seeds and folds:
        raise UsageError("--seeds and --folds are two ways to repeat a run", "pass one of them")
    if data is None or data == "-":
        raise UsageError("several runs need data that can be read again", "pass a folder, a manifest or records")
    if log != "none":
        raise UsageError("--log takes one run", "leave it out with --seeds and --folds")
    kind: Literal["seeds", "folds"] = "seeds" if seeds else "folds"
    named = [text.partition("=")[2] for text in overrides if text.startswith("train.seed=")]
    first = int(named[-1]) if named and named[-1].isdecimal() else 0 if recipe is None else recipe.train.seed
    request = Request(
        kind=kind, data=os.path.abspath(data), config=None if recipe is None else recipe.to_dict(),
        overrides=overrides, init_from=None if init_from is None else os.path.abspath(init_from),
        runs=repeated(kind, seeds or folds or 0, first),
    )  # fmt: skip
    train_several(request, folder_for(kind, output, replace=replace))


def follow_training(events: Iterator[Event], stop: Callable[[], None]) -> None:
    """Print a run's events as they come; the last line on stdout is the path of the best model.

    The first SIGINT, SIGTERM or SIGHUP (a lost connection) ends and saves the run after its step, then ends the process
    by the same signal; the second ends it at once. Under nohup SIGHUP stays ignored.
    """
    received = on_first_signal(stop)
    event: Event | None = None
    display = _Display()
    with display.bar:
        for event in events:
            display.show(event)
    if not isinstance(event, Finished):
        say("stopped before the first step")
        end_by_signal(received[0])
        return
    ending = "stopped early and saved" if event.stopped_early else "done"
    say(f"{ending}: {counted(event.step, 'step')} in {clock(event.elapsed_s)}")
    if "val_accuracy" in event.metrics:
        say(kept_line(event.metrics, display.highest))
        if "temperature" in event.metrics:
            say(calibration_line(event.metrics))
    if received:
        again = ["perceiver", "train", "--resume", "-o", os.fspath(event.model.parent)]
        say(f"to continue: {perceiver_command(again)}")
        end_by_signal(received[0])
    say_advice(event.advice)
    emit(f"{event.model}\n")


def kept_line(metrics: Mapping[str, float], highest: Evaluated | None) -> str:
    """Return a line about the kept model, which may be later than the one with the highest validation accuracy."""
    accuracy = metrics["val_accuracy"]
    several = f", mAP {metrics['val_mAP']:.4f}" if "val_mAP" in metrics else ""  # which decides then
    line = (
        f"kept: the model of step {metrics['step']}, the last row with *: validation accuracy {accuracy:.4f}{several}"
    )
    if several or highest is None or not highest.accuracy > accuracy:
        return line
    return f"{line}; step {highest.step} had {highest.accuracy:.4f}, a difference that chance explains"


def calibration_line(metrics: Mapping[str, float]) -> str:
    """Return a line about the temperature that the model file holds."""
    ece, before = metrics["val_ece"], metrics["val_ece_uncalibrated"]
    stored = f"temperature {metrics['temperature']:.3f}, fitted on validation"
    return f"calibrated: {stored}; calibration error (ECE) {ece:.4f} there, {before:.4f} without"


class _Display:
    """A live bar on a terminal; otherwise a line per evaluation, and a line of progress every PLAIN_EVERY_S."""

    def __init__(self) -> None:
        self.bar = bar("{task.fields[facts]}")
        self.task = self.bar.add_task("reading", total=None, facts="")
        self.highest: Evaluated | None = None  # the evaluation of the highest accuracy
        self.limit_s: float | None = None
        self.live, self.header_shown, self.last_line = not self.bar.disable, False, time.monotonic()

    def show(self, event: Event) -> None:
        """Print an event or update the bar."""
        match event:
            case Started(summary):
                self.limit_s = summary["max_time_s"]
                say_start(event)
            case Note(message):
                say_notes([message])
            case Loaded(done, total, bad):
                facts = f"{bad} unreadable" if bad else ""
                self.bar.update(self.task, completed=done, total=total, facts=facts)
                if done == total and not self.live:
                    say(f"read {counted(total, 'file')}" + (f", {bad} of them unreadable and left out" if bad else ""))
                elif done == total:
                    self.bar.update(self.task, description="first step", completed=0, total=None)
            case StepDone(step, steps):
                facts = step_facts(event)
                at, end = done_of(event, self.limit_s)
                self.bar.update(self.task, description="training", completed=at, total=end, facts=facts)
                if not self.live and time.monotonic() - self.last_line > PLAIN_EVERY_S:
                    self.last_line = time.monotonic()
                    say(f"step {step} of {steps}  {facts}")
            case Evaluated():
                if self.highest is None or event.accuracy > self.highest.accuracy:
                    self.highest = event
                if not self.header_shown:
                    self.header_shown = True
                    columns = f"{'epoch':>8} {'step':>8} {'train loss':>11} {'val loss':>9} {'val acc':>8} {'time':>8}"
                    say(f"{columns}  * kept so far")
                losses = f"{_figure(event.train_loss):>11} {_figure(event.loss):>9} {_figure(event.accuracy):>8}"
                mark = " *" if event.best else ""
                row = f"{event.epoch:8.2f} {event.step:8d} {losses} {clock(event.elapsed_s):>8}{mark}"
                say(row, "bold" if event.best else "")
                self.last_line = time.monotonic()


def show_dry_run(trainer: "Trainer", on: Any) -> None:
    """Print the plan of a run and its cost here or on a named machine."""
    with working("measuring a step"):
        summary = trainer.dry_run(on)
    say_notes(trainer.plan.notes)
    show_plan(summary, trainer.plan.account)


def show_plan(summary: Mapping[str, Any], account: Account) -> None:
    """Print a dry run: lines on a terminal, one JSON object otherwise."""
    if not is_terminal():
        emit_json(summary)
        return
    classes = [f"  {show_path(name)} {count}" for name, count in summary["classes"].items()]
    length = [f"{summary['seconds_per_step']:.3f} s a step: about {clock(summary['eta_s'])} in all"]
    if "estimate" in summary:
        from perceiver_cli.model.machines import estimate_lines

        length = estimate_lines(summary["estimate"])
    emit("\n".join([*plan_lines(summary), *classes, *account.lines(), *length]) + "\n")


def _figure(value: float) -> str:
    """Return a number for the table of evaluations; a dash for NaN, without a validation split."""
    return terminal.figure(None if isnan(value) else value, ".4f" if abs(value) < 1e4 else ".3g")
