"""Every option: pydantic models, read from TOML, changed by dotted overrides, written into each run. No torch.

A `Config` fixes a model, its inputs, the reading of data and the training. An error of an unknown key names the nearest
known one.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from perceiver_cli import preprocess
from perceiver_cli.errors import UsageError
from perceiver_cli.files import cause, open_file, show_path
from perceiver_cli.preprocess.spec import Auto, Fraction, InputSpec, Limits, Positive, Size, Table
from perceiver_cli.presets import preset_names, preset_text

MAX_CONFIG_BYTES = 1 << 20
MAX_SCHEDULE_STEPS = 4096
REPETITION = re.compile(r"\(([^()]*)\)x(\d{1,4})")  # in a schedule
NOT_OPTIONS = ("modality", "limits")  # fields of tables that are a tag, or a table of their own
TINY_DROPOUT = 0.2  # of each modality, in a combination of tiny presets


class ModelConfig(Table):
    """The Perceiver's size and weight sharing (paper sections 3.1 and 4.1; defaults: the ImageNet model).

    `schedule` lists the blocks in order, with their weights: `c1` is a cross-attend with weight set 1, `t0` a latent
    Transformer with weight set 0, `(c1 t0)x7` repeats. The default is Table 7's sharing: the first cross-attend has its
    own weights, cross-attends 2 to 8 share theirs, all latent Transformers share theirs.
    """

    num_latents: Size = 512  # rows of the latent array
    latent_channels: Size = 1024  # width of the latent array
    # Order of cross-attends c and latent Transformers t, each with the number of its weights: the same number again is
    # weight sharing. (c1 t0)x7 repeats seven times.
    schedule: str = "c0 t0 (c1 t0)x7"
    self_attends_per_block: Annotated[int, Field(ge=1, le=1024)] = 6  # layers of each latent Transformer
    num_cross_heads: Size = 1  # heads of a cross-attend
    num_self_heads: Size = 8  # heads of a latent self-attention
    # Width of Q, K, V in the cross-attend: min(input, latent channels) (paper), or the input's (official code).
    cross_channels: Literal["min", "input"] = "min"
    widening_factor: Annotated[int, Field(ge=1, le=16)] = 1  # hidden width of an MLP, in widths of its input
    gelu: Literal["tanh", "erf"] = "tanh"  # as the default of jax.nn.gelu (tanh), or of transformers (erf)
    head: Literal["mean", "query"] = "mean"  # the paper's mean over latents, or Perceiver IO's learned query
    query_residual: bool = True  # query head: add the query to its read, or take the read alone
    modality_channels: Annotated[int, Field(ge=1, le=1024)] = 4  # smallest width of the modality encoding (paper 4.2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.latent_channels % self.num_self_heads:
            raise ValueError(
                f"latent_channels {self.latent_channels} is not a multiple of num_self_heads {self.num_self_heads}"
            )
        if not self.steps or self.steps[0][0] != "c":
            raise ValueError("schedule must begin with a cross-attend, such as 'c0 t0'")
        for kind in "ct":
            used = list(dict.fromkeys(index for k, index in self.steps if k == kind))
            if used != list(range(len(used))):
                raise ValueError(f"schedule must number its {kind} weight sets 0, 1, 2 ... by first use, found {used}")
        return self

    @property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """The expanded schedule: (kind, weight set) pairs with kind "c" or "t"."""
        text = self.schedule
        while "(" in text:
            expanded = REPETITION.sub(lambda m: " ".join([m[1]] * min(int(m[2]), MAX_SCHEDULE_STEPS)), text)
            if expanded == text or len(expanded) > 8 * MAX_SCHEDULE_STEPS:
                raise ValueError(f"schedule {self.schedule!r} has an unfinished or too long repetition")
            text = expanded
        for word in (words := text.split()):
            if re.fullmatch(r"[ct]\d{1,4}", word) is None:
                raise ValueError(f"schedule word {word!r} is neither a cross-attend (c0) nor a latent Transformer (t0)")
        return tuple((word[0], int(word[1:])) for word in words)

    @property
    def num_cross_sets(self) -> int:
        """Number of distinct cross-attend weight sets."""
        return 1 + max(index for kind, index in self.steps if kind == "c")

    @property
    def num_latent_sets(self) -> int:
        """Number of distinct latent Transformer weight sets."""
        return 1 + max((index for kind, index in self.steps if kind == "t"), default=-1)


_FOLD = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")
MAX_FOLDS = 1000


def parse_fold(text: str) -> tuple[int, int]:
    """Return (2, 5) for the fold "2/5". Raises ValueError for text of another form."""
    match = _FOLD.fullmatch(text.strip())
    number, folds = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1 <= number <= folds and 2 <= folds <= MAX_FOLDS):
        raise ValueError(f"a fold is like '2/5', with at least 2 and at most {MAX_FOLDS} folds, found {text!r}")
    return number, folds


def _fold(text: str) -> str:
    parse_fold(text)
    return text


Fold = Annotated[str, AfterValidator(_fold)]
Pairs = Literal["media", "all", "none"]
# The options of `DataConfig` that say how to read data, by the flag that sets each.
READING = {
    "root": "--root", "path_column": "--path-column", "label_column": "--label-column", "columns": "--column",
    "pair": "--pair",
}  # fmt: skip
ANY = "path"  # key of `path_column` for files of any modality
REST, AUTO, NONE = "*", "auto", "none"  # in `columns`: the other columns, a kind by content, no input


class DataConfig(Table):
    """The examples, and how they are read."""

    path: str | None = None  # folder, manifest or tar of the data
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of train for validation, if data has no val split
    fold: Fold | None = None  # "2/5": the second of five equal parts of train and val is the validation split
    root: str | None = None  # folder that a manifest's paths are relative to; unset: the manifest's own
    path_column: dict[str, str] | None = None  # column of paths of each modality, or "path" for files of any
    # Columns of a manifest that are inputs, and the kind of each; "*" is all other columns, auto is by content.
    columns: dict[str, str] | None = None
    label_column: str | None = None  # column of labels; unset: label, labels or the like
    group_by: str | None = None  # "parent" (folder) or a column, whose values stay in one split
    pass_columns: tuple[str, ...] = ()  # columns of a manifest that answers and records repeat, "*" for all
    # Joins files of one stem in a folder to one example: media, also tables of numbers (all), or none.
    pair: Pairs = "media"
    split: str | None = None  # file of an earlier run's split to use again
    max_bad: Fraction = 0.01  # share of unreadable files above which a run stops
    workers: Annotated[int, Field(ge=0, le=256)] | None = None  # unset: chosen by cores and device
    cache_bytes: Annotated[int, Field(ge=0)] = 2 << 30  # decoded files kept in memory
    class_weight_power: Annotated[float, Field(ge=0, le=1)] = 0.0  # 0 none, 0.5 square root, 1 inverse frequency
    limits: Limits = Limits()

    @property
    def of_manifest(self) -> list[str]:
        """The options that only a manifest has, as flags."""
        return [flag for name, flag in READING.items() if name != "pair" and getattr(self, name) is not None]

    def words(self) -> list[str]:
        """Return the words of a command that say how data is read; options at their defaults are left out."""
        words: list[str] = []
        for name, flag in READING.items():
            value = getattr(self, name)
            if value != DataConfig.model_fields[name].default:
                each = [f"{key}={word}" for key, word in value.items()] if isinstance(value, dict) else [value]
                words += [word for text in each for word in (flag, text)]
        return words

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = sorted(preprocess.names())
        for name in self.path_column or ():
            if name not in (ANY, *known):
                raise ValueError(f"path_column.{name} is not a modality; known are {', '.join(known)}, {ANY} for any")
        kinds = [AUTO, NONE, *preprocess.cell_kinds()]
        for name, kind in (self.columns or {}).items():
            if kind not in kinds:
                raise ValueError(f"columns.{name} is {kind!r}, expected one of {', '.join(sorted(kinds))}")
        return self


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)")


def _duration(value: Any) -> Any:
    """Return a duration as text; an integer counts steps. Raises ValueError for text of another form."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value} steps"
    if isinstance(value, str) and _DURATION.fullmatch(value.strip()) is None:
        raise ValueError(f"a duration is like '500 steps', '3 epochs' or '5%', found {value!r}")
    return value


Duration = Annotated[str, BeforeValidator(_duration)]


def duration_steps(duration: Duration, total_steps: int, steps_per_epoch: int) -> int:
    """Return a duration such as "5%", "3 epochs" or "500 steps" in optimiser steps."""
    match = _DURATION.fullmatch(duration.strip())
    assert match is not None, duration
    amount, unit = float(match[1]), match[2]
    if unit == "%":
        return round(total_steps * amount / 100)
    return round(amount * (steps_per_epoch if unit.startswith("epoch") else 1))


AUTO_EPOCHS, AUTO_STEPS = 40, 2000  # of epochs = "auto": at least both
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Table):
    """Optimiser, schedule and length of a run."""

    # Passes over the training examples; "auto": 40, or as many as make 2,000 steps.
    epochs: Annotated[float, Field(gt=0)] | Auto = 120.0
    max_steps: Annotated[int, Field(gt=0)] | None = None  # upper bound of the steps of `epochs`
    steps: Annotated[int, Field(gt=0)] | None = None  # replaces epochs and max_steps
    max_time_s: Positive | None = None  # replaces every other length; the learning rate schedule ends with it
    batch_size: Size = 64  # examples in a batch of one device
    accumulate: Size = 1  # batches per optimiser step, divided among processes
    # Add gradients in an order that does not depend on the number of processes: the same model to the bit.
    exact_sum: bool = True
    split_inputs: Size = 1  # processes that share the inputs of one example, for more inputs than a device can hold
    threads: Size | None = None  # threads of each process on a CPU; their number decides last bits; unset: its cores
    optimizer: Literal["adamw", "lamb"] = "lamb"  # the paper uses LAMB
    lr: Positive = 0.004  # peak learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay rates of the optimiser's averages
    eps: Positive = 1e-6  # added to the optimiser's denominator
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  # decay of matrices; biases and norms have none
    schedule: Literal["constant", "cosine", "step"] = "constant"  # learning rate over the run
    warmup: Duration = "0 steps"  # linear rise of the learning rate from 0
    flat: Duration = "0 steps"  # cosine schedule: length of the peak before the fall
    decay_at: tuple[Duration, ...] = ()  # step schedule: times at which the rate falls
    decay_factor: Positive = 0.1  # factor of the learning rate at each of decay_at
    clip_norm: Positive | None = None  # largest norm of the gradient
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the label spread over all classes
    # Beta parameter of MixUp, or of CutMix; 0 is none. With both each batch draws one. For pictures or sound alone.
    # "auto": MixUp for fewer than 1,000 examples, and CutMix too for pictures.
    mixup: Annotated[float, Field(ge=0)] | Auto = 0.0
    cutmix: Annotated[float, Field(ge=0)] | Auto = 0.0  # see mixup
    ema_decay: Decay = 0.0  # decay of the averaged weights that are evaluated and saved; 0: no average
    freeze: Literal["none", "trunk"] = "none"  # trunk: only the last linear layer learns (a linear probe)
    eval_every: Duration = "1 epoch"  # distance between evaluations on the validation split
    patience: Size | None = None  # evaluations without a higher validation score that end the run
    save_every: Duration = "1 epoch"  # distance between saves of the state to resume from; every evaluation saves too
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0  # seed for weights, data order and augmentation
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto is bf16 on a GPU, else fp32
    recompute: bool = False  # compute latent Transformers again in the backward pass: less memory, a third more time
    compile: bool = False  # compile latent Transformers, for GPUs: a minute at the start

    def epochs_for(self, count: int) -> float:
        """Return the epochs of a run on `count` training examples."""
        if self.epochs != "auto":
            return self.epochs
        return float(max(AUTO_EPOCHS, AUTO_STEPS * self.examples_per_step / max(1, count)))

    @property
    def examples_per_step(self) -> int:
        """Examples in one optimiser step."""
        return self.batch_size * self.accumulate

    def steps_for(self, count: int) -> int:
        """Return the optimiser steps of a run on `count` training examples, without a time limit."""
        if self.steps is not None:
            return self.steps
        whole = max(1, ceil(self.epochs_for(count) * count / self.examples_per_step))
        return min(whole, self.max_steps or whole)


def _validation(key: str, table: Any) -> Callable[[], InputSpec]:
    """Return a table of inputs, checked against the options of its modality, else of the modality named by its key.

    Raises ValueError for an unknown modality.
    """
    if isinstance(table, InputSpec):
        return lambda: table
    name = table.get("modality", key) if isinstance(table, dict) else key
    options = preprocess.spec_type(name) if isinstance(name, str) else None
    if options is None:
        known = ", ".join(sorted(preprocess.names()))
        raise ValueError(
            f"[inputs.{key}]: unknown modality {name!r}, known are {known}; or pass its file: --plugin FILE.py"
        )
    return partial(options.model_validate, table)


class Config(Table):
    """A complete recipe. `inputs` has one table per modality, e.g. `[inputs.image]`."""

    name: str = "custom"
    multi_label: bool = False  # several labels an example: sigmoid instead of softmax; a run takes this from its data
    num_classes: Annotated[int, Field(ge=2, le=1 << 20)] | None = (
        None  # of a published model; a run takes the number from its data
    )
    model: ModelConfig = ModelConfig()
    # Each table is validated here, so that pydantic's errors locate it.
    inputs: dict[str, Annotated[SerializeAsAny[InputSpec], BeforeValidator(lambda validation: validation())]]
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _type_inputs(cls, value: Any) -> Any:
        tables = value.get("inputs") if isinstance(value, dict) else None
        if not isinstance(tables, dict):
            return value
        return {**value, "inputs": {key: _validation(key, table) for key, table in tables.items()}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.inputs:
            raise ValueError("a configuration needs at least one [inputs.<modality>] table")
        for key, spec in self.inputs.items():
            if key != spec.modality:
                raise ValueError(f"[inputs.{key}] has modality {spec.modality!r}, expected [inputs.{spec.modality}]")
        return self

    @classmethod
    def parse(cls, tables: dict[str, Any], origin: str = "configuration", args: dict[str, str] | None = None) -> Config:
        """Return the validated Config. Raises a UsageError that names the first wrong key or value, and its origin.

        args: assignments by key, as the user typed them; each is the origin of its key.
        """
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            key, problem = _first_problem(error)
            args = args or {}
            wrong = next((name for name in args if key == name or key.startswith(f"{name}.")), "")
            names = (args.get(wrong, origin), "" if key == wrong else key, problem)
            raise UsageError(": ".join(filter(None, names))) from None

    def override(self, assignments: list[str]) -> Config:
        """Return this Config changed by `a.b=value` assignments, values in TOML (bare words are strings).

        Raises a UsageError that names the first wrong assignment as typed.
        """
        tables = self.to_dict()
        typed: dict[str, str] = {}
        for assignment in assignments:
            flag = assignment if isinstance(assignment, Flag) else None
            key, equals, text = (flag.key, "=", flag.text) if flag else assignment.partition("=")
            if not equals or not key:
                raise UsageError(f"--set {assignment}: expected KEY=VALUE, such as train.lr=0.001")
            *parents, leaf = keys = _keys(key.strip())
            table = tables
            for parent in parents:
                if table.get(parent) is None:
                    table[parent] = {}
                table = table[parent]
                if not isinstance(table, dict):
                    raise UsageError(f"--set {assignment}: {parent} is a value, not a table")
            table[leaf] = parse_value(text)
            typed[".".join(keys)] = flag.typed if flag else f"--set {assignment}"
        return Config.parse(tables, "options", typed)

    def to_dict(self, *, without_none: bool = False) -> dict[str, Any]:
        """Return the tables as JSON types, the same after a round trip."""
        tables = self.model_dump(mode="json", exclude_none=without_none)
        tables["inputs"] = tables.pop("inputs")  # last, as in every file
        return tables

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML, without the keys that have no value."""
        return tomli_w.dumps(self.to_dict(without_none=True))


def parse_value(text: str) -> Any:
    """Return the value of a text in TOML: a bare word is text, and the word none is None."""
    if text.strip() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


class Flag(str):
    """An assignment made by a flag; errors name the flag."""

    typed: str
    key: str
    text: str

    def __new__(cls, typed: str, key: str, value: object) -> Flag:
        """Return the assignment of a value to a key; typed: the flag and value in the command."""
        text = json.dumps(value)
        flag = super().__new__(cls, f"{key}={text}")
        flag.typed, flag.key, flag.text = typed, key, text
        return flag


def _keys(key: str) -> list[str]:
    """Return the parts of a dotted key of TOML, in which a part with a dot is in quotes: data.columns."unit.price"."""
    try:
        tables = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return key.split(".")
    keys = []
    while isinstance(tables, dict):
        ((name, tables),) = tables.items()
        keys.append(name)
    return keys


def _first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the key of the first wrong value ("" if no single key is wrong), and the problem."""
    problem = error.errors(include_url=False)[0]
    names = [name for name in problem["loc"] if isinstance(name, str) and not name.startswith(("function-", "tuple["))]
    if problem["type"] == "unknown_key":
        key, known = problem["ctx"]["key"], problem["ctx"]["known"]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        same = [] if names else [one for one in option_keys() if one.rpartition(".")[2] == key]
        near = [".".join([*names, *near])] if near and not same else same
        advice = f"did you mean {' or '.join(near[:3])}" if near else f"known are {', '.join(known)}"
        return "", f"unknown key {'.'.join([*names, key])}, {advice}; perceiver options explains all"
    message, value = problem["msg"].removeprefix("Value error, "), problem.get("input")
    shown = "" if isinstance(value, dict | Table) or problem["type"] == "value_error" else f", found {value!r:.80}"
    return ".".join(names), f"{message}{shown}"


def load_preset(name: str) -> Config:
    """Return the Config of a built-in preset."""
    return Config.parse({"name": name, **tomllib.loads(preset_text(name))}, f"preset {name}")


def tiny_config(modalities: Iterable[str]) -> Config:
    """Return the default recipe for data of these modalities: tiny-image, tiny-av and so on.

    Modalities without a common preset combine their tiny presets: all inputs, with a dropout of modalities in training,
    the most epochs and the smallest batch.
    """
    names = sorted(modalities)
    every = preset_names()
    for preset in every:
        if preset.startswith("tiny-") and sorted((recipe := load_preset(preset)).inputs) == names:
            return recipe
    # A plugin's modality has no tiny preset: its own defaults, and the model of tiny-image.
    presets = [load_preset(f"tiny-{name}" if f"tiny-{name}" in every else "tiny-image") for name in names]
    dropout = {"dropout": TINY_DROPOUT} if len(names) > 1 else {}
    inputs = {}
    for name, tiny in zip(names, presets, strict=True):
        spec = tiny.inputs[name] if name in tiny.inputs else InputSpec.kinds[name](modality=name)
        inputs[name] = spec.model_copy(update=dropout)
    epochs = [p.train.epochs for p in presets if p.train.epochs != "auto"]
    length = {"epochs": max(epochs, default="auto"), "batch_size": min(p.train.batch_size for p in presets)}
    train = presets[0].train.model_copy(update=length)
    return Config(name=f"tiny-{'-'.join(names)}", model=presets[0].model, inputs=inputs, train=train)


def load_config(path: Path) -> Config:
    """Return the Config in a TOML file; its `data.split` is a file beside it. Raises UsageError if it is wrong."""
    try:
        with open_file(path) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise UsageError(f"{show_path(path)}: larger than {MAX_CONFIG_BYTES} bytes, expected a TOML configuration")
        tables = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{show_path(path)}: cannot read: {cause(error)}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{show_path(path)}: not a TOML configuration: {error}") from error
    config = Config.parse({"name": path.stem, **tables}, show_path(path))
    if config.data.split is None:
        return config
    options = config.data.model_copy(update={"split": str(path.parent / config.data.split)})
    return config.model_copy(update={"data": options})


def option_tables() -> dict[str, type[BaseModel]]:
    """Return the tables of a recipe by name, such as "train" or "inputs.image"."""
    every: dict[str, type[BaseModel]] = {"model": ModelConfig, "train": TrainConfig, "data": DataConfig}
    every["data.limits"] = Limits
    for name in sorted(preprocess.names()):
        if (spec := preprocess.spec_type(name)) is not None:
            every[f"inputs.{name}"] = spec
    return every


def option_keys() -> list[str]:
    """Return the key of every option, such as "train.lr"."""
    return [
        f"{name}.{key}"
        for name, table in option_tables().items()
        for key in table.model_fields
        if key not in NOT_OPTIONS
    ]
