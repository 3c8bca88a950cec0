"""Options and parsers that several commands share."""

import glob
import os
import re
from collections.abc import Callable, Mapping
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from perceiver_cli.cli import completion, terminal
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import perceiver_command, show_path, similar_path, status_of

# Keys of a line of predict, evaluate or explain, which no column may take; `id` may be the manifest's.
OWN_KEYS = {
    "path", "paths", "label", "labels", "truth", "truths", "prob", "probs", "top", "best", "error", "used", "notes",
    "start_s", "end_s", "correct", "loss",
}  # fmt: skip
DATA_HELP = "Folder of class folders, manifest (CSV, TSV, JSON, TXT, Parquet), tar, zip, or - for stdin."

Aggregate = Literal["mean", "max", "none"]
Encoding = Literal["s16le", "s24le", "s32le", "f32le", "u8"]  # as in preprocess/live_sound.py, without NumPy's import
Floats = Literal["auto", "fp32", "bf16", "fp16"]
Inputs = Annotated[list[str] | None, typer.Argument(help="Files, folders, manifests, or - for bytes on stdin.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=completion.models,
        help="Run folder or model file [default: $PERCEIVER_MODEL, then runs/latest].",
    ),
]


def _refuse_model(context: typer.Context, model: str | None) -> None:
    """Raise UsageError for the option -m of a command that takes the model as its argument."""
    if model is not None:
        fault = f"-m {show_path(model)}: {context.info_name} takes the model as its argument"
        raise UsageError(fault, f"type: {perceiver_command([*context.command_path.split(), model])}")


NoModelOption = Annotated[str | None, typer.Option("--model", "-m", hidden=True, callback=_refuse_model)]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:N or mps.")]
Views = Annotated[
    int | None,
    typer.Option(
        min=1, max=64, help="Views of each input to average: crops, draws of points, clips of sound and video."
    ),
]
Precision = Annotated[Floats, typer.Option(help="Precision of matrix products; auto is bf16 on a GPU, else fp32.")]
_workers = typer.Option(min=0, max=256, help="Processes that read files ahead.")
Workers = Annotated[int, _workers]
WorkersOfRecipe = Annotated[int | None, _workers]
Devices = Annotated[
    str | None, typer.Option(metavar="N", help="Processes on this machine: a number, or all for one per GPU.")
]
Timeout = Annotated[
    str | None, typer.Option(help="How long processes wait for one that does not answer [default: 30m].")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Batch size [default: what fits, at most 32 on a CPU].")]
Limit = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=VALUE", help="Raise a limit of an input, e.g. image_pixels=200M."),
]
Use = Annotated[str | None, typer.Option(metavar="A,B", help="Use only these modalities; the others count as missing.")]
Preset = Annotated[
    str | None,
    typer.Option(autocompletion=completion.presets, help="Recipe [default: the named model's, or a tiny one]."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", autocompletion=completion.settings, help="Change an option of a recipe."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="Recipe in a TOML file, e.g. config.toml of a run.")]
FilesFrom = Annotated[str | None, typer.Option(help="File that lists more paths, or - for stdin.")]
Null = Annotated[bool, typer.Option("--null", "-0", help="Paths of --files-from end in NUL (find -print0).")]
StdinName = Annotated[str, typer.Option(help="Name for the bytes on stdin.")]
GroupBy = Annotated[str | None, typer.Option(help="Keep a folder (parent) or column value in one split.")]
Root = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of a manifest's paths [default: its own].")]
PathColumns = Annotated[
    list[str] | None,
    typer.Option("--path-column", metavar="NAME", help="Manifest's column of paths, or image=NAME for one modality."),
]
Rows = Annotated[
    list[str] | None,
    typer.Option("--row", metavar="KEY=VALUE", help="Cell of one row to answer, for a model of a table's columns."),
]
TABLE = "table"  # in `--column`: a number, a category or a date, by its cells
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=KIND",
        help="Manifest's column as an input: text, table (number, category, date), a modality of files, auto, none.",
    ),
]
LabelColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Manifest's column of labels.")]
Pair = Annotated[
    Literal["media", "all", "none"] | None,
    typer.Option(help="Join files of one stem: media, also tables of numbers (all), or none [default: media]."),
]
On = Annotated[
    Literal["h100x8", "h100", "a100", "rtx4090", "cpu"] | None,
    typer.Option(help="Estimate memory, hours and disk of training on this machine."),
]
Pass = Annotated[
    str | None,
    typer.Option("--pass", metavar="A,B", help="Repeat these columns of a manifest or of records; * is all."),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE.py", help="Run this Python file first: it registers a modality."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _set_talk(option: typer.CallbackParam, wanted: bool) -> None:
    setattr(terminal, str(option.name), wanted)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_set_talk, help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=_set_talk, help="Print library messages too.")]


def length_changes(steps: int | None, limit_s: float | None = None, runs: int = 1) -> list[str]:
    """Return the assignments that replace every length of a recipe by `lengths`; `runs` runs share the time limit."""
    lengths = {"max_steps": None, "steps": steps, "max_time_s": limit_s and limit_s / runs}
    return [f"train.{key}={value or 'none'}" for key, value in lengths.items()]


def output(help: str, complete: Callable[..., Any] | None = None) -> Any:
    """Return the option --output, -o of a command: the path of what it writes."""
    return typer.Option("--output", "-o", parser=named, metavar="PATH", autocompletion=complete, help=help)


def named(text: str | Path) -> Path:
    """Return the path of an output. Raises UsageError for an empty name: Path takes it for the current folder."""
    if not os.fspath(text):
        raise UsageError("-o: the name is empty", "pass a name")
    return Path(text)


def check_data(data: str | None) -> None:
    """Raise a UsageError or DataError for data that does not exist, before torch is imported."""
    if data == "-":
        terminal.piped_stdin("perceiver preprocess DATA | perceiver train -")
    elif data == "":  # a variable that is not set, which Path takes for the current folder
        raise UsageError("no data given: the name is empty", "pass a folder, a manifest or records")
    elif data is not None and not glob.has_magic(data) and "{" not in data and status_of(data) is None:
        expected = "expected a folder of class folders, .csv, .tsv, .json, .txt, .parquet, .tar or .zip"
        raise DataError(f"{show_path(data)}: no such folder{similar_path(data)}", expected)


def data_options(
    root: str | None,
    path_columns: list[str] | None,
    label_column: str | None,
    pair: str | None = None,
    columns: list[str] | None = None,
) -> dict[str, Any]:
    """Return the given options about reading data, by their names in `DataConfig`."""
    from perceiver_cli.config import ANY, AUTO
    from perceiver_cli.preprocess import modality, names

    if root is not None and not os.path.isdir(root):
        raise UsageError(f"--root {show_path(root)}: no such folder")
    paths: dict[str, str] = {}
    for text in path_columns or []:
        kind, equals, name = text.partition("=")
        paths |= {kind: name} if equals and kind in (ANY, *names()) else {ANY: text}
    kinds = _kinds_of_columns(columns or [])
    files = [name for name in names() if not modality(name).cells]
    paths |= {kind: name for name, kind in kinds.items() if kind in files}
    kinds = {name: AUTO if kind == TABLE else kind for name, kind in kinds.items() if kind not in files}
    every = {
        "root": root, "path_column": paths or None, "columns": kinds or None, "label_column": label_column,
        "pair": pair,
    }  # fmt: skip
    return {name: value for name, value in every.items() if value is not None}


def passed_columns(text: str | None, style: str = "jsonl") -> dict[str, Any]:
    """Return the columns of `--pass` as the option `pass_columns` of `DataConfig`, for an output in a format.

    Raises UsageError for the name of a key of answers, or for * in a format that needs all names.
    """
    if text is None:
        return {}
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if own := sorted({*names} & OWN_KEYS):
        raise UsageError(f"--pass {own[0]}: answers already have a key {own[0]}", "rename the column")
    if "*" in names and style in ("csv", "tsv"):
        raise UsageError(f"--pass '*': {style} needs the names of its columns", "pass --pass A,B, or --format jsonl")
    return {"pass_columns": names}


def _kinds_of_columns(texts: list[str]) -> dict[str, str]:
    """Return the kind of each column of `--column`; a comma separates columns if each has a kind."""
    kinds: dict[str, str] = {}
    for text in texts:
        parts = text.split(",")
        for part in parts if all("=" in part for part in parts) else [text]:
            name, equals, kind = part.rpartition("=")
            if not equals or not name:
                raise UsageError(f"--column {text}: expected NAME=KIND", "such as price=number,title=text,photo=image")
            kinds[name] = kind
    return kinds


def data_changes(options: Mapping[str, Any]) -> list[str]:
    """Return `data_options` as assignments to a configuration."""
    from perceiver_cli.config import READING, Flag

    changes: list[str] = []
    for name, value in options.items():
        keys = {f"data.{name}.{dumps(key)}": word for key, word in value.items()} if isinstance(value, dict) else {}
        for key, each in (keys or {f"data.{name}": value}).items():
            changes.append(Flag(f"{READING[name]} {each}", key, each))
    return changes


def model_file(model: str | None) -> Path:
    """Return the named model file, or print and return the default one; check its header before torch is imported."""
    from perceiver_cli.model.checkpoint import read_info
    from perceiver_cli.run_folder import find_model

    path = find_model(model)
    read_info(path)
    if model is None:
        terminal.say(f"using {show_path(path)}")
    return path


def open_predictor(
    path: Path,
    device: str,
    precision: str,
    limit: list[str] | None,
    use: str | None,
    data: Mapping[str, Any] | None = None,
    views: int | None = None,
) -> Any:
    """Return the Predictor of a model file that the options ask for. data: see `data_options`."""
    from perceiver_cli.inference.predictor import Predictor

    used = None if use is None else re.split(r"[,\s]+", use.strip())
    predictor = Predictor(path, device, precision, use=used, views=views)
    predictor.reader.limits = predictor.reader.limits.raised(raised_limits(limit))
    predictor.options = data or {}
    return predictor


class Cut(NamedTuple):
    """The options that cut long inputs into windows; see `windows_of`."""

    window: float | None
    hop: float | None
    every: float | None
    aggregate: Aggregate | None
    merge: bool

    @property
    def is_wanted(self) -> bool:
        """Whether there are windows at all."""
        return self.merge or self.window is not None or self.every is not None

    def check(self, workers: int) -> None:
        """Raise UsageError for options that contradict each other."""
        one = "--merge" if self.merge else "--every"
        if any(seconds is not None and seconds <= 0 for seconds in (self.window, self.hop, self.every)):
            hop = next((hop for hop in (self.hop, self.every) if hop is not None), self.window)
            raise UsageError(f"windows of {self.window or 0:g} s every {hop:g} s, expected more than 0 s for both")
        if not self.is_wanted:
            if self.hop is not None or self.aggregate is not None:
                fault = f"--{'hop' if self.hop is not None else 'aggregate'} needs windows"
                raise UsageError(fault, "pass --window SECONDS")
        elif workers:
            raise UsageError("--workers reads whole files", "leave it out: windows are cut from one file at a time")
        elif self.hop is not None and self.every is not None:
            raise UsageError("--every and --hop are both the seconds between windows", "pass one of them")
        elif (self.merge or self.every is not None) and self.aggregate not in (None, "none"):
            raise UsageError(f"{one} keeps windows apart, --aggregate makes one answer of them", "pass one of them")


def windows_of(cut: Cut, predictor: Any) -> Any:
    """Return the Windows that the options describe for a Predictor, or None.

    A window is as long as the model's clip by default. Windows adjoin; with --merge each overlaps half of the last one.
    """
    if not cut.is_wanted:
        return None
    from perceiver_cli.inference.predictor import Windows

    window = predictor.clip_s if cut.window is None else cut.window
    hops = (cut.hop, cut.every, window / 2 if cut.merge else window)
    kept_apart = cut.merge or cut.every is not None
    return Windows(
        window, next(hop for hop in hops if hop is not None), cut.aggregate or ("none" if kept_apart else "mean")
    )


def recipe_of(preset: str | None, config: Path | None) -> Any:
    """Return the Config of a preset or a TOML file, or None if neither is named."""
    from perceiver_cli.config import load_config, load_preset

    if preset is not None and config is not None:
        raise UsageError("--preset and --config are two recipes", "pass one of them")
    return load_preset(preset) if preset is not None else load_config(config) if config is not None else None


def seconds(text: str | None, option: str = "--max-time") -> float | None:
    """Return a time such as "300", "5m" or "1h30m" in seconds."""
    return None if text is None else duration(f"{option} {text}", text)


def duration(option: str, text: str) -> float:
    """Return a time such as "300", "5m" or "1h30m" in seconds. option: as typed, for the error."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    hours, minutes, rest = (float(digits or 0) for digits in match.groups()) if match else (0.0, 0.0, 0.0)
    if (total := hours * 3600 + minutes * 60 + rest) <= 0:
        raise UsageError(f"{option}: not a time", "expected 300, 90s, 5m or 1h30m")
    return total


def raised_limits(assignments: list[str] | None) -> dict[str, float]:
    """Return the limits in NAME=VALUE assignments; see `number` for the values, and `duration` for those in seconds."""
    from perceiver_cli.preprocess.spec import Limits

    raised: dict[str, float] = {}
    for assignment in assignments or []:
        name, _, text = assignment.partition("=")
        if name not in Limits.model_fields:
            raise UsageError(f"--limit {assignment}: expected NAME=NUMBER", f"names: {', '.join(Limits.model_fields)}")
        value = (duration if name.endswith("_seconds") else number)(f"--limit {assignment}", text)
        raised[name] = int(value) if value.is_integer() else value
    return raised


def limit_changes(assignments: list[str] | None) -> list[str]:
    """Return the overrides of a recipe that raise the limits in NAME=VALUE assignments."""
    from perceiver_cli.config import Flag

    raised = raised_limits(assignments).items()
    return [Flag(f"--limit {name}={value}", f"data.limits.{name}", value) for name, value in raised]


def number(option: str, text: str) -> float:
    """Return a number that may end in k, M or G, powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if match is None:
        raise UsageError(f"{option}: expected a number such as 500k, 64M or 1.5G")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]
