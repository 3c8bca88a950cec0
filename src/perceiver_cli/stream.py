"""Records as a tar stream: what `preprocess` writes, and the reader that notices when it was cut short. No torch.

A record is one example in adjacent members named as WebDataset does: `KEY.json` (path, id, label, split), `KEY.cls`
(class index) and `KEY.<modality>.npy`, one for each modality that the example has. The first member says how the arrays
were prepared, the last one how many records there are; an input that could not be read has a member of its own in its
place, which other tools pass over; streams may follow each other (`cat a.tar b.tar`). Nothing of it depends on the time
or the machine: the same examples give the same bytes.

Everything that is read is checked before memory is taken for it; no member is ever unpacked to a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any, BinaryIO, Generic, Literal, TypeVar
from zlib import adler32

import numpy as np

from perceiver_cli.config import Config, InputSpec, Limits
from perceiver_cli.errors import DataError, IntegrityError, LimitError, PerceiverError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Source, Span, check_contract
from perceiver_cli.preprocess.rows import METADATA, is_safetensors

FORMAT = 1
# Without a dot, and wrapped in underscores: WebDataset and Hugging Face pass over members of such names.
HEAD_BYTES = 512  # that tell what a stream is
HEADER, ERROR, END = "__perceiver__/header", "__perceiver__/error", "__perceiver__/end"
BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_NAME = 100  # bytes, of a member in USTAR
MAX_JSON_BYTES = 1 << 20  # of a record's facts
MAX_HEADER_BYTES = 64 << 20  # class names are in it
MAX_NPY_HEADER = 4096
MAX_VALUE = 1e10  # beyond, squares come near the end of float32
SPLITS = ("train", "val", "test")
COMPRESSED = {b"\x1f\x8b": "zcat", b"\x28\xb5\x2f\xfd": "zstd -dc", b"\xfd7zXZ\0": "xz -dc", b"BZh": "bzcat"}

Content = Literal["decoded", "prepared", "fourier"]
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a stream says of all its records.

    inputs: by modality, how they were prepared; nothing in it is "auto". classes: names, in the order of KEY.cls.
    content: decoded: arrays as files decode to, from which training draws its crops; prepared: what the model is given,
    augmented or not; fourier: the same as rows (M, C) with Fourier features.
    """

    inputs: Mapping[str, InputSpec]
    classes: tuple[str, ...] = ()
    multi_label: bool = False
    content: Content = "decoded"

    @cached_property
    def class_index(self) -> dict[str, int]:
        """The place of each class."""
        return {name: place for place, name in enumerate(self.classes)}

    @cached_property
    def preparation(self) -> dict[str, dict[str, Any]]:
        """By modality, the options that the arrays depend on: those that decoding looks at, or all where it went on."""
        return {name: self._of(spec) for name, spec in sorted(self.inputs.items())}

    def _of(self, spec: InputSpec) -> dict[str, Any]:
        options = spec.model_dump(mode="json")
        decides = modality(spec.modality).decides if self.content == "decoded" else None
        return {key: options[key] for key in sorted(options) if decides is None or key in decides}

    @cached_property
    def hash(self) -> str:
        """Of content and preparation: equal where arrays are comparable."""
        facts = json.dumps([FORMAT, self.content, self.preparation], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def settled(self, specs: Mapping[str, InputSpec]) -> dict[str, InputSpec]:
        """Return specs in which every "auto" has the stream's value."""
        found = {}
        for name, spec in specs.items():
            if name in self.inputs:
                autos = [key for key in type(spec).model_fields if getattr(spec, key) == "auto"]
                spec = spec.model_copy(update={key: getattr(self.inputs[name], key) for key in autos})
            found[name] = modality(name).resolve(spec, [], Limits())
        return found

    def check(self, shown: str, specs: Mapping[str, InputSpec], whose: str) -> None:
        """Raise DataError unless the arrays are what `specs` would give; names the first option that differs."""
        for name in sorted(specs.keys() & self.inputs.keys()):
            theirs, ours = self.preparation[name], self._of(specs[name])
            for key in theirs:
                if theirs[key] != ours[key]:
                    raise DataError(
                        f"{shown}: prepared with inputs.{name}.{key} = {json.dumps(theirs[key])}, but {whose} has "
                        f"{json.dumps(ours[key])}",
                        "prepare it as the model does: perceiver preprocess -m MODEL",
                    )

    def to_json(self) -> bytes:
        """Return the header member."""
        arrays = {}
        for name, spec in self.inputs.items():
            if self.content == "decoded":
                dtype, shape = modality(name).loaded(spec)
                arrays[name] = {"dtype": dtype, "shape": [side if side is None else int(side) for side in shape]}
        facts = {
            "format": FORMAT,
            "content": self.content,
            "hash": self.hash,
            "inputs": {name: spec.model_dump(mode="json") for name, spec in sorted(self.inputs.items())},
            "arrays": arrays,
            "classes": list(self.classes),
            "multi_label": self.multi_label,
        }
        return json.dumps(facts).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, shown: str) -> Header:
        """Return the header in a member. Raises IntegrityError."""
        facts = _json(data, f"{shown}: the header")
        if facts.get("format") != FORMAT:
            raise IntegrityError(f"{shown}: records of format {facts.get('format')!r:.20}, expected {FORMAT}")
        names, content = facts.get("classes"), facts.get("content")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise IntegrityError(f"{shown}: the header has no list of classes")
        if content not in ("decoded", "prepared", "fourier"):
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
    """What is known of a record beside its arrays.

    path: of the input, as it was given. id: what splits and seeds are drawn from; within a data folder, the path below
    it. labels: class names. seconds: by modality with a time axis, the length of the input. error: why there are no
    arrays, of an input that could not be read.
    """

    path: str
    id: str
    split: str = "train"
    labels: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def to_json(self, multi_label: bool) -> bytes:
        """Return the member KEY.json, or ERROR."""
        facts: dict[str, Any] = {"path": self.path, "id": self.id, "split": self.split}
        if multi_label:
            facts["labels"] = list(self.labels)
        elif self.labels:
            facts["label"] = self.labels[0]
        if self.seconds:
            facts["seconds"] = dict(self.seconds)
        if self.error is not None:
            facts["error"] = self.error
        return json.dumps(facts).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, shown: str) -> Facts:
        """Return the facts in a member. Raises IntegrityError."""
        facts = _json(data, shown)
        path, label = facts.get("path"), facts.get("label")
        labels = [label] if label is not None else facts.get("labels", [])
        identity, split, seconds = facts.get("id", path), facts.get("split", "train"), facts.get("seconds", {})
        if not isinstance(path, str) or not isinstance(identity, str) or split not in SPLITS:
            raise IntegrityError(f"{shown}: expected path, id and split of a record")
        if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            raise IntegrityError(f"{shown}: labels that are not names")
        if not isinstance(seconds, dict) or not all(isinstance(s, float | int) and s >= 0 for s in seconds.values()):
            raise IntegrityError(f"{shown}: seconds that are not lengths")
        error = facts.get("error")
        if not isinstance(error, str | None):
            raise IntegrityError(f"{shown}: an error that is not text")
        return cls(path, identity, split, tuple(labels), seconds, error)


@dataclass(frozen=True)
class Record(Generic[T]):
    """One example of a stream: its key, its facts, and by modality an array in the format of NPY, or where it lies.

    An input that could not be read has an error in its facts, no key and no arrays.
    """

    key: str
    facts: Facts
    arrays: Mapping[str, T]


def _json(data: bytes, shown: str) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{shown}: not JSON") from error
    if not isinstance(facts, dict):
        raise IntegrityError(f"{shown}: not a JSON object")
    return facts


# ---------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Unread(Source):
    """What a stream brings of an input that could not be read when it was prepared: the error that it had then."""

    error: str = field(kw_only=True)

    def head(self) -> bytes:
        """Raise DataError."""
        raise DataError(self.error)


@dataclass(frozen=True)
class Stored(Source):
    """What a record brings of one modality, in place of a file: an array that needs no decoding.

    name: of the input. data: the array in the format of NPY. seconds: the length of the input, of sound and video.
    """

    header: Header = field(kw_only=True)
    modality: str = field(kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)

    @property
    def npy(self) -> bytes | memoryview:
        """The array, in the format of NPY."""
        assert self.data is not None
        return self.data

    def array(self) -> Array:
        """Return what decoding the input gave; it cannot be written to.

        Raises:
            DataError: not such an array, empty or not finite.
        """
        return self._sane(self._decoded())

    def _decoded(self) -> Array:
        dtype, shape = modality(self.modality).loaded(self.header.inputs[self.modality])
        array = self._parsed()
        self._expect(array, (dtype,), shape)
        return array

    def part(self, span: Span, steps_hz: float) -> Array:
        """Return a span of seconds of the array, as `TimedModality.load` cuts it. Raises DataError."""
        first = max(0, round(span[0] * steps_hz))
        return self._sane(self._decoded()[first : first + max(1, round(span[1] * steps_hz))])

    def prepared(self) -> ByteArray:
        """Return what the model is given, from a record that holds that.

        Raises:
            DataError: not such an array, or not finite.
        """
        spec = self.header.inputs[self.modality]
        layout, dtype = modality(self.modality).layout(spec), np.dtype(modality(self.modality).loaded(spec)[0])
        array = self._parsed()
        if self.header.content == "fourier":
            self._expect(array, ("float32", "float16"), (layout.num_inputs, layout.num_channels))
            return from_rows(self._sane(array).astype(np.float32, copy=False), layout, dtype)
        if layout.is_grid:
            self._expect(array, (dtype.name,), layout.prepared_shape)
            return ByteArray(self._sane(array))
        self._expect(array, ("float32",), (layout.num_inputs, layout.dims))
        return ByteArray(np.empty((len(array), 0), np.float32), self._sane(array))

    def _parsed(self) -> Array:
        return parse_npy(self.npy, f"{self.shown}: {self.modality}")

    def _expect(self, array: Array, dtypes: Sequence[str], shape: tuple[int | None, ...]) -> None:
        fits = array.ndim == len(shape) and all(s in (None, n) for n, s in zip(array.shape, shape, strict=True))
        if array.dtype.name not in dtypes or not fits:
            sides = ", ".join("n" if side is None else str(side) for side in shape)
            raise DataError(
                f"{self.shown}: {self.modality} of {array.dtype} {array.shape}, expected {dtypes[0]} ({sides})"
            )

    def _sane(self, array: Array) -> Array:
        check_contract(self, array, "values")
        if array.dtype.kind == "f" and float(np.abs(array).max()) > MAX_VALUE:
            raise DataError(f"{self.shown}: {self.modality} of values above {MAX_VALUE:g}")
        return array


def stored_rows(source: Source, name: str, spec: InputSpec, limits: Limits) -> Stored:
    """Return the byte array in a file, .npy or .safetensors, as a record of one modality brings it.

    Raises:
        DataError: damaged, or prepared otherwise than `spec` says, as far as the file tells.
    """
    layout = modality(name).layout(spec)
    if layout.learned_channels or layout.permutation is not None or layout.stem != "none":
        raise DataError(f"{source.shown}: a byte array, but {name} is read with learned or permuted positions",
                        "pass the file that it was made from")  # fmt: skip
    npy, found = _rows_in(source, limits)
    if found is not None:
        found.check(source.shown, {name: spec}, "the model")
    shape = parse_npy(npy, source.shown).shape
    if shape != (layout.num_inputs, layout.num_channels):
        sizes, wanted = " x ".join(map(str, shape)), f"{layout.num_inputs} x {layout.num_channels}"
        raise DataError(f"{source.shown}: a byte array of {sizes}, expected {wanted} of {name}")
    return Stored(source.name, npy, header=Header({name: spec}, content="fourier"), modality=name)


def settled_by_rows(source: Source, name: str, spec: InputSpec, limits: Limits) -> InputSpec:
    """Return a spec with the value that a byte array was made with for every "auto", if it says. Raises DataError."""
    _, header = _rows_in(source, limits)
    return spec if header is None else header.settled({name: spec})[name]


def safetensors_rows(rows: Array, name: str, spec: InputSpec) -> bytes:
    """Return a byte array (M, C) float32 as .safetensors that says how it was prepared."""
    from safetensors.numpy import save

    header = Header({name: spec}, content="fourier").to_json().decode().strip()
    data: bytes = save({name: rows}, metadata={METADATA: header})
    return data


def _rows_in(source: Source, limits: Limits) -> tuple[bytes, Header | None]:
    """Return the byte array in a file, in the format of NPY, and how it was prepared, of an .npy None."""
    data = source.read(limits)
    if not is_safetensors(data[:HEAD_BYTES]):
        return data, None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        (rows,) = load(data).values()
        length = int.from_bytes(data[:8], "little")
        said = json.loads(data[8 : 8 + length])["__metadata__"][METADATA].encode()
        return npy_bytes(rows), Header.parse(said, "its metadata")
    except (SafetensorError, IntegrityError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{source.shown}: a damaged byte array: {show_path(str(error))[1:-1]}") from error


def from_rows(rows: Array, layout: Layout, dtype: np.dtype[Any]) -> ByteArray:
    """Return the byte array that rows (M, C) with Fourier features were made from; values come back in `dtype`."""
    if not layout.is_grid:
        return ByteArray(rows[:, :0], rows[:, : layout.dims])
    values = rows[:, : layout.channels] * np.array(layout.std, np.float32) + np.array(layout.mean, np.float32)
    if dtype.kind in "ui":
        values = np.rint(values).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return ByteArray(values.astype(dtype).reshape(layout.prepared_shape))


def npy_bytes(array: Array) -> bytes:
    """Return an array in the format of NPY, version 1.0, C order."""
    return _npy_header(array.dtype.newbyteorder("<").str, array.shape) + array.tobytes()


@lru_cache(maxsize=256)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def parse_npy(data: bytes | memoryview, shown: str) -> Array:
    """Return the array in bytes of the format of NPY, which it shares. Numbers only: nothing is ever unpickled.

    Raises:
        DataError: another format or version, objects, another order or size than declared.
    """
    view = memoryview(data)
    length = int.from_bytes(view[8:10], "little")
    if bytes(view[:8]) != b"\x93NUMPY\x01\x00" or length > MAX_NPY_HEADER:
        raise DataError(f"{shown}: not an array in NPY format 1.0")
    head = _parse_npy_header(bytes(view[: 10 + length]))
    if isinstance(head, str):
        raise DataError(f"{shown}: {head}")
    dtype, shape = head
    body = view[10 + length :]
    if len(body) != prod(shape) * dtype.itemsize:
        raise DataError(f"{shown}: an array of {dtype} {shape} in {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape)


@lru_cache(maxsize=256)
def _parse_npy_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]] | str:
    """Return dtype and shape, or what is wrong."""
    stream = io.BytesIO(head)
    stream.seek(8)
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # a stranger's text goes through a parser of Python literals
        return f"a damaged NPY header: {show_path(str(error))[1:-1]}"
    if dtype.kind not in "uif" or dtype.itemsize > 8 or dtype.byteorder == ">":
        return f"an array of {show_path(str(dtype))[1:-1]}, expected numbers"
    if fortran or len(shape) > 8 or min(shape, default=1) < 0:
        return f"an array of shape {shape}" + (" in Fortran order" if fortran else "")
    return dtype, shape


# ---------------------------------------------------------------- writing


class Writer:
    """Writes a stream through a function: the header at once, then records, then the end.

    Attributes:
        num_records, num_errors, num_bytes: written so far.
    """

    def __init__(self, write: Callable[[bytes], object], header: Header) -> None:
        self.write = write
        self.num_records = self.num_errors = self.num_bytes = 0
        self._put(HEADER, header.to_json())

    def packed(self, members: bytes, records: int = 1, errors: int = 0) -> None:
        """Write what `pack` made; keys rise."""
        self.num_records += records
        self.num_errors += errors
        self.num_bytes += len(members)
        self.write(members)

    def close(self) -> None:
        """Write the end, which says that nothing is missing."""
        counts = {"records": self.num_records, "errors": self.num_errors}
        self._put(END, json.dumps(counts).encode() + b"\n")
        self.write(2 * ZEROS)

    def _put(self, name: str, content: bytes) -> None:
        data = tar_members([(name, content)])
        self.num_bytes += len(data)
        self.write(data)


def pack(facts: Facts, arrays: Mapping[str, bytes | memoryview], number: int, header: Header) -> bytes:
    """Return the members of one record; arrays are in the format of NPY, the number becomes its key."""
    if facts.error is not None:
        return tar_members([(ERROR, facts.to_json(header.multi_label))])
    key = f"{number:08d}"
    members: list[tuple[str, bytes | memoryview]] = [(f"{key}.json", facts.to_json(header.multi_label))]
    if not header.multi_label and facts.labels and facts.labels[0] in header.class_index:
        members.append((f"{key}.cls", b"%d" % header.class_index[facts.labels[0]]))
    return tar_members([*members, *((f"{key}.{name}.npy", array) for name, array in arrays.items())])


def tar_members(members: Sequence[tuple[str, bytes | memoryview]]) -> bytes:
    """Return members as POSIX ustar: no owner, no time, so that the same content gives the same bytes."""
    data: list[bytes | memoryview] = []
    for name, content in members:
        data += [_tar_header(name, len(content)), content, bytes(-len(content) % BLOCK)]
    return b"".join(data)


def _tar_header(name: str, size: int) -> bytes:
    encoded = name.encode("ascii")
    if len(encoded) > MAX_NAME or size >= 8**11:
        raise UsageError(f"a member {show_path(name)} of {size} bytes does not fit into a tar")
    before = encoded.ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % size + b"%011o\0" % 0
    after = b"0" + bytes(100) + b"ustar\00000" + bytes(247)
    return before + b"%06o\0 " % (sum(before) + sum(after) + 8 * 0x20) + after


# ---------------------------------------------------------------- reading


class Feed:
    """The bytes of a stream in order.

    Attributes:
        at: how many were taken or passed over. shown: the name of the stream, safe to print.
    """

    def __init__(self, file: BinaryIO, shown: str, begun: bytes = b"") -> None:
        self.file, self.shown, self.at = file, shown, 0
        self._begun = begun  # taken from the file before
        self._seekable = file.seekable()

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end."""
        begun, self._begun = self._begun[:count], self._begun[count:]
        data = self.file.read(count - len(begun))
        if begun:
            data = begun + data
        self.at += len(data)
        return data

    def skip(self, count: int) -> tuple[int, int]:
        """Pass over `count` bytes; return where they lie and how many they are."""
        place = self.at
        if self._seekable:
            self.file.seek(count, io.SEEK_CUR)
        else:
            left = count
            while left and (data := self.file.read(min(left, 1 << 20))):
                left -= len(data)
        self.at += count
        return place, count


def is_tar(head: bytes) -> bool:
    """Return whether bytes begin like a tar, or like one that is compressed."""
    return head[257:262] == b"ustar" or compression(head) is not None


def compression(head: bytes) -> str | None:
    """Return the command that unpacks what begins with these bytes, None where it is not compressed."""
    return next((command for magic, command in COMPRESSED.items() if head.startswith(magic)), None)


def read_records(feed: Feed, limits: Limits, take: Callable[[int], T]) -> Iterator[tuple[Header, Record[T]]]:
    """Yield the header and each record of a stream, or of several that follow each other; errors are not counted.

    take: called with the size of an array, `feed.take` to have its bytes or `feed.skip` to have its place.

    Raises:
        DataError: no such stream at all. LimitError: a larger array than `limits`, before it is read.
        IntegrityError: cut short, or damaged; says after how many records.
    """
    total = 0
    header: Header | None = None
    while (found := _next_header(feed, header, total)) is not None:
        header, count, errors = found, 0, 0
        pending: _Pending[T] | None = None
        before = ""  # the key of the last record
        while True:
            name, size = _member(feed, total)
            key, _, rest = name.partition(".")
            if pending is not None and key != pending.key:
                yield header, pending.record(feed, total)
                before, pending, total, count = pending.key, None, total + 1, count + 1
            if name == END:
                _check_end(_content(feed, size, MAX_JSON_BYTES, name, total), count, errors, feed, total)
                break
            if name == ERROR:
                yield header, _failed(feed, size, total)
                errors += 1
                continue
            if pending is None:
                if not re.fullmatch(r"[0-9A-Za-z_-]+", key) or key <= before:
                    raise _damaged(feed, total, f"a member {show_path(name)}, expected keys that rise, then {END}")
                pending = _Pending(key)
            pending.add(feed, name, rest, size, header, limits, take, total)


@dataclass
class _Pending(Generic[T]):
    """A record whose members are being read."""

    key: str
    facts: bytes | None = None
    label: bytes | None = None
    arrays: dict[str, T] = field(default_factory=dict)

    def add(
        self, feed: Feed, name: str, rest: str, size: int, header: Header, limits: Limits,
        take: Callable[[int], T], total: int,
    ) -> None:  # fmt: skip
        """Read one member."""
        kind, _, suffix = rest.rpartition(".")
        if rest == "json" and self.facts is None:
            self.facts = _content(feed, size, MAX_JSON_BYTES, name, total)
        elif rest == "cls" and self.label is None:
            self.label = _content(feed, size, BLOCK, name, total)
        elif suffix == "npy" and kind in header.inputs and kind not in self.arrays:
            if size > limits.decoded_bytes:
                raise LimitError(f"{feed.shown}: {name}", size, "bytes", "decoded_bytes", limits.decoded_bytes)
            before, padding = feed.at, -size % BLOCK
            self.arrays[kind] = take(size)
            feed.take(padding)
            if feed.at - before < size + padding:
                raise _cut(feed, total)
        else:
            expected = ", ".join(f"{kind}.npy" for kind in header.inputs)
            raise _damaged(feed, total, f"a member {show_path(name)}, expected one each of json, cls, {expected}")

    def record(self, feed: Feed, total: int) -> Record[T]:
        if self.facts is None:
            raise _damaged(feed, total, f"no {self.key}.json")
        return Record(self.key, Facts.parse(self.facts, f"{feed.shown}: {self.key}.json"), self.arrays)


def _next_header(feed: Feed, before: Header | None, total: int) -> Header | None:
    """Return the header of the next stream, None at the end; blocks of zeros lie between and after streams."""
    block = ZEROS
    while block == ZEROS:
        block = feed.take(BLOCK)
    if len(block) == 0 and before is not None:
        return None
    if before is None:
        command = compression(block)
        if command is not None:
            raise DataError(f"{feed.shown}: compressed", f"unpack it on the way: {command} FILE | perceiver ... -")
        if block[257:262] != b"ustar":
            what = "nothing in it" if not block else "not a tar"
            raise DataError(f"{feed.shown}: {what}", "expected records as `perceiver preprocess` writes them")
    if not block.startswith(HEADER.encode() + b"\0"):
        name = show_path(block[:MAX_NAME].rstrip(b"\0").decode("ascii", "replace"))
        raise DataError(
            f"{feed.shown}: a tar that begins with {name}, not with {HEADER}",
            "expected records as `perceiver preprocess` writes them",
        )
    name, size = _parse_member(feed, block, total)
    header = Header.parse(_content(feed, size, MAX_HEADER_BYTES, name, total), feed.shown)
    if before is not None:
        header_check(feed.shown, before, header)
    return header


def header_check(shown: str, first: Header, second: Header) -> None:
    """Raise DataError unless the records of two streams can be read as those of one."""
    if first.content != second.content or first.inputs.keys() != second.inputs.keys():
        kinds = [f"{'+'.join(header.inputs)} {header.content}" for header in (first, second)]
        raise DataError(f"{shown}: records of {kinds[0]}, then of {kinds[1]}", "prepare both alike")
    second.check(shown, first.inputs, "what came before")
    if first.multi_label != second.multi_label:
        raise DataError(f"{shown}: records of several labels and records of one", "prepare both alike")


def _member(feed: Feed, total: int) -> tuple[str, int]:
    """Return name and size of the next member, which must be there."""
    block = feed.take(BLOCK)
    if len(block) < BLOCK or block == ZEROS:
        raise _cut(feed, total)
    return _parse_member(feed, block, total)


_SIZE = re.compile(rb"[0-7]{1,11}[ \0]")


def _parse_member(feed: Feed, block: bytes, total: int) -> tuple[str, int]:
    """Return name and size of a member by its header block: a regular file, its name in ASCII, its checksum right."""
    if len(block) < BLOCK:
        raise _cut(feed, total)
    field_ = block[148:156]
    try:
        declared = int(field_.strip(b" \0"), 8)
    except ValueError:
        declared = -1
    # The low half of Adler-32 is one more than the sum of the bytes: a hundred times as fast as adding them up.
    found = adler32(block) % 65536 - 1 - sum(field_) + 8 * 0x20
    size = _SIZE.match(block, 124, 136)
    if (declared - found) % 65521 or block[257:262] != b"ustar" or size is None:
        raise _damaged(feed, total, "a damaged tar header")
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    if block[156:157] not in (b"0", b"\0") or block[345:346] != b"\0":
        raise _damaged(feed, total, f"{show_path(name)} of tar type {block[156:157]!r:.10}, expected regular files")
    return name, int(size[0][:-1], 8)


def _content(feed: Feed, size: int, most: int, name: str, total: int) -> bytes:
    """Return the content of a small member."""
    if size > most:
        raise _damaged(feed, total, f"{show_path(name)} of {size} bytes, expected {most} at most")
    padded = size + -size % BLOCK
    data = feed.take(padded)
    if len(data) < padded:
        raise _cut(feed, total)
    return data[:size]


def _failed(feed: Feed, size: int, total: int) -> Record[Any]:
    """Return the record of an input that could not be read."""
    facts = Facts.parse(_content(feed, size, MAX_JSON_BYTES, ERROR, total), f"{feed.shown}: {ERROR}")
    if facts.error is None:
        raise _damaged(feed, total, f"{ERROR} without an error in it")
    return Record("", facts, {})


def _check_end(data: bytes, count: int, errors: int, feed: Feed, total: int) -> None:
    counts = _json(data, f"{feed.shown}: {END}")
    for kind, found in (("records", count), ("errors", errors)):
        if counts.get(kind) != found:
            raise _damaged(feed, total, f"{found} {kind}, where its end says {counts.get(kind)!r:.20}")


def _cut(feed: Feed, total: int) -> IntegrityError:
    return IntegrityError(
        f"{feed.shown}: the stream was cut short after {total} records", "what wrote it did not finish: see its error"
    )


def _damaged(feed: Feed, total: int, what: str) -> IntegrityError:
    return IntegrityError(f"{feed.shown}: {what} (after {total} records, byte {feed.at})")
