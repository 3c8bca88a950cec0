"""What every modality gives: a decoded array, then a byte array; and the helpers they share. NumPy only.

Preprocessing has two halves. `load` decodes a file into a plain array: slow, the same every time, worth keeping.
`prepare` turns that array into a `ByteArray`: cheap, and random only through the generator it is given. The byte
array keeps a regular grid as a shape; Fourier features are made from it inside the model.
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

from perceiver_cli.errors import DataError, LimitError
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits

Array = NDArray[Any]
Span = tuple[float, float]  # start and length in seconds


@dataclass(frozen=True)
class ByteArray:
    """One input of the model, before Fourier features (the paper's byte array is M x C with them).

    values: (*grid, c) in their native dtype; for a point set (M, c), where c may be 0.
    positions: (M, d) float32 in [-1, 1] for a point set; None for a regular grid.
    """

    values: Array
    positions: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Layout:
    """The shape that every ByteArray of one modality has: all that the model needs to know of it.

    grid: number of inputs along each axis, after any stem; (M,) for a point set.
    channels: values per input (c) as prepared, after patches.
    dims: position axes (d): len(grid) for a grid.
    bands: Fourier bands per axis (K).
    max_resolution: the paper's mu for each axis; bands are spaced linearly from 1 to mu / 2.
    mean, std: values enter the model as (value - mean) / std; one number, or one per channel.
    learned_channels, learned_std: width (0: none) and initial scale of learned positions, in place of Fourier features.
    permutation: seed of the one order in which rows are given, or None.
    stem, stem_channels: learned layers on the values before positions are attached, and how many channels they give.
    values_grid: shape of the values as prepared, where a stem makes the grid smaller; else None.
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

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """(*grid, c) of the values as prepared."""
        return (*(self.values_grid or self.grid), self.channels)

    @property
    def num_inputs(self) -> int:
        """M, the number of rows of the byte array."""
        return prod(self.grid)

    @property
    def position_channels(self) -> int:
        """d (2 K + 1): raw position, sines and cosines of every axis (paper 3.2); or those that are learned."""
        return self.learned_channels or self.dims * (2 * self.bands + 1)

    @property
    def num_channels(self) -> int:
        """C, the columns of the byte array: values and position features."""
        return (self.channels if self.stem == "none" else self.stem_channels) + self.position_channels


S = TypeVar("S", bound=InputSpec)


class Modality(ABC, Generic[S]):
    """One kind of input. A new modality is one subclass, in one file, given to `register`."""

    name: ClassVar[str]
    formats: ClassVar[str]  # for messages: what files it reads
    precedence: ClassVar[int] = 0  # detection asks the lowest first
    decides: ClassVar[tuple[str, ...]]  # the options of its spec that `load` looks at; the others matter only later

    @abstractmethod
    def sniff(self, head: bytes, name: str) -> bool:
        """Return whether the first bytes are of a format it reads; the name only decides where bytes cannot."""

    @abstractmethod
    def load(self, source: Source, spec: S, limits: Limits) -> Array:
        """Return the decoded array, the same every time; limits are checked before memory is taken.

        Raises:
            DataError: unreadable, truncated, empty, not finite or over a limit.
        """

    @abstractmethod
    def loaded(self, spec: S) -> tuple[str, tuple[int | None, ...]]:
        """Return dtype and shape of what `load` gives, None for any length: what a stored array is held to."""

    @abstractmethod
    def layout(self, spec: S) -> Layout:
        """Return the shape of what `prepare` gives. Raises UsageError where `spec` contradicts itself."""

    @abstractmethod
    def prepare(self, raw: Array, spec: S, rng: np.random.Generator | None) -> ByteArray:
        """Return the byte array; with `rng` augmented for training, without it as for evaluation."""

    def resolve(self, spec: S, sources: Sequence[Source], limits: Limits) -> S:
        """Return `spec` with every "auto" settled by looking at a sample of the training files."""
        return spec


class TimedModality(Modality[S]):
    """A modality with a time axis: a clip of it may be read without the rest, at a place that others share."""

    @abstractmethod
    def clip_s(self, spec: S) -> float:
        """Return the length in seconds of what `prepare` gives."""

    @abstractmethod
    def steps_hz(self, spec: S) -> float:
        """Return the steps a second along the first axis of what `load` gives."""

    @abstractmethod
    def duration_s(self, source: Source, limits: Limits) -> float:
        """Return the length in seconds that a file declares; nothing is decoded.

        Raises:
            DataError: unreadable or over a limit. AbsentError: no such stream in the file.
        """

    @abstractmethod
    def load(self, source: Source, spec: S, limits: Limits, span: Span | None = None) -> Array:
        """Return the decoded array of a span of seconds, or of the whole file. A span may pass the end: it is cut.

        Raises:
            DataError: unreadable, truncated, empty, not finite or over a limit. AbsentError: no such stream in it.
        """

    @abstractmethod
    def prepare(self, raw: Array, spec: S, rng: np.random.Generator | None, start_s: float | None = None) -> ByteArray:
        """Return the clip of `raw` from `start_s` seconds on; unset, a random one or, without `rng`, the middle."""

    @abstractmethod
    def windows(
        self, source: Source, spec: S, limits: Limits, window_s: float, hop_s: float
    ) -> Iterator[tuple[float, Array]]:
        """Yield (start in seconds, decoded array) of every window of a file, which is read once from end to end.

        Windows begin at 0, hop_s, 2 hop_s ... while one fits; a last one ends with the file where that leaves more than
        a tenth of a hop. A file shorter than a window is one window. Memory is bounded by the window, not by the file.
        """


def patchify(values: Array, patch: tuple[int, ...]) -> Array:
    """Return (*grid // patch, c * prod(patch)): each patch becomes one input, its values channels.

    Order inside a patch is row-major, channels last. What does not fill a patch at the far end is dropped.
    """
    if all(side == 1 for side in patch):
        return values
    dims = len(patch)
    grid = tuple(n // p for n, p in zip(values.shape[:dims], patch, strict=True))
    values = values[tuple(slice(0, n * p) for n, p in zip(grid, patch, strict=True))]
    split = [side for pair in zip(grid, patch, strict=True) for side in pair]
    values = values.reshape(*split, values.shape[-1])
    order = (*range(0, 2 * dims, 2), *range(1, 2 * dims, 2), 2 * dims)
    return np.ascontiguousarray(values.transpose(order).reshape(*grid, -1))


def cut_windows(
    blocks: Iterable[Array], rate_hz: float, window_s: float, hop_s: float
) -> Iterator[tuple[float, Array]]:
    """Yield (start in seconds, array) of the windows of a sequence that comes in blocks along its first axis.

    Where windows begin is said in `TimedModality.windows`. No more is held than a window and a block.
    """
    size = max(1, round(window_s * rate_hz))
    held: deque[tuple[int, Array]] = deque()  # blocks, each with its place
    total = count = start = end = 0

    def part(first: int, last: int) -> tuple[float, Array]:
        parts = [block[max(0, first - at) : last - at] for at, block in held if at < last]
        return first / rate_hz, np.concatenate(parts)

    for block in blocks:
        held.append((total, block))
        total += len(block)
        while start + size <= total:
            yield part(start, end := start + size)
            count += 1
            start = max(start + 1, round(count * hop_s * rate_hz))
        while held and held[0][0] + len(held[0][1]) <= min(start, total - size):
            held.popleft()
    if total and (count == 0 or total - end > 0.1 * hop_s * rate_hz):
        yield part(max(0, total - size), total)


def position_options(spec: InputSpec) -> dict[str, Any]:
    """Return the part of a Layout that is the same for every grid: learned positions and permutation."""
    learned = spec.learned_channels if spec.positions == "learned" else 0
    return {"learned_channels": learned, "learned_std": spec.learned_std, "permutation": spec.permutation}


def check_decoded(source: Source, count: float, itemsize: int, limits: Limits) -> None:
    """Refuse an array of `count` items that would pass `limits.decoded_bytes`, before it is allocated."""
    if count * itemsize > limits.decoded_bytes:
        raise LimitError(source.shown, count * itemsize, "decoded bytes", "decoded_bytes", limits.decoded_bytes)


def check_contract(source: Source, values: Array, what: str) -> Array:
    """Return `values` if they are non-empty and finite: what a decoder calls success is checked once more."""
    if values.size == 0:
        raise DataError(f"{source.shown}: no {what} in the file")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"{source.shown}: {what} that are not finite numbers")
    return values
