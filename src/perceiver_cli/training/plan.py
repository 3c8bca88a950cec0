"""The plan of a run: recipe, data, device and sizes, resolved and checked before the first step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

import perceiver_cli
from perceiver_cli.config import Config, DataConfig, TrainConfig, tiny_config
from perceiver_cli.data.account import Account
from perceiver_cli.data.catalog import PARENT, Catalog, resolve_specs, scan
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader
from perceiver_cli.data.splits import SPLIT_FILE, read_split, validated, whole
from perceiver_cli.data.survey import in_words
from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.files import show_path
from perceiver_cli.hardware import memory_bytes
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.model.cost import MAX_PARAMETERS, Cost, estimate
from perceiver_cli.model.device import Compute, choose_compute
from perceiver_cli.model.ranks import ALONE, Ranks
from perceiver_cli.model.slices import check_slices
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import TrainingSet
from perceiver_cli.preprocess.spec import InputSpec
from perceiver_cli.run_folder import find_model, next_run
from perceiver_cli.training.state import TrainingState, load_state

FEW = 10  # unreadable files that never stop a run before all files were decoded
SMALL_MIXUP, SMALL_CUTMIX = 0.2, 1.0  # for "auto" and few examples
LIST_BAD = 5  # unreadable files named in an error


@dataclass(frozen=True)
class RunRequest:
    """The arguments of `Trainer` that the plan needs."""

    data: str | os.PathLike[str] | None
    output: str | os.PathLike[str] | None
    config: Config | None
    overrides: list[str]
    resume: bool
    init_from: str | os.PathLike[str] | None
    latest: bool
    started_at: float
    dry_run: bool = False  # no recipe is too large for the machine
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Plan:
    """The inputs of a run.

    val_from: who chose the validation examples, in words. saved: the state that it resumes. notes: messages for the
    user, which the run extends.
    """

    request: RunRequest
    config: Config
    catalog: Catalog
    reader: Reader
    compute: Compute
    cost: Cost
    output: Path
    val_from: str
    saved: TrainingState | None
    notes: list[str]

    @property
    def train_examples(self) -> Sequence[Example]:
        """The examples that the model learns from."""
        return self.catalog.splits["train"]

    @property
    def val_examples(self) -> tuple[Example, ...]:
        """The readable examples that choose the best model. May be empty."""
        return tuple(e for e in self.catalog.splits.get("val", ()) if e.id not in self.reader.bad)

    @property
    def examples_per_step(self) -> int:
        """Examples in one optimiser step."""
        return self.config.train.examples_per_step

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, rounded."""
        return max(1, round(len(self.train_examples) / self.examples_per_step))

    @cached_property
    def planned_steps(self) -> int:
        """Optimiser steps of the run without a time limit."""
        return self.config.train.steps_for(len(self.train_examples))

    @property
    def training_bytes(self) -> int:
        """Approximate memory of a training step."""
        train = self.config.train
        return self.cost.training_bytes(train.batch_size, averaged=train.ema_decay > 0, recompute=train.recompute)

    @property
    def account(self) -> Account:
        """What became of every path of the data, as far as it is known."""
        return self.catalog.accounted(self.reader.bad)

    @cached_property
    def reads(self) -> dict[str, str]:
        """What the model reads of each modality's files, in words."""
        return in_words(self.config.inputs, self.train_examples, self.config.data.limits)

    def summary(self) -> dict[str, Any]:
        """Return data, shapes, sizes, length and paths of the run as JSON types."""
        train = self.config.train
        return {
            "preset": self.config.name,
            "data": self.config.data.path,
            "modalities": list(self.catalog.modalities),
            "splits": {name: len(examples) for name, examples in self.catalog.splits.items()},
            "val_from": self.val_from,
            "classes": self.catalog.counts("train"),
            "inputs": {
                name: {"shape": list(layout.grid), "channels": layout.num_channels, "words": self.reads[name]}
                for name, layout in self.reader.layouts.items()
            },
            "parameters": self.cost.parameters,
            "flops": self.cost.flops,
            "training_bytes": self.training_bytes,
            "steps": None if train.max_time_s else self.planned_steps,
            "max_time_s": train.max_time_s,
            "batch_size": self.examples_per_step,
            "device": str(self.compute.device),
            "precision": self.compute.precision,
            "output": os.fspath(self.output),
        }

    def check_bad(self, bad: Mapping[str, str], looked_at: int) -> list[str]:
        """Return which of `looked_at` decoded files are unreadable; raise DataError if too many. bad: error by id.

        Up to FEW are never too many before all training files were decoded. At least one file must be readable.
        """
        ids = {example.id for split in ("train", "val") for example in self.catalog.splits.get(split, ())}
        lost = {identity: error for identity, error in bad.items() if identity in ids}
        errors = [*lost.values()]
        allowed, looked_at = self.config.data.max_bad, max(1, looked_at, len(errors))
        whole = looked_at >= len(self.train_examples)
        too_many = len(errors) > allowed * looked_at and (whole or len(errors) > FEW)
        nothing = whole and len(errors) >= len(self.train_examples) and all(e.id in bad for e in self.train_examples)
        if too_many or nothing:
            more = ["...", "perceiver lint lists all"] if len(errors) > LIST_BAD else []
            listed = "; ".join([*errors[:LIST_BAD], *more])
            if nothing:
                raise DataError(f"no training file can be read: {listed}")
            share = min(1.0, ceil(1000 * len(errors) / looked_at) / 1000)
            raise DataError(
                f"{len(errors)} of {counted(looked_at, 'file')} cannot be read, more than {allowed:.1%}; "
                f"pass --max-bad {share} to continue without them: {listed}"
            )
        return [*lost]


def make_plan(request: RunRequest) -> Plan:
    """Return the plan of a run after every check that needs no training step."""
    config, output, saved = request.config, request.output, None
    notes: list[str] = []
    if request.resume:
        if output is None:
            raise UsageError("--resume needs the run folder to continue", "pass -o RUN")
        saved = load_state(Path(output))
        notes += [f"fell back to an older training state: {note}" for note in saved.damaged]
        config = Config.parse(saved.fields["config"], show_path(output))
    elif config is None and request.init_from is not None:
        config = read_info(find_model(os.fspath(request.init_from))).config
    path = os.fspath(request.data) if request.data is not None else config.data.path if config is not None else None
    if not path:
        raise UsageError("no data given", "pass a folder of class folders: perceiver train DATA")
    if config is not None:
        if config.data.root is not None and os.path.abspath(path) != config.data.path:  # the root of another manifest
            config = config.model_copy(update={"data": config.data.model_copy(update={"root": None})})
        config = config.override(request.overrides)
    scanned, split_file = _scan(path, config, request, saved, notes)
    config = config or tiny_config(scanned.modalities).override(request.overrides)
    _check_recipe(config, scanned, path)
    catalog = scanned if split_file is not None else validated(scanned, config.data)
    if config.train.patience is not None and "val" not in catalog.splits:
        raise UsageError("train.patience needs a validation split", "leave it out, or raise data.val_fraction")
    catalog.check_groups()
    if saved is not None and (before := saved.fields["fingerprint"]) != (now := catalog.fingerprint):
        raise UsageError(
            f"{show_path(output or '')}: the data changed since this run was saved (fingerprint {before}, now {now})",
            "train anew with --init-from to start from its weights",
        )
    notes += scanned.notes + _check_classes(scanned)
    # All folds settle "auto" by the same examples, so that their models can make one ensemble.
    seen = catalog if config.data.fold is None else whole(catalog)
    specs = resolve_specs(config.inputs, seen, config.data.limits)
    config = _settled(config, catalog, specs, path)
    if saved is None:
        train = shared_out(config.train, request.ranks.size // config.train.split_inputs, notes)
        config = config.model_copy(update={"train": train})
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    _check_split(config.train, request)
    compute = _compute_of(request, config.train, notes)
    num_classes = len(catalog.classes)
    reader = Reader(specs, config.data.limits, catalog.bad, num_classes if scanned.multi_label else 0)
    if config.train.split_inputs > 1:
        check_slices(reader.layouts, config.train.split_inputs)
    cost = estimate(config.model, reader.layouts, num_classes)
    folder = Path(output) if output is not None else next_run(config.name)
    val_from = _val_from(scanned, split_file, config.data.fold)
    plan = Plan(request, config, catalog, reader, compute, cost, folder, val_from, saved, notes)
    if not request.dry_run and (reason := too_large(plan)) is not None:
        raise reason
    if saved is not None:
        _check_resumable(plan, saved.fields["config"])
    _check_alike(plan)
    return plan


def _check_split(train: TrainConfig, request: RunRequest) -> None:
    """Raise UsageError if the processes of a run cannot share inputs as its recipe says."""
    size, number = train.split_inputs, request.ranks.size
    if number % size and not request.dry_run:
        found = f"train.split_inputs={size} in {counted(number, 'process')}, expected a multiple of {size}"
        raise UsageError(found, f"pass --devices {size * ceil(number / size)}")


def _compute_of(request: RunRequest, train: TrainConfig, notes: list[str]) -> Compute:
    """Return the device and precision of this process; a dry run takes the CPU if the device is missing."""
    try:
        return choose_compute(request.ranks.device(train.device), train.precision)
    except UsageError as error:
        if not request.dry_run:
            raise
        notes.append(f"{error}; the plan is for the CPU")
        return choose_compute("cpu", "fp32")


def shared_out(train: TrainConfig, size: int, notes: list[str]) -> TrainConfig:
    """Return a recipe whose step keeps its number of examples but has a batch for each of `size` processes.

    Raises UsageError if the batch cannot be divided into equal parts.
    """
    if train.accumulate >= size:
        return train
    whole = train.examples_per_step
    count = next((count for count in range(size, whole + 1) if whole % count == 0 and count % train.accumulate == 0), 0)
    if not count:
        step = counted(whole, "example")
        raise UsageError(
            f"a step of {step} cannot be divided among {size} processes", f"pass --batch-size {size} or more"
        )
    notes.append(
        f"a step of {whole} examples is now {count} batches of {whole // count}, for {size} processes; "
        f"for larger ones pass --batch-size with --set train.accumulate={size}"
    )
    return train.model_copy(update={"batch_size": whole // count, "accumulate": count})


def _check_alike(plan: Plan) -> None:
    """Raise UsageError if the processes of a run differ in version, recipe, data or saved state."""
    if plan.request.ranks.size == 1:
        return
    recipe = plan.config.model_copy(update={"data": DataConfig()}).to_toml()
    facts = {
        "version": f"{perceiver_cli.__version__} with torch {torch.__version__}",
        "recipe": f"{crc32(recipe.encode()):08x}",
        "data": f"fingerprint {plan.catalog.fingerprint}",
        "state": "nothing saved" if plan.saved is None else f"saved at step {plan.saved.fields['step']}",
        "device": f"{plan.compute.device.type} in {plan.compute.precision}",
        "threads": torch.get_num_threads() if plan.compute.device.type == "cpu" else 0,
    }
    first, *others = plan.request.ranks.exchange(facts)
    for rank, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs[name] != value:
                hint = "all processes need the same program, data, options and run folder"
                raise UsageError(f"{name} of process {rank}: {theirs[name]}, of process 0: {value}", hint)


def _settled(config: Config, catalog: Catalog, specs: Mapping[str, InputSpec], path: str) -> Config:
    """Return the recipe that the run keeps, with the values that depend on data and run folder."""
    place: dict[str, Any] = {"path": path if path == "-" else os.path.abspath(path), "split": SPLIT_FILE}
    place |= {} if config.data.root is None else {"root": os.path.abspath(config.data.root)}
    place |= {"columns": dict(catalog.columns)} if catalog.columns else {}
    settled = {"multi_label": catalog.multi_label, "inputs": specs, "data": config.data.model_copy(update=place)}
    settled["train"] = settled_training(config, len(catalog.splits["train"]))
    return config.model_copy(update=settled)


def settled_training(config: Config, count: int) -> TrainConfig:
    """Return the options of training with a value for every "auto", by the number of training examples."""
    train = config.train
    small = TrainingSet(count, ()).is_small and can_mix(config)
    auto = {
        "epochs": train.epochs_for(count),
        "mixup": SMALL_MIXUP if small else 0.0,
        "cutmix": SMALL_CUTMIX if small and "image" in config.inputs else 0.0,
    }
    return train.model_copy(update={key: value for key, value in auto.items() if getattr(train, key) == "auto"})


def can_mix(config: Config) -> bool:
    """Return whether examples can be mixed: they have one modality, whose mixtures still mean something."""
    return len(config.inputs) == 1 and all(modality(name).can_mix for name in config.inputs)


def _scan(
    path: str, config: Config | None, request: RunRequest, saved: TrainingState | None, notes: list[str]
) -> tuple[Catalog, str | None]:
    """Return the catalog of the data, and the split file that divides it, if one belongs to the data."""
    changes = [change for change in request.overrides if change.startswith("data.")]
    options = (config or tiny_config(["image"]).override(changes)).data
    split = options.split
    if saved is not None and request.output is not None:  # a resumed run takes the split file of its own folder
        own = Path(request.output) / SPLIT_FILE
        split = os.fspath(own) if own.exists() else None
    before = None if split is None else read_split(split)
    classes = None if saved is None else saved.fields.get("classes")
    reads = None if config is None else config.inputs
    catalog = scan(path, classes or (None if before is None else before.classes), reads, options)
    if before is None:
        return catalog, None
    divided = before.apply(catalog)
    if divided is not None or saved is not None:
        return divided or catalog, split
    shown = show_path(split or "")
    if path == "-":
        raise UsageError(f"{shown}: the split of other data", "pass --set data.split=none")
    notes.append(f"{shown} is the split of other data: this data is split anew")
    return scan(path, None, reads, options), None


def _val_from(scanned: Catalog, split_file: str | None, fold: str | None) -> str:
    """Return who chooses the validation examples of a catalog as scanned."""
    if split_file is not None:
        return "as in an earlier run"
    if fold is not None:
        return f"fold {fold} of train"
    if "val" in scanned.splits:
        return "chosen by the data"
    by = {None: "each name", PARENT: "each file's folder"}.get(scanned.group_by, show_path(scanned.group_by or ""))
    return f"held out by a hash of {by}"


def _check_recipe(config: Config, catalog: Catalog, path: str) -> None:
    """Raise DataError or UsageError if the recipe cannot learn from this data."""
    reads = "+".join(sorted(config.inputs))
    if set(config.inputs) - set(catalog.modalities):
        raise DataError(f"{show_path(path)}: holds {'+'.join(catalog.holds)}, but {config.name} reads {reads}")
    mixes = any(value not in (0, "auto") for value in (config.train.mixup, config.train.cutmix))
    if mixes and not can_mix(config):
        raise UsageError(f"train.mixup and train.cutmix need pictures or sound alone; this run reads {reads}")


def _check_classes(catalog: Catalog) -> tuple[str, ...]:
    """Return notes on classes that are too small; raise DataError if there are fewer than two classes."""
    where = show_path(catalog.root)
    if not catalog.splits.get("train"):
        raise DataError(f"{where}: no training split", f"found {', '.join(sorted(catalog.splits))}")
    counts = {name: count for name, count in catalog.counts("train").items() if count}
    if len(counts) < 2:
        only = ", ".join(f"{show_path(name)} with {counted(count, 'file')}" for name, count in counts.items())
        hint = "expected two or more: the folders in it, or the labels of a manifest"
        raise DataError(f"{where}: one class to learn: {only}", hint)
    single = [show_path(name) for name, count in counts.items() if count == 1]
    return (f"only one training file in {counted(len(single), 'class')}: {', '.join(single[:10])}",) if single else ()


def too_large(plan: Plan) -> UsageError | None:
    """Return why the model is too large to build or to train here, or None if it is not."""
    parameters = plan.cost.parameters
    if parameters > MAX_PARAMETERS:
        size = f"this model has {parameters:,} parameters ({4 * parameters / 1e9:.1f} GB)"
        return UsageError(size, f"at most {MAX_PARAMETERS:,} are built here")
    memory = memory_bytes()
    if plan.compute.device.type == "cpu" and memory is not None and plan.training_bytes > memory:
        return UsageError(
            f"a step needs about {plan.training_bytes / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}",
            "pass a smaller --batch-size, perhaps with a larger --set train.accumulate=N, or --recompute",
        )
    return None


def _check_resumable(plan: Plan, before: dict[str, Any]) -> None:
    """Raise UsageError if model, inputs or optimiser differ from the saved run's configuration `before`."""
    now = plan.config.to_dict()
    changed = [f"model.{key}" for key, value in now["model"].items() if before["model"].get(key) != value]
    if before["train"]["optimizer"] != now["train"]["optimizer"]:
        changed.append("train.optimizer")
    layouts = Reader(Config.parse(before).inputs, plan.config.data.limits).layouts
    changed += [f"inputs.{key}" for key, layout in plan.reader.layouts.items() if layouts.get(key) != layout]
    if changed:
        raise UsageError(f"--resume cannot change {', '.join(changed)}", "train anew, perhaps with --init-from")
