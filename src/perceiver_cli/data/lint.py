"""The faults of a data set, found by decoding all of it once; only hashes stay in memory. No torch."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import Config, DataConfig, load_preset, tiny_config
from perceiver_cli.data.account import Account
from perceiver_cli.data.catalog import Catalog, resolve_specs, scan
from perceiver_cli.data.decoder import Decoder, notes_of, told_once
from perceiver_cli.data.examples import Example
from perceiver_cli.data.manifest import NO_OPTIONS
from perceiver_cli.data.unlike import KINDS, Collected, Odd, Traits, traits_of
from perceiver_cli.data.workers import in_order
from perceiver_cli.errors import DataError, PerceiverError
from perceiver_cli.hardware import cores
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.base import ByteArray
from perceiver_cli.preprocess.spec import Limits

DIGEST_BYTES = 16
FAULTS = ("silent", "constant", "tiny")


@dataclass(frozen=True)
class Copies:
    """Examples of the same content, as (split, id, class names). same_file: whether their files are identical."""

    examples: tuple[tuple[str, str, tuple[str, ...]], ...]
    same_file: bool

    @property
    def across(self) -> bool:
        """Whether they lie in several splits."""
        return len({split for split, _, _ in self.examples}) > 1

    @property
    def conflict(self) -> bool:
        """Whether they have different labels."""
        return len({labels for _, _, labels in self.examples}) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        rows = [{"path": name, "split": split, "labels": list(labels)} for split, name, labels in self.examples]
        return {"examples": rows, "same_file": self.same_file, "across": self.across, "conflict": self.conflict}


@dataclass(frozen=True)
class LintReport:
    """The faults of a data set.

    sizes: number of examples in each split; counts: of each class in it. unreadable: (split, id, error). copies: groups
    of the same content. faults: (split, id, modality) of silent sound, constant pictures and clouds, tiny clouds. odd:
    files that can be read but are unlike the rest, or unlike their name.
    """

    catalog: Catalog = field(repr=False)
    data: str
    modalities: tuple[str, ...]
    sizes: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]
    unreadable: tuple[tuple[str, str, str], ...] = ()
    copies: tuple[Copies, ...] = ()
    faults: Mapping[str, Sequence[tuple[str, str, str]]] = field(default_factory=dict)
    odd: Mapping[str, Sequence[Odd]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: Account = field(default_factory=Account)  # what became of every path

    @property
    def imbalance(self) -> float | None:
        """Size of the largest class of train divided by the smallest; None with fewer than two classes."""
        counts = [count for count in self.counts.get("train", {}).values() if count]
        return max(counts) / min(counts) if len(counts) > 1 else None

    @property
    def missing(self) -> dict[str, list[str]]:
        """The classes without examples, by split."""
        absent = {split: [name for name, count in counts.items() if not count] for split, counts in self.counts.items()}
        return {split: names for split, names in absent.items() if names}

    @property
    def failed(self) -> bool:
        """Whether a file is unreadable or several splits share content."""
        return bool(self.unreadable) or any(group.across for group in self.copies)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `lint --json`."""
        return {
            "data": self.data,
            "modalities": list(self.modalities),
            "splits": {s: {"num_examples": size, "classes": dict(self.counts[s])} for s, size in self.sizes.items()},
            "failed": self.failed,
            "unreadable": [{"path": name, "split": split, "error": error} for split, name, error in self.unreadable],
            "duplicates": [group.to_dict() for group in self.copies],
            **{
                kind: [{"path": name, "split": split, "modality": m} for split, name, m in self.faults.get(kind, ())]
                for kind in FAULTS
            },
            **{kind: [each.to_dict() for each in self.odd.get(kind, ())] for kind in KINDS},
            "imbalance": self.imbalance,
            "missing_classes": self.missing,
            "notes": list(self.notes),
            "files": self.files.to_dict(),
        }


def lint(
    data: str | os.PathLike[str],
    raised: Mapping[str, float] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    options: DataConfig = NO_OPTIONS,
    preset: str | None = None,
) -> LintReport:
    """Return the faults of a folder, a manifest or records; each example is decoded once, as a recipe reads it.

    raised: limits per input. workers: processes; None is one per core. options: how to read data. preset: the recipe;
    None is the tiny one for the data, as in training. Memory: 38 bytes per example. Raises DataError if
    nothing is usable.
    """
    recipe = None if preset is None else load_preset(preset)
    catalog = scan(data, reads=None if recipe is None else recipe.inputs, options=options)
    splits = sorted(catalog.splits)
    ends = list(accumulate(len(catalog.splits[split]) for split in splits))
    examine = partial(_examined, _decoder(catalog, recipe, Limits().raised(raised)))
    examples = chain.from_iterable(catalog.splits[split] for split in splits)
    workers = cores() if workers is None else workers
    digests = np.zeros((ends[-1], 2, DIGEST_BYTES), np.uint8)
    unreadable: dict[int, tuple[str, str, str]] = {}
    faults: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in FAULTS}
    partly, collected, examined = dict[str, str](), Collected(), in_order(examine, examples, workers)
    for number, (identity, hashes, own_faults, own_notes, traits, error) in enumerate(examined):
        split = splits[bisect(ends, number)]
        if error is not None:
            unreadable[number] = (split, identity, error)
        digests[number] = np.frombuffer(hashes, np.uint8).reshape(2, DIGEST_BYTES)
        for kind, name in own_faults:
            faults[kind].append((split, identity, name))
        collected.add(traits)
        if own_notes:
            partly[identity] = "; ".join(own_notes)
        if progress is not None:
            progress(number + 1, ends[-1])

    def place_of(number: int) -> tuple[str, Example]:
        place = bisect(ends, number)
        return splits[place], catalog.splits[splits[place]][number - (ends[place - 1] if place else 0)]

    copies = tuple(_copies(catalog.classes, digests, set(unreadable), place_of))
    odd = {
        kind: [Odd(split, e.id, *pair) for number, pair in found.items() for split, e in [place_of(number)]]
        for kind, found in collected.unlike().items()
    }
    sizes = {split: len(catalog.splits[split]) for split in splits}
    counts = {split: catalog.counts(split) for split in splits}
    bad = tuple(unreadable.values())
    files = catalog.accounted({identity for _, identity, _ in bad})
    notes = (*catalog.notes, *told_once(partly))
    return LintReport(
        catalog, os.fspath(data), catalog.modalities, sizes, counts, bad, copies, faults, odd, notes, files
    )


def _copies(
    classes: Sequence[str],
    digests: NDArray[np.uint8],
    unreadable: set[int],
    place_of: Callable[[int], tuple[str, Example]],
) -> Iterator[Copies]:
    """Yield the groups of the same content. place_of: the split and the example of a number."""
    for same in _same(digests, unreadable):
        members = ((split, e.id, tuple(classes[label] for label in e.labels)) for split, e in map(place_of, same))
        yield Copies(tuple(members), len(np.unique(digests[same, 1], axis=0)) == 1)


def _same(digests: NDArray[np.uint8], unreadable: set[int]) -> Iterator[list[int]]:
    """Yield groups of readable examples that decode to the same, as their numbers, in order of the first of each."""
    halves = np.ascontiguousarray(digests[:, 0]).view(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: numbers rise within a group
    equal = np.flatnonzero((halves[order][1:] == halves[order][:-1]).all(axis=1))  # equal to the next in order
    runs = np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1)
    groups = (order[run[0] : run[-1] + 2].tolist() for run in runs if len(run))
    readable = ([number for number in group if number not in unreadable] for group in groups)
    yield from sorted(group for group in readable if len(group) > 1)


def _decoder(catalog: Catalog, recipe: Config | None, limits: Limits) -> Decoder:
    """Return a decoder with the records' specs or those of a recipe, without one a tiny preset's."""
    if catalog.prepared is not None:
        specs = dict(catalog.prepared.inputs)
    else:
        sample = catalog.splits.get("train") or catalog.merged(catalog.splits)
        inputs = (recipe or tiny_config(catalog.modalities)).inputs
        specs = {name: inputs[name] for name in catalog.modalities}
        try:
            specs = resolve_specs(specs, replace(catalog, splits={"train": sample}), limits)
        except DataError:  # no file can be read to settle them: the report lists each error
            specs = {name: settled(spec) for name, spec in specs.items()}
    return Decoder({name: specs[name] for name in catalog.modalities}, limits, catalog.bad)


def _examined(
    decoder: Decoder, example: Example
) -> tuple[str, bytes, list[tuple[str, str]], tuple[str, ...], Traits, str | None]:
    """Return its id, hashes of arrays and of files, faults as (kind, modality), notes, traits, its error or None."""
    decoded, files = (hashlib.blake2b(digest_size=DIGEST_BYTES) for _ in range(2))
    faults: list[tuple[str, str]] = []
    try:
        inputs = decoder.inputs(example)
        for name, each in inputs.items():
            ready = each.prepared() if each.is_prepared else ByteArray(each.array())
            array = ready.array
            decoded.update(f"{name} {array.dtype} {array.shape} ".encode())
            decoded.update(np.ascontiguousarray(array).data)
            kind = None if each.is_prepared else modality(name).fault(array)
            faults += [] if kind is None else [(kind, name)]
        for each in {each.origin: each for each in inputs.values()}.values():
            for block in each.content():
                files.update(block)
        traits = traits_of(inputs, decoder.limits)
    except PerceiverError as error:
        return example.id, bytes(2 * DIGEST_BYTES), [], (), Traits(), str(error)
    return example.id, decoded.digest() + files.digest(), faults, notes_of(inputs), traits, None
