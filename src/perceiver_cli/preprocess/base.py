"""The interface of a modality, and helpers that several modalities share. NumPy only.

Preprocessing has two steps. `load` decodes a file into an array: slow, deterministic, worth storing. `prepare` makes a
`ByteArray` from that array: cheap, and random only through its `rng`. A byte array keeps a regular grid as a shape; the
model adds the Fourier features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Auto, InputSpec, Limits

Array = NDArray[Any]
Rng = np.random.Generator
Span = tuple[float, float]  # start and length in seconds
Window = tuple[float, Array]  # start in seconds, and the decoded array


@dataclass(frozen=True)
class ByteArray:
    """One input of the model, before Fourier features (with them it is the paper's byte array, M x C).

    values: (*grid, c) in their native dtype; for a point set (M, c), where c may be 0.
    positions: (M, d) float32 in [-1, 1] for a point set; None for a regular grid.
    """

    values: Array
    positions: NDArray[np.float32] | None = None

    @property
    def array(self) -> Array:
        """One array, as records keep it: the values of a grid; for a point set the positions, then the values."""
        return self.values if self.positions is None else np.hstack([self.positions, self.values])


@dataclass(frozen=True)
class Parts:
    """The named parts of a decoded array, such as words. The items of one input belong to one part or to several.

    owners: (inputs, items of an input), the number of the part to which each item belongs, -1 for none.
    """

    names: list[str]
    owners: NDArray[np.int64]

    def shares(self, heat: Array) -> NDArray[np.float64]:
        """Return the heat of each part, where each input's heat (M,) is divided among its items that have a part."""
        owned = self.owners >= 0
        each = heat[: len(owned)].astype(np.float64) / owned.sum(axis=1).clip(min=1)
        spread = np.broadcast_to(each[:, None], owned.shape)[owned]
        return np.bincount(self.owners[owned], spread, minlength=len(self.names)).astype(np.float64)


@dataclass(frozen=True)
class Layout:
    """The shape of every ByteArray of one modality; the model is built from it.

    grid: number of inputs along each axis, after a stem; (M,) for a point set.
    channels: values per input (c) as prepared, after patches.
    dims: position axes (d): len(grid) for a grid.
    bands: Fourier bands per axis (K).
    max_resolution: the paper's mu for each axis; bands are spaced linearly from 1 to mu / 2.
    mean, std: values enter the model as (value - mean) / std; one number, or one per channel.
    learned_channels, learned_std: width and initial scale of learned positions; width 0 means Fourier features.
    permutation: seed of the order of the rows, the same for every input; None keeps the grid's order.
    stem, stem_channels: learned layers on the values before positions are attached, and their output channels.
    codes: number of learned vectors of the stem "embed", whose values are codes, then as many weights.
    presence: number of last channels of the values. Where they are all 0, no input exists, and attention skips it.
    groups: the other channels are so many parts of equal width, and explanations rate each of them; 0 means one.
    values_grid: shape of the values as prepared if a stem makes the grid smaller; else None.
    stem_stride: values along each axis for one input of the stem "conv".
    stem_neighbours: points that the stem "neighbours" sees around each input.
    """

    grid: tuple[int, ...]
    channels: int
    dims: int
    bands: int
    max_resolution: tuple[float, ...]
    is_grid: bool = True
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    learned_channels: int = 0
    learned_std: float = 1.0
    permutation: int | None = None
    stem: str = "none"
    stem_channels: int = 0
    values_grid: tuple[int, ...] | None = None
    stem_stride: tuple[int, ...] | None = None
    stem_neighbours: int = 0
    codes: int = 0
    presence: int = 0
    groups: int = 0

    @classmethod
    def of_conv_stem(cls, spec: Any, sides: tuple[int, ...], channels: int, **options: Any) -> Layout:
        """Return the layout of a grid (*sides, channels) after the stem "conv", which strides by the patch of `spec`.

        Raises UsageError for a patch that convolutions of stride 2 cannot make.
        """
        if any(side & (side - 1) for side in spec.patch):
            found = f"inputs.{spec.modality}.patch {list(spec.patch)}"
            raise UsageError(f"{found}: the stem conv halves sides", "expected powers of 2, or another stem")
        grid = tuple(-(-side // step) for side, step in zip(sides, spec.patch, strict=True))
        stem = {"stem": "conv", "stem_channels": spec.stem_channels, "stem_stride": tuple(spec.patch)}
        return cls.of_grid(spec, grid, channels, values_grid=sides, **stem, **options)

    @classmethod
    def of_grid(cls, spec: InputSpec, grid: tuple[int, ...], channels: int, **options: Any) -> Layout:
        """Return the layout of a regular grid with the options of `spec`. Raises UsageError for max_resolution."""
        resolution = spec.max_resolution or tuple(map(float, grid))
        if len(resolution) != len(grid):
            expected = f"expected {len(grid)}, one for each axis"
            raise UsageError(f"inputs.{spec.modality}.max_resolution has {len(resolution)} number(s), {expected}")
        options["learned_channels"] = spec.learned_channels if spec.positions == "learned" else 0
        return cls(grid, channels, len(grid), spec.bands, resolution, learned_std=spec.learned_std,
                   permutation=spec.permutation, **options)  # fmt: skip

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(*grid, c) of the values as prepared."""
        return (*(self.values_grid or self.grid), self.channels)

    @property
    def positions_shape(self) -> tuple[int, ...]:
        """(M, d) of the positions of a point set as prepared, before a stem; (0, d) for a grid, which has none."""
        return (0 if self.is_grid else prod(self.prepared_shape[:-1]), self.dims)

    @property
    def num_inputs(self) -> int:
        """M, the number of rows of the byte array."""
        return prod(self.grid)

    @property
    def position_channels(self) -> int:
        """Position channels of one row: d (2 K + 1) Fourier features (paper 3.2), or the learned width."""
        return self.learned_channels or self.dims * (2 * self.bands + 1)

    @property
    def num_channels(self) -> int:
        """C, the columns of the byte array: values, then position features."""
        return (self.channels if self.stem == "none" else self.stem_channels) + self.position_channels


@dataclass(frozen=True)
class TrainingSet:
    """Facts about the training examples that settle how strongly they are varied."""

    count: int
    classes: tuple[str, ...]

    @property
    def is_small(self) -> bool:
        """Whether strong variation pays: each example is seen so often that the model would know it by heart."""
        return self.count < SMALL_SET


SMALL_SET = 1000  # training examples
S = TypeVar("S", bound=InputSpec)


class Modality(ABC, Generic[S]):
    """One kind of input: one subclass in one file, made known by `register`."""

    name: ClassVar[str]
    formats: ClassVar[str]  # the file formats that it reads, for messages
    suffixes: ClassVar[frozenset[str]] = frozenset()  # in lower case; an unreadable file with one counts as damaged
    decides: ClassVar[tuple[str, ...]]  # the options of its spec that change the arrays of `load`
    precedence: ClassVar[int] = 0  # detection asks the modality with the lowest number first
    contains: ClassVar[tuple[str, ...]] = ()  # other modalities that its files can hold: a video has a soundtrack
    paper_preset: ClassVar[str | None] = None  # the preset that repeats the paper's experiment
    cells: ClassVar[tuple[str, ...]] = ()  # kinds of a table's cells that it reads, as in `--column NAME=KIND`
    is_common_word: ClassVar[bool] = False  # whether a manifest's column of this name often holds something else
    can_mix: ClassVar[bool] = False  # whether mixup and cutmix of two byte arrays give a meaningful third
    probes: ClassVar[int] = 64  # training examples that `resolve` gets
    preparation: ClassVar[str] = ""  # the steps of `prepare` in words, for programs that run an exported model
    surveyed: ClassVar[int] = 0  # files whose headers `survey` reads at most

    @abstractmethod
    def sniff(self, head: bytes, name: str) -> bool:
        """Return whether a file that begins with `head` is of a known format; `name` counts if bytes do not decide."""

    def may_read(self, head: bytes, name: str) -> bool:
        """Return whether a file that could be of any kind, such as a table, is read if the user names this kind."""
        return False

    def is_table(self, head: bytes, name: str) -> bool:
        """Return whether a file of this modality holds only numbers, so that it could also be something else."""
        return False

    def of_cells(self, cells: Sequence[tuple[str, str, Any]]) -> bytes | None:
        """Return what `load` reads of the cells (column, kind, value) of a row; None if all of them are empty."""
        return None

    def takes_folders(self, head: bytes, name: str) -> bool:
        """Return whether a table is certainly of this kind, for a data set that holds only tables."""
        return False

    def also_reads(self, head: bytes) -> bool:
        """Return whether a file of another kind can be read as this one too: a still picture as a video."""
        return False

    @abstractmethod
    def load(self, source: Source, spec: S, limits: Limits) -> Array:
        """Return the decoded array, the same every time; limits are checked before memory is allocated.

        Raises DataError for a file that is unreadable, truncated, empty, not finite or over a limit.
        """

    @abstractmethod
    def loaded(self, spec: S) -> tuple[str, tuple[int | None, ...]]:
        """Return dtype and shape of the arrays of `load`; None stands for any length."""

    @abstractmethod
    def layout(self, spec: S) -> Layout:
        """Return the shape of the byte arrays of `prepare`. Raises UsageError if `spec` contradicts itself."""

    @abstractmethod
    def prepare(self, raw: Array, spec: S, rng: Rng | None) -> ByteArray:
        """Return the byte array: with `rng` augmented for training, without it as evaluation needs it."""

    def resolve(self, spec: S, sources: Sequence[Source], limits: Limits) -> S:
        """Return `spec` with a value for every "auto", chosen by `sources`, a sample of the training files."""
        return spec

    def in_words(self, spec: S) -> str:
        """Return what a model reads of one file, for people: "64 x 64 colour, 4 x 4 patches"."""
        layout = self.layout(spec)
        return f"{' x '.join(map(str, layout.grid))} inputs of {counted(layout.channels, 'value')}"

    def declared(self, source: Source, limits: Limits) -> dict[str, Any]:
        """Return what a file says of itself before it is decoded, such as its size and its rate, for people."""
        return {}

    def survey(self, spec: S, sources: Sequence[Source], limits: Limits) -> list[str]:
        """Return facts about files that a reader of `in_words` should know, such as "21 % of 64 files are 8 kHz".

        Only headers are read; an unreadable file is skipped.
        """
        return []

    def adapt(self, spec: S, training_set: TrainingSet) -> S:
        """Return `spec` with each "auto" settled that depends on the number of training examples or on class names."""
        return spec

    def num_views(self, spec: S) -> int:
        """Return the number of byte arrays of one example over which evaluation averages."""
        return 1

    def parts(self, raw: Array, spec: S) -> Parts | None:
        """Return the parts of a decoded array that have names, to explain and to show it; None if it has none."""
        return None

    def viewed(self, spec: S) -> S:
        """Return `spec` for further views of an example in evaluation: `prepare` varies them, but mildly."""
        return spec

    def sketch(self, raw: Array, spec: S) -> Array | None:
        """Return a small vector of the coarse content of an array, to find near-copies, or None if it has none."""
        return None

    def fault(self, raw: Array) -> str | None:
        """Return the word for an array without content, such as "constant", with which `lint` reports it, else None."""
        rows = raw.reshape(-1, raw.shape[-1] if raw.ndim > 1 else 1)
        return "constant" if (rows.min(axis=0) == rows.max(axis=0)).all() else None


class TimedModality(Modality[S]):
    """A modality with a time axis: one clip can be read without the rest, by a time that sound and picture share."""

    steps: ClassVar[str]  # the noun of the items along its time axis, for messages
    reads_spans: ClassVar[bool] = True  # whether a span costs less to read than the whole file

    @abstractmethod
    def clip_s(self, spec: S) -> float:
        """Return the length in seconds of the byte arrays of `prepare`."""

    def span_s(self, spec: S) -> float:
        """Return the seconds of a file that a clip of training may need: more than its length if it is played fast."""
        return self.clip_s(spec)

    def starts_itself(self, spec: S) -> bool:
        """Return whether `prepare` finds the start of each clip of a file that was decoded whole."""
        return False

    def first_s(self, raw: Array, spec: S) -> float:
        """Return the start in seconds of the clip that evaluation reads from the array of `load`: the middle clip."""
        return max(0.0, len(raw) / self.steps_hz(spec) - self.clip_s(spec)) / 2

    def has_samples(self, window: Array) -> bool:
        """Return whether a window of a file holds any sample; one that lies in a gap does not."""
        return True

    @abstractmethod
    def steps_hz(self, spec: S) -> float:
        """Return the steps per second along the first axis of the arrays of `load`."""

    @abstractmethod
    def duration_s(self, source: Source, limits: Limits, spec: S | None = None) -> float:
        """Return the length in seconds that a file declares, if it does without decoding it. Raises as `load` does.

        spec: settles it where the file alone does not.
        """

    @abstractmethod
    def load(self, source: Source, spec: S, limits: Limits, span: Span | None = None) -> Array:
        """Return the decoded array of a span of seconds, cut at the end of the file, or of the whole file.

        Raises AbsentError, a DataError, if the file has no such stream.
        """

    @abstractmethod
    def prepare(self, raw: Array, spec: S, rng: Rng | None, start_s: float | None = None) -> ByteArray:
        """Return the clip of `raw` from `start_s` seconds on; None means a random start with `rng`, else the middle."""

    @abstractmethod
    def blocks(self, source: Source, spec: S, limits: Limits, window_s: float) -> Iterator[Array]:
        """Yield the array of `load` in blocks, from end to end, for a caller that keeps `window_s` seconds of them."""

    def windows(self, source: Source, spec: S, limits: Limits, window_s: float, hop_s: float) -> Iterator[Window]:
        """Yield every window of a file, read once from end to end.

        Windows begin at 0, hop_s, 2 hop_s ... while one fits. If more than a tenth of a hop remains, one more window
        ends with the file. A file shorter than a window is one window. Memory grows with the window, not the file.
        """
        windows = cut_windows(self.blocks(source, spec, limits, window_s), self.steps_hz(spec), window_s, hop_s)
        if (first := next(windows, None)) is None:
            raise DataError(f"{source.shown}: no {self.steps} in the file")
        yield first
        yield from windows


def strength_of(variation: float | Auto) -> float:
    """Return the strength of a variation, 0 while it is "auto": training data settles that."""
    return 0.0 if variation == "auto" else variation


def stem_in_words(stem: str) -> str:
    """Return what is learned before the latents look: the paper's models have no stem."""
    return {"conv": ", behind a stem of convolutions", "neighbours": ", behind a stem of neighbours"}.get(stem, "")


def varied_in_words(changes: Iterable[str]) -> str:
    """Return what training varies, after a semicolon: "; varied in training by mirror, crops"; "" without changes."""
    named = ", ".join(changes)
    return f"; varied in training by {named}" if named else ""


def patchify(values: Array, patch: tuple[int, ...]) -> Array:
    """Return (*grid // patch, c * prod(patch)): each patch becomes one input, and its values become channels.

    The order inside a patch is row-major, channels last. An incomplete patch at the far end is dropped.
    """
    if all(side == 1 for side in patch):
        return values
    dims = len(patch)
    grid = tuple(n // p for n, p in zip(values.shape[:dims], patch, strict=True))
    values = values[tuple(slice(0, n * p) for n, p in zip(grid, patch, strict=True))]
    split = [side for pair in zip(grid, patch, strict=True) for side in pair]
    values = values.reshape(*split, values.shape[-1])  # (h, p, w, q, c) for two axes
    order = (*range(0, 2 * dims, 2), *range(1, 2 * dims, 2), 2 * dims)
    return np.ascontiguousarray(values.transpose(order).reshape(*grid, -1))


def cut_windows(blocks: Iterable[Array], rate_hz: float, window_s: float, hop_s: float) -> Iterator[Window]:
    """Yield every window of a sequence that arrives in blocks along its first axis.

    `TimedModality.windows` says where windows begin. At most one window and one block are in memory.
    """
    size = max(1, round(window_s * rate_hz))
    held: deque[tuple[int, Array]] = deque()  # (index of the first step, block)
    total = count = start = end = 0

    def window(first: int, last: int) -> Window:
        pieces = [block[max(0, first - at) : last - at] for at, block in held if at < last]
        return first / rate_hz, np.concatenate(pieces)

    for block in blocks:
        held.append((total, block))
        total += len(block)
        while start + size <= total:
            yield window(start, end := start + size)
            count += 1
            start = max(start + 1, round(count * hop_s * rate_hz))
        while held and held[0][0] + len(held[0][1]) <= min(start, total - size):
            held.popleft()
    if total and (count == 0 or total - end > 0.1 * hop_s * rate_hz):
        yield window(max(0, total - size), total)


def lengths_in_words(seconds: Sequence[float], clip_s: float) -> list[str]:
    """Return the range of lengths of files and the share that is longer than a clip; nothing without lengths."""
    if not seconds:
        return []
    ends = [seconds_in_words(end) for end in (min(seconds), max(seconds))]
    span = f"they last {ends[0]}" + (f" to {ends[1]}" if ends[0] != ends[1] else "")
    longer = sum(length > clip_s for length in seconds)
    return [span + (f", {share_in_words(longer, len(seconds))} are longer than the clip" if longer else "")]


def seconds_in_words(seconds: float) -> str:
    """Return a length of time: 1.4 s, 12 min, 2.0 h."""
    return (
        f"{seconds:.3g} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def share_in_words(count: int, total: int) -> str:
    """Return a share as a whole percentage, never rounded to none or all: 21 %, under 1 %, over 99 %."""
    percent = round(100 * count / total)
    if percent in (0, 100) and 0 < count < total:
        return "under 1 %" if percent == 0 else "over 99 %"
    return f"{percent} %"


def check_contract(source: Source, values: Array, noun: str) -> Array:
    """Return `values`. Raises DataError if they are empty or not finite, which a decoder may fail to report."""
    if values.size == 0:
        raise DataError(f"{source.shown}: no {noun} in the file")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"{source.shown}: {noun} that are not finite numbers")
    return values
