"""Cells of a row: numbers, categories and dates, one input for each column (a date has several).

An input is a sum of learned vectors of its column (Gorishniy et al. 2021, arXiv 2106.11959). A number has a constant
vector, one times the number, standardised by training statistics, and one times each of its sines and cosines: the
periodic embeddings of Gorishniy et al. 2022 (arXiv 2203.05556), here with fixed frequencies. A category has its own. A
missing cell has the vector of missing cells if training had some, else it is hidden from attention. So is a category
that training did not have, unless training had rare ones: these share a vector, which it takes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import parse_json, show_path
from perceiver_cli.preprocess import register
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Modality, Parts, Rng
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits, Positive, Size, Table
from perceiver_cli.preprocess.text import as_text

Kind = Literal["number", "category", "date"]
Part = Literal["", "day", "month", "weekday", "hour"]  # of a date


class Column(Table):
    """One input of a table: a column, or a part of a column of dates, with its statistics on the training rows."""

    name: str
    kind: Kind = "number"
    part: Part = ""  # of a date: "day" is a number, the others are categories
    mean: float = 0.0  # of a number
    std: Positive = 1.0  # of a number
    categories: tuple[str, ...] = ()  # known ones, the most common first
    has_missing: bool = False  # whether training rows lack it
    has_rare: bool = False  # whether training rows have categories that are too rare to be known

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each category, from 1 on."""
        return {name: place for place, name in enumerate(self.categories, start=1)}

    @property
    def is_number(self) -> bool:
        """Whether its value is a number."""
        return self.kind == "number" or self.part == "day"


class TableSpec(InputSpec):
    """Cells of a row as inputs: numbers standardised, with sines and cosines; categories with vectors of their own."""

    modality: Literal["table"] = "table"
    bands: Annotated[int, Field(ge=0, le=4096)] = 0  # a column has vectors of its own, so it needs no position
    # The columns with their training statistics; "auto": the cells of the training rows, at most 100,000 of them.
    columns: Annotated[tuple[Column, ...], Field(max_length=4096)] | Literal["auto"] = "auto"
    embedding_channels: Size = 128  # width of the learned vectors
    frequencies: Annotated[int, Field(ge=0, le=64)] = 4  # pairs of a sine and a cosine for a number
    longest: Positive = 8.0  # period of the slowest sine in stds; each further sine has half the period before it
    max_categories: Size = 1000  # known categories of a column; rarer ones share a vector
    min_count: Size = 2  # training rows that a known category has
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0  # training: share of cells that are hidden


MISSING = ("", "nan", "null", "n/a", "na", "<na>", "nat", "?")  # what programs write into an empty cell
FARTHEST = 10.0  # standard deviations from the mean, to which numbers are clipped
MAX_CELL = 1 << 16  # characters of a cell that is no text
FEW = 20  # in more rows than these, cells that all differ are names of the rows
WORDS, LETTERS = 2.5, 24  # mean words or letters of a cell, above which a column is text
DIFFERENT, MANY = 0.5, 30  # share and number of different cells, above either of which it is text
MADE_UP = 8  # columns if no data says how many there are
DAY_S = 86_400
PLURALS = {"number": "numbers", "category": "categories", "date": "dates"}


class TableModality(Modality[TableSpec]):
    """Cells of a manifest, which other modalities do not read."""

    name = "table"
    formats = "columns of a manifest: numbers, categories, dates"
    precedence = 9
    cells = ("number", "category", "date")
    probes = 100_000
    decides = ("columns",)
    preparation = (
        "for each of the columns in the options: a number less its mean, divided by its std; a category as its place "
        "in categories; codes and weights of learned vectors as in perceiver_cli/preprocess/table.py"
    )

    def sniff(self, head: bytes, name: str) -> bool:
        return False

    def may_read(self, head: bytes, name: str) -> bool:
        return head.startswith(b'[["')  # as `of_cells` writes

    def of_cells(self, cells: Sequence[tuple[str, str, Any]]) -> bytes | None:
        """Return JSON: [column, kind, text] of each cell that is not empty."""
        each = [[name, kind, text] for name, kind, cell in cells if (text := _known(cell)) is not None]
        return json.dumps(each).encode() if each else None

    def load(self, source: Source, spec: TableSpec, limits: Limits) -> Array:
        """Return (columns, 2) float32: the value of each, and 1, or 0 for a missing one.

        A value is a number less its mean, in standard deviations, or the place of a category from 1 on, 0 if unknown.
        Raises DataError for a cell that is not of its column's kind, and if no column has a value.
        """
        cells = _cells_of(source, limits)
        columns = () if spec.columns == "auto" else spec.columns
        values = np.zeros((len(columns), 2), np.float32)
        for place, column in enumerate(columns):
            if (text := cells.get(column.name, (column.kind, None))[1]) is not None:
                values[place] = _value(source, column, text), 1.0
        if not values[:, 1].any():
            named = ", ".join(show_path(column.name) for column in columns[:5])
            raise DataError(f"{source.shown}: no value in any column", f"expected some of {named}")
        return values

    def loaded(self, spec: TableSpec) -> tuple[str, tuple[int | None, ...]]:
        return "float32", (len(spec.columns), 2)

    def resolve(self, spec: TableSpec, sources: Sequence[Source], limits: Limits) -> TableSpec:
        """Return `spec` with the columns of `sources` and their statistics; without sources, with made-up columns.

        Raises DataError if no column has two values.
        """
        if spec.columns != "auto":
            return spec
        if not sources:
            made_up = tuple(Column(name=f"column {number}") for number in range(1, MADE_UP + 1))
            return spec.model_copy(update={"columns": made_up})
        rows = [_cells_of(source, limits) for source in sources]
        kinds: dict[str, Kind] = {name: kind for row in rows for name, (kind, _) in row.items()}
        columns = [new for name, kind in kinds.items() for new in _measured(spec, name, kind, sources, rows)]
        if not columns:
            raise DataError("no column of the table has two different values", "name others with --column")
        return spec.model_copy(update={"columns": tuple(columns)})

    def in_words(self, spec: TableSpec) -> str:
        columns = () if spec.columns == "auto" else spec.columns
        kinds = Counter({column.name: column.kind for column in columns}.values())
        return "columns: " + ", ".join(f"{count} of {PLURALS[kind]}" for kind, count in kinds.items())

    def layout(self, spec: TableSpec) -> Layout:
        """Return a grid of one input for each column; codes of learned vectors, then their weights."""
        if spec.columns == "auto":
            raise UsageError("inputs.table.columns is still 'auto', expected columns")
        if not spec.columns:
            raise UsageError("inputs.table.columns is empty, expected one column or more")
        slots = 2 + 2 * spec.frequencies
        return Layout.of_grid(spec, (len(spec.columns),), 2 * slots, stem="embed", codes=int(_starts(spec)[-1]),
                              presence=slots, stem_channels=spec.embedding_channels)  # fmt: skip

    def prepare(self, raw: Array, spec: TableSpec, rng: Rng | None) -> ByteArray:
        """Return (columns, 2 slots) float32: codes of learned vectors, then their weights.

        Codes of a number's column: missing, constant, linear, sines, cosines; of categories: missing, unknown, each.
        """
        assert spec.columns != "auto"
        starts, f = _starts(spec), spec.frequencies
        value, is_there = raw[:, 0], raw[:, 1] != 0
        numbers = np.array([column.is_number for column in spec.columns])
        taught = np.array([column.has_missing for column in spec.columns])
        unknown = ~numbers & (value == 0) & ~np.array([column.has_rare for column in spec.columns])
        codes = np.zeros((len(raw), 2 + 2 * f))
        weights = np.zeros_like(codes)
        codes[:, 0] = starts[:-1] + np.where(is_there, 1 + np.where(numbers, 0, value), 0)
        weights[:, 0] = np.where(is_there, ~unknown, taught)
        codes[:, 1:] = np.where(numbers[:, None], (starts[:-1] + 2)[:, None] + np.arange(1 + 2 * f), 0)
        angles = 2 * np.pi / spec.longest * value[:, None] * 2.0 ** np.arange(f)
        waves = np.column_stack([value, np.sin(angles), np.cos(angles)])
        weights[:, 1:] = np.where((numbers & is_there)[:, None], waves, 0)
        if rng is not None and spec.drop:
            shown = np.flatnonzero(weights[:, 0])
            hidden = shown[rng.random(len(shown)) < spec.drop]
            weights[hidden[: len(shown) - 1]] = 0.0
        return ByteArray(np.hstack([codes, weights]).astype(np.float32))

    def parts(self, raw: Array, spec: TableSpec) -> Parts:
        """Return the columns with their values."""
        assert spec.columns != "auto"
        names = [f"{_title(column)} = {_shown(column, *pair)}" for column, pair in zip(spec.columns, raw, strict=True)]
        return Parts(names, np.arange(len(names))[:, None])

    def fault(self, raw: Array) -> str | None:
        return None


MODALITY = TableModality()
register(MODALITY)


def inferred(name: str, cells: Sequence[Any]) -> str | None:
    """Return the kind of a column by its cells, None for one that tells nothing: empty, constant, names of the rows."""
    texts = [text for cell in cells if (text := _known(cell)) is not None]
    different = len(set(texts))
    if different < 2 or name.strip().lower() in ("", "id", "index", "unnamed: 0"):
        return None
    if all(_number(text) is not None for text in texts):
        if any(len(text) > 1 and text.isdigit() and text[0] == "0" for text in texts):
            return "category"  # post codes
        steps = np.diff([float(text) for text in texts])
        return None if (steps == 1).all() and len(texts) > FEW else "number"  # counts the rows
    if all(_date(text) is not None for text in texts):
        return "date"
    words, letters = (sum(map(size, texts)) / len(texts) for size in (lambda text: len(text.split()), len))
    if (words > WORDS or letters > LETTERS) and different > min(DIFFERENT * len(texts), MANY):
        return "text"
    return None if different == len(texts) > FEW and words == 1 else "category"


def _known(cell: Any) -> str | None:
    """Return a cell as text, None for a missing one."""
    text = str(cell).lower() if isinstance(cell, bool) else as_text(cell)
    return None if text.lower() in MISSING else text


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _date(text: str) -> datetime | None:
    """Return a date or time in ISO 8601, also with slashes; without a zone it is taken as UTC."""
    try:
        date = datetime.fromisoformat(text.replace("/", "-", 2))
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):  # the latter in the year 1
        return None


def _cells_of(source: Source, limits: Limits) -> dict[str, tuple[Kind, str]]:
    """Return the kind and text of each cell of a row by its column. Raises DataError."""
    try:
        rows = parse_json(source.read(limits))
        if not {kind for _, kind, _ in rows} <= {*get_args(Kind)}:
            raise ValueError("an unknown kind of cell")
        return {str(name): (kind, str(text)[:MAX_CELL]) for name, kind, text in rows}
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{source.shown}: not the cells of a row", "expected columns of a manifest") from error


def _value(source: Source, column: Column, text: str) -> float:
    """Return the value of a cell, see `TableModality.load`. Raises DataError if it is not of the column's kind."""
    value = _raw(column.kind, column.part, text)
    if value is None:
        fault = f"{source.shown}: column {show_path(column.name)} has {show_path(text)}, expected a {column.kind}"
        raise DataError(fault, "as 2024-12-31 or 2024-12-31T23:59:59" if column.kind == "date" else "")
    if isinstance(value, str):
        return float(column.places.get(value, 0))
    return float(np.clip((value - column.mean) / column.std, -FARTHEST, FARTHEST))


def _raw(kind: Kind, part: Part, text: str) -> float | str | None:
    """Return the number or category of a cell or of a part of it, None if it is not of the kind."""
    if kind == "category":
        return text
    if kind == "number":
        return _number(text)
    date = _date(text)
    if date is None:
        return None
    numbers = {"month": date.month, "weekday": date.isoweekday(), "hour": date.hour}
    return str(numbers[part]) if part in numbers else date.timestamp() / DAY_S


def _measured(
    spec: TableSpec, name: str, kind: Kind, sources: Sequence[Source], rows: Sequence[dict[str, tuple[Kind, str]]]
) -> list[Column]:
    """Return the inputs of a column with their statistics; without any if all cells are equal."""
    parts: tuple[Part, ...] = ("day", "month", "weekday", "hour") if kind == "date" else ("",)
    columns = []
    texts = [row[name][1] for row in rows if name in row]
    for part in parts:
        values = [value for text in texts if (value := _raw(kind, part, text)) is not None]
        counts = Counter(values)
        if len(counts) < 2:
            continue
        fields: dict[str, Any] = {"name": name, "kind": kind, "part": part, "has_missing": len(texts) < len(rows)}
        if isinstance(values[0], str):
            ranked = sorted(counts, key=lambda value: (-counts[value], value))
            known = [value for value in ranked if counts[value] >= spec.min_count][: spec.max_categories]
            fields |= {"categories": tuple(known), "has_rare": len(known) < len(counts)}
        else:
            numbers = np.array(values, np.float64)
            mean, std = float(numbers.mean()), float(numbers.std())
            if not (math.isfinite(std) and std > 0):
                continue
            fields |= {"mean": float(f"{mean:.9g}"), "std": float(f"{std:.6g}")}
        columns.append(Column(**fields))
    return columns


def _starts(spec: TableSpec) -> Any:
    """Return the first code of each column, then the number of codes."""
    assert spec.columns != "auto"
    sizes = [3 + 2 * spec.frequencies if c.is_number else 2 + len(c.categories) for c in spec.columns]
    return np.cumsum([0, *sizes])


def _title(column: Column) -> str:
    return f"{column.name}, {column.part}" if column.part else column.name


def _shown(column: Column, value: float, is_there: float) -> str:
    """Return a value as it stands in its cell."""
    if not is_there:
        return "missing"
    if not column.is_number:
        return column.categories[int(value) - 1] if value else "unknown"
    number = column.mean + column.std * float(value)
    if column.part == "day":
        hours = round(number * 24)  # float32 holds no seconds
        return (datetime(1970, 1, 1) + timedelta(hours=hours)).date().isoformat()
    return f"{number:.6g}"
