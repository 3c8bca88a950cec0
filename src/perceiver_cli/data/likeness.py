"""Near-copies: examples that decode to almost the same, such as a picture saved twice or a sound made louder. No torch.

Each example has a sketch, a unit vector of its coarse content (`Modality.sketch`). Two are near-copies if
their sketches are far nearer to each other than an example's nearest neighbour usually is in the same data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.data.decoder import Decoder
from perceiver_cli.data.examples import Example
from perceiver_cli.errors import PerceiverError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.spec import InputSpec

Sketches = NDArray[np.float32]
NEAR, ALWAYS = 0.02, 2e-4  # distances, 1 - cosine: never a near-copy above, always one below
OF_USUAL = 0.1  # share of the usual distance to the nearest neighbour below which a distance is that of a copy
LEAK_VAL, LEAK_TRAIN = 400, 4000  # examples compared before training
# Marks that programs add to the name of a copy or of a changed copy.
COPY = re.compile(
    r"(?:[ _-](?:copy|flip(?:ped)?|mirror(?:ed)?|rot(?:ated)?[ _-]?\d*|aug(?:mented)?[ _-]?\d*))+$", re.IGNORECASE
)
MARK = re.compile(
    r"[ _-](?:copy|flip|mirror|rot|aug)", re.IGNORECASE
)  # found faster, in every path that has such a mark
BLOCK = 1024  # rows compared at a time


class Pair(NamedTuple):
    """Two near-copies by their numbers, and the distance of their sketches."""

    first: int
    second: int
    distance: float


def sketch_of(arrays: Mapping[str, Array], specs: Mapping[str, InputSpec]) -> Sketches | None:
    """Return the sketch of decoded arrays by modality; None if one is missing or has none, as a cloud has."""
    if arrays.keys() != specs.keys():
        return None
    parts = []
    for name in sorted(arrays):
        part = modality(name).sketch(arrays[name], specs[name])
        if part is None or not (length := float(np.linalg.norm(part))) > 0:
            return None
        parts.append(part / length)
    return np.concatenate(parts).astype(np.float32) / np.float32(len(parts) ** 0.5) if parts else None


def sketches(decoder: Decoder, examples: Iterable[Example]) -> Iterator[Sketches | None]:
    """Yield the sketch of each example, None for one that cannot be read or has none."""
    for example in examples:
        try:
            yield sketch_of(decoder.decode(example).arrays, decoder.specs)
        except PerceiverError:
            yield None


def near_pairs(ones: Sketches, others: Sketches | None = None) -> list[Pair]:
    """Return near-copies between two sets of sketches (n, D) and (m, D), or within one, nearest first.

    Of each row of the first set its nearest of the second counts.
    """
    within, others = others is None, ones if others is None else others
    if len(ones) < 1 or len(others) < 2:
        return []
    nearest, distances = _nearest(ones, others, 0 if within else None)
    step = -(-len(others) // BLOCK)
    usual = distances if within else _nearest(others[::step], others, 0, step)[1]
    limit = max(ALWAYS, min(NEAR, OF_USUAL * float(np.median(usual))))
    pairs = {
        (min(i, j), max(i, j)) if within else (i, j): float(distances[i])
        for i, j in enumerate(nearest.tolist())
        if distances[i] <= limit
    }
    return sorted((Pair(i, j, distance) for (i, j), distance in pairs.items()), key=lambda pair: (pair.distance, pair))


def _nearest(
    ones: Sketches, others: Sketches, own: int | None = None, step: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return of each row the number of its nearest of `others`, and the distance.

    own: number among `others` of the first row, which is not its own neighbour, the next are `step` apart; None if no
    row is among them.
    """
    nearest, distances = np.zeros(len(ones), np.int64), np.zeros(len(ones))
    for start in range(0, len(ones), BLOCK):
        rows = ones[start : start + BLOCK]
        likeness = rows @ others.T
        if own is not None:
            places = np.arange(len(rows))
            likeness[places, own + (start + places) * step] = -np.inf
        best = likeness.argmax(axis=1)
        nearest[start : start + len(rows)] = best
        # The difference itself: 1 - cosine is rounding where it counts.
        distances[start : start + len(rows)] = np.square(rows - others[best]).sum(axis=1) / 2
    return nearest, distances


def stacked(rows: Sequence[Sketches | None]) -> tuple[list[int], Sketches]:
    """Return the numbers of the rows that are there, and these rows (n, D)."""
    there = [number for number, row in enumerate(rows) if row is not None]
    return there, np.stack([row for row in rows if row is not None]) if there else np.zeros((0, 1), np.float32)


def leak_note(decoder: Decoder, train: Sequence[Example], val: Sequence[Example]) -> str | None:
    """Return a line about validation examples that training has nearly seen, or None if none are found.

    By name: `cat_copy.png` or `cat_rot90.png` beside `cat.png`. By content: a sample of the examples that
    are in memory; no file is read for it.
    """
    if named := _named_copies(train, val):
        count, shown, how = len(named), show_path(named[0][0]), f"by its name a copy of {show_path(named[0][1])}"
    elif not decoder.decoded:
        return None
    else:
        kept = [[e for e in each if e.id in decoder.decoded] for each in (val, train)]
        ones, others = (e[:: max(1, -(-len(e) // most))] for e, most in zip(kept, (LEAK_VAL, LEAK_TRAIN), strict=True))
        (at_one, rows), (at_other, columns) = (stacked(list(sketches(decoder, each))) for each in (ones, others))
        pairs = near_pairs(rows, columns) if len(at_one) and rows.shape[1] == columns.shape[1] else []
        if not pairs:
            return None
        first = pairs[0]
        count, shown = len(pairs), show_path(ones[at_one[first.first]].id)
        how = f"nearly the same as {show_path(others[at_other[first.second]].id)}"
    return (
        f"training nearly holds {counted(count, 'validation example')}, such as {shown}, {how}: "
        "validation scores will be too good; keep what belongs together in one split with --group-by"
    )


def _named_copies(train: Sequence[Example], val: Sequence[Example]) -> list[tuple[str, str]]:
    """Return pairs of a validation and a training example of one origin, of which one has a mark in its name."""
    if not any(MARK.search(example.id) for example in chain(val, train)):
        return []
    known = {_origin(example.id): example.id for example in train}
    pairs = [(e.id, known[origin]) for e in val if (origin := _origin(e.id)) in known]
    return [pair for pair in pairs if any(COPY.search(_stem(identity)) for identity in pair)]


def _stem(identity: str) -> str:
    return os.path.splitext(os.path.basename(identity))[0]


def _origin(identity: str) -> tuple[str, str]:
    """Return the folder's name and the stem of a file without the mark of a copy."""
    return os.path.basename(os.path.dirname(identity)), COPY.sub("", _stem(identity))
