"""The contents of records: the header of a stream, the facts of an example, its arrays."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np

from perceiver_cli.config import Config
from perceiver_cli.errors import DataError, IntegrityError, PerceiverError
from perceiver_cli.files import parse_json, show_path
from perceiver_cli.preprocess import modality, timed_modality, with_time
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Span, check_contract, cut_windows
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits, stemless
from perceiver_cli.records.digests import CHUNK, DIGEST, digests
from perceiver_cli.records.npy import parse_npy

FORMAT = 1
HEAD_BYTES = 512  # enough to recognise a stream
MAX_VALUE = 1e10  # the square of a larger value comes near the largest float32
SPLITS = ("train", "val", "test")
_HEX = re.compile("([0-9a-f]{8})*")

Content = Literal["decoded", "prepared", "fourier"]
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """How all records of a stream were prepared.

    inputs: options by modality, none of them "auto". classes: names, in the order of KEY.cls. content: "decoded" arrays
    of files, from which training draws its crops; "prepared" inputs of the model, augmented or not; "fourier": these
    inputs as rows (M, C) with Fourier features.
    """

    inputs: Mapping[str, InputSpec]
    classes: tuple[str, ...] = ()
    multi_label: bool = False
    content: Content = "decoded"

    @cached_property
    def class_index(self) -> dict[str, int]:
        """The index of each class name."""
        return {name: index for index, name in enumerate(self.classes)}

    @cached_property
    def preparation(self) -> dict[str, dict[str, Any]]:
        """By modality, the options that change the arrays."""
        return {name: self._options(spec) for name, spec in sorted(self.inputs.items())}

    def _options(self, spec: InputSpec) -> dict[str, Any]:
        options = spec.model_dump(mode="json")
        decides = modality(spec.modality).decides if self.content == "decoded" else None
        return {key: options[key] for key in sorted(options) if decides is None or key in decides}

    @cached_property
    def hash(self) -> str:
        """A hash of content and preparation; comparable arrays have the same."""
        facts = json.dumps([FORMAT, self.content, self.preparation], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def settled(self, specs: Mapping[str, InputSpec]) -> dict[str, InputSpec]:
        """Return `specs` with the stream's value in place of each "auto", and without a stem for Fourier features."""
        settled = {}
        for name, spec in specs.items():
            if name in self.inputs:
                spec = stemless(spec) if self.content == "fourier" else spec
                spec = spec.filled(vars(self.inputs[name]))
            settled[name] = modality(name).resolve(spec, [], Limits())
        return settled

    def check(self, shown: str, specs: Mapping[str, InputSpec], whose: str) -> None:
        """Raise DataError with the first option that differs, unless `specs` would give the same arrays."""
        for name in sorted(specs.keys() & self.inputs.keys()):
            theirs, ours = self.preparation[name], self._options(specs[name])
            for key in sorted({*theirs, *ours}):
                if theirs.get(key) != ours.get(key):
                    one, other = json.dumps(theirs.get(key, [])), json.dumps(ours.get(key, []))
                    fault = f"{shown}: prepared with inputs.{name}.{key} = {one}, but {whose} has {other}"
                    raise DataError(fault, "prepare it as the model does: perceiver preprocess -m MODEL")

    def to_json(self) -> bytes:
        """Return the content of the header member."""
        inputs = {name: spec.model_dump(mode="json") for name, spec in sorted(self.inputs.items())}
        arrays = {}
        for name, spec in self.inputs.items() if self.content == "decoded" else ():
            dtype, shape = modality(name).loaded(spec)
            arrays[name] = {"dtype": dtype, "shape": [side if side is None else int(side) for side in shape]}
        facts = {
            "format": FORMAT, "content": self.content, "hash": self.hash, "inputs": inputs, "arrays": arrays,
            "classes": list(self.classes), "multi_label": self.multi_label,
        }  # fmt: skip
        return json.dumps(facts).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, shown: str) -> Header:
        """Return the header in a member's content. Raises IntegrityError."""
        facts = json_object(data, f"{shown}: the header")
        if facts.get("format") != FORMAT:
            raise IntegrityError(f"{shown}: records of format {facts.get('format')!r:.20}, expected {FORMAT}")
        names: Any = facts.get("classes")
        content: Any = facts.get("content")
        if not are_names(names):
            raise IntegrityError(f"{shown}: the header has no list of classes")
        if content not in get_args(Content):
            raise IntegrityError(f"{shown}: records of content {content!r:.20}, expected decoded, prepared or fourier")
        try:
            inputs = Config.parse({"inputs": facts.get("inputs")}, f"{shown}: the header").inputs
            for name, spec in inputs.items():
                modality(name).layout(spec)
        except PerceiverError as error:
            raise IntegrityError(str(error)) from error
        return cls(inputs, tuple(names), facts.get("multi_label") is True, content)


@dataclass(frozen=True)
class Facts:
    """The facts of a record beside its arrays.

    path: the input's path, as the user named it. id: decides split and seeds; in a data folder, the path below it.
    labels: class names. seconds: length of the input, by modality with a time axis. error: why an input could not be
    read and has no arrays. digests: of the arrays in NPY format, by modality; none in records of version 0.1.0.
    columns: other cells of its row in a manifest, by column.
    """

    path: str
    id: str
    split: str = "train"
    labels: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    digests: Mapping[str, bytes] = field(default_factory=dict, compare=False)
    columns: Mapping[str, str] = field(default_factory=dict)

    def to_json(self, multi_label: bool) -> bytes:
        """Return the content of the member KEY.json, or of ERROR."""
        facts = {
            "path": self.path, "id": self.id, "split": self.split,
            "labels": list(self.labels) if multi_label else None,
            "label": self.labels[0] if self.labels and not multi_label else None,
            "seconds": dict(self.seconds) or None, "error": self.error,
            "columns": dict(self.columns) or None,
            "digests": {name: found.hex() for name, found in self.digests.items()} or None,
        }  # fmt: skip
        return json.dumps({key: value for key, value in facts.items() if value is not None}).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, shown: str) -> Facts:
        """Return the facts in a member's content. Raises IntegrityError."""
        facts = json_object(data, shown)
        path: Any = facts.get("path")
        label, error = facts.get("label"), facts.get("error")
        labels = [label] if label is not None else facts.get("labels", [])
        identity, split, seconds = facts.get("id", path), facts.get("split", "train"), facts.get("seconds", {})
        lengths = seconds.values() if isinstance(seconds, dict) else [None]
        sums, columns = facts.get("digests", {}), facts.get("columns", {})
        hexes = sums.values() if isinstance(sums, dict) else [None]
        for fits, fault in (
            (are_names([path, identity]) and split in SPLITS, "expected path, id and split of a record"),
            (are_names(labels), "labels that are not names"),
            (all(isinstance(s, float | int) and s >= 0 for s in lengths), "seconds that are not lengths"),
            (isinstance(error, str | None), "an error that is not text"),
            (isinstance(columns, dict) and are_names([*columns.values()]), "columns that are not text"),
            (all(isinstance(h, str) and _HEX.fullmatch(h) for h in hexes), "digests that are not hexadecimal"),
        ):
            if not fits:
                raise IntegrityError(f"{shown}: {fault}")
        found = {name: bytes.fromhex(value) for name, value in sums.items()}
        return cls(path, identity, split, tuple(labels), seconds, error, found, columns)


@dataclass(frozen=True)
class Record(Generic[T]):
    """One example of a stream; arrays: in NPY format or places in a file. An unreadable input has only facts."""

    key: str
    facts: Facts
    arrays: Mapping[str, T]


def are_names(value: Any) -> bool:
    """Return whether a value from JSON is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def json_object(data: bytes, shown: str) -> dict[str, Any]:
    """Return the JSON object in a member's content. Raises IntegrityError."""
    try:
        facts = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{shown}: not JSON") from error
    if not isinstance(facts, dict):
        raise IntegrityError(f"{shown}: not a JSON object")
    return facts


@dataclass(frozen=True)
class Stored:
    """One modality of a record: a decoded array, used like an encoded file (`Input` in data/inputs.py).

    name: the input's name. length_s: the input's length, of sound and video. read: returns the array in NPY format.
    digests: of that array, to be checked; empty in records of version 0.1.0. within: the stream or tar that holds it,
    for messages. mark: called when the whole array matches its digests.
    """

    name: str
    header: Header
    modality: str
    length_s: float
    read: Callable[[], bytes | memoryview]
    digests: bytes = b""
    within: str = ""
    mark: Callable[[], None] | None = None

    @property
    def shown(self) -> str:
        """The name, safe to print."""
        return show_path(self.name)

    @property
    def origin(self) -> str:
        """A name for the bytes of `content`."""
        return f"{self.name}\0{self.modality}"

    @property
    def is_prepared(self) -> bool:
        """Whether crops and augmentation are done: the array is an input of the model."""
        return self.header.content != "decoded"

    @property
    def seconds(self) -> float | None:
        """The length on the time axis; None without a time axis or after a clip was cut."""
        return None if self.is_prepared or timed_modality(self.modality) is None else self.length_s

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield the array in NPY format. Raises DataError if it is damaged."""
        data = memoryview(self.read())
        self._compare(data, 0, len(data))
        yield data

    def array(self, span: Span | None = None) -> Array:
        """Return the decoded array or a span of it, read-only. Raises DataError for a wrong dtype or shape."""
        dtype, shape = modality(self.modality).loaded(self.header.inputs[self.modality])
        return self._checked((dtype,), shape, span)

    def windows(self, window_s: float, hop_s: float) -> Iterator[tuple[float, Array]]:
        """Yield (start in seconds, array) of each window; see `TimedModality.windows`."""
        return cut_windows([self.array()], self._steps_hz, window_s, hop_s)

    @property
    def _steps_hz(self) -> float:
        return with_time(self.modality).steps_hz(self.header.inputs[self.modality])

    def prepared(self) -> ByteArray:
        """Return the model's input. Raises DataError for an array of a wrong dtype or shape, or not finite."""
        kind, spec = modality(self.modality), self.header.inputs[self.modality]
        layout, dtype = kind.layout(spec), np.dtype(kind.loaded(spec)[0])
        if self.header.content == "fourier":
            rows = self._checked(("float32", "float16"), (layout.num_inputs, layout.num_channels))
            return _without_features(rows.astype(np.float32, copy=False), layout, dtype)
        if layout.is_grid:
            return ByteArray(self._checked((dtype.name,), layout.prepared_shape))
        rows = self._checked(("float32",), (layout.positions_shape[0], layout.dims + layout.channels))
        return ByteArray(rows[:, layout.dims :], rows[:, : layout.dims])

    def _checked(self, dtypes: Sequence[str], shape: tuple[int | None, ...], span: Span | None = None) -> Array:
        """Return the array, or a span of it, if dtype and shape fit; only its chunks are read and checked."""
        data = memoryview(self.read())
        self._compare(data, 0, len(data) if span is None else 1)
        array = parse_npy(data, f"{self.shown}: {self.modality}")
        fits = array.ndim == len(shape) and all(s in (None, n) for n, s in zip(array.shape, shape, strict=True))
        if not fits or array.dtype not in [np.dtype(name) for name in dtypes]:
            sides = ", ".join("n" if side is None else str(side) for side in shape)
            actual = f"{self.shown}: {self.modality} of {array.dtype} {array.shape}"
            raise DataError(f"{actual}, expected {dtypes[0]} ({sides})")
        if span is not None:
            first = max(0, round(span[0] * self._steps_hz))
            begin = len(data) - array.nbytes + first * array.strides[0]
            array = array[first : first + max(1, round(span[1] * self._steps_hz))]
            self._compare(data, begin, begin + array.nbytes)
        check_contract(Source(self.name), array, "values")
        if array.dtype.kind == "f" and float(np.abs(array).max()) > MAX_VALUE:
            raise DataError(f"{self.shown}: {self.modality} with values above {MAX_VALUE:g}")
        return array

    def _compare(self, data: memoryview, begin: int, end: int) -> None:
        """Raise DataError if a chunk that holds any of the array's bytes `begin` to `end` is damaged."""
        if not self.digests:
            return
        low, high = begin // CHUNK, -(-end // CHUNK)
        if digests(data[low * CHUNK : high * CHUNK]) != self.digests[low * DIGEST : high * DIGEST]:
            fault = f"{self.within}: {self.modality} of the record {self.shown} is damaged"
            raise DataError(f"{fault}: its bytes are not those that were written", "prepare its file again")
        if self.mark is not None and low == 0 and end == len(data):
            self.mark()


def _without_features(rows: Array, layout: Layout, dtype: np.dtype[Any]) -> ByteArray:
    """Return the byte array of rows (M, C) without their Fourier features; values get `dtype`."""
    values = rows[:, : layout.channels] * np.array(layout.std, np.float32) + np.array(layout.mean, np.float32)
    if not layout.is_grid:
        return ByteArray(values, rows[:, layout.channels : layout.channels + layout.dims])
    if dtype.kind in "ui":
        values = np.rint(values).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return ByteArray(values.astype(dtype).reshape(layout.prepared_shape))


def header_check(shown: str, first: Header, second: Header) -> None:
    """Raise DataError unless the records of two streams can be read as one stream."""
    if first.content != second.content or first.inputs.keys() != second.inputs.keys():
        kinds = [f"{'+'.join(header.inputs)} {header.content}" for header in (first, second)]
        raise DataError(f"{shown}: records of {kinds[0]}, then of {kinds[1]}", "prepare both with the same options")
    second.check(shown, first.inputs, "the previous stream")
    if first.multi_label != second.multi_label:
        raise DataError(f"{shown}: records with several labels, and with one", "prepare both with the same options")
