"""What is wrong with a data set, found by decoding all of it once; hashes are kept, never arrays. No torch."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import tiny_config
from perceiver_cli.data.catalog import Catalog, resolve_specs, scan
from perceiver_cli.data.decoder import Decoder
from perceiver_cli.data.examples import Example
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
    """Examples of the same content, as (split, id, class names). same_file: their files are the same, byte by byte."""

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
    """What was found in a data set.

    counts: examples of each class in each split; sizes: of each split, those without a class counted in. unreadable:
    (split, id, error). copies: groups of one content. faults: (split, id, modality) of sound that is silent, pictures
    and clouds that are constant, clouds that are tiny.
    """

    data: str
    modalities: tuple[str, ...]
    sizes: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]
    unreadable: tuple[tuple[str, str, str], ...] = ()
    copies: tuple[Copies, ...] = ()
    faults: Mapping[str, Sequence[tuple[str, str, str]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def imbalance(self) -> float | None:
        """How many times the smallest class of train the largest one is; None where there is nothing to compare."""
        counts = [count for count in self.counts.get("train", {}).values() if count]
        return max(counts) / min(counts) if len(counts) > 1 else None

    @property
    def missing(self) -> dict[str, list[str]]:
        """The classes that a split has no example of, by split."""
        absent = {split: [name for name, count in counts.items() if not count] for split, counts in self.counts.items()}
        return {split: names for split, names in absent.items() if names}

    @property
    def failed(self) -> bool:
        """Whether there is what must not be: unreadable files, or the same content in several splits."""
        return bool(self.unreadable) or any(group.across for group in self.copies)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `lint --json`."""
        faults = {
            kind: [{"path": name, "split": split, "modality": m} for split, name, m in self.faults.get(kind, ())]
            for kind in FAULTS
        }
        return {
            "data": self.data,
            "modalities": list(self.modalities),
            "splits": {s: {"num_examples": size, "classes": dict(self.counts[s])} for s, size in self.sizes.items()},
            "failed": self.failed,
            "unreadable": [{"path": name, "split": split, "error": error} for split, name, error in self.unreadable],
            "duplicates": [group.to_dict() for group in self.copies],
            **faults,
            "imbalance": self.imbalance,
            "missing_classes": self.missing,
            "notes": list(self.notes),
        }


def lint(
    data: str | os.PathLike[str],
    raised: Mapping[str, float] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LintReport:
    """Return what is wrong with a folder, a manifest or records, each example decoded once as a tiny preset would.

    raised: limits of what one input may cost. workers: processes; None is one a core. Memory does not grow with the
    size of what is decoded: 32 bytes of hashes an example. Raises DataError if nothing usable is there.
    """
    catalog = scan(data)
    splits = sorted(catalog.splits)
    ends = list(accumulate(len(catalog.splits[split]) for split in splits))
    look = _Look(catalog, Limits.model_validate(raised or {}))
    examples = chain.from_iterable(catalog.splits[split] for split in splits)
    workers = cores() if workers is None else workers
    digests = np.zeros((ends[-1], 2, DIGEST_BYTES), np.uint8)
    unreadable: dict[int, tuple[str, str, str]] = {}
    faults: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in FAULTS}
    for number, (identity, hashes, wrong, error) in enumerate(in_order(look, examples, workers)):
        split = splits[bisect(ends, number)]
        if error is not None:
            unreadable[number] = (split, identity, error)
        digests[number] = np.frombuffer(hashes, np.uint8).reshape(2, DIGEST_BYTES)
        for kind, name in wrong:
            faults[kind].append((split, identity, name))
        if progress is not None:
            progress(number + 1, ends[-1])
    copies = []
    for same in _same(digests, set(unreadable)):
        members = []
        for number in same:
            place = bisect(ends, number)
            example = catalog.splits[splits[place]][number - (ends[place - 1] if place else 0)]
            members.append((splits[place], example.id, tuple(catalog.classes[label] for label in example.labels)))
        copies.append(Copies(tuple(members), len(np.unique(digests[same, 1], axis=0)) == 1))
    sizes = {split: len(catalog.splits[split]) for split in splits}
    counts = {split: catalog.counts(split) for split in splits}
    bad, same_content = tuple(unreadable.values()), tuple(copies)
    return LintReport(os.fspath(data), catalog.modalities, sizes, counts, bad, same_content, faults, catalog.notes)


def _same(digests: NDArray[np.uint8], unreadable: set[int]) -> Iterator[list[int]]:
    """Yield the places of examples that decode to the same, group by group, in order of the first of each."""
    halves = np.ascontiguousarray(digests[:, 0]).view(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: places rise within a group
    equal = np.flatnonzero((halves[order][1:] == halves[order][:-1]).all(axis=1))  # to the next in order
    runs = np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1)
    groups = (order[run[0] : run[-1] + 2].tolist() for run in runs if len(run))
    readable = ([number for number in group if number not in unreadable] for group in groups)
    yield from sorted(group for group in readable if len(group) > 1)


class _Look:
    """Decodes one example and lets go of it."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        if catalog.prepared is not None:
            specs = dict(catalog.prepared.inputs)
        else:
            sample = catalog.splits.get("train") or catalog.merged(catalog.splits)
            specs = tiny_config(catalog.modalities).inputs
            try:
                specs = resolve_specs(specs, replace(catalog, splits={"train": sample}), limits)
            except DataError:  # nothing that can be read to settle them by: what each file says of itself will tell
                specs = {name: settled(spec) for name, spec in specs.items()}
        self.decoder = Decoder({name: specs[name] for name in catalog.modalities}, limits, catalog.bad)

    def __call__(self, example: Example) -> tuple[str, bytes, list[tuple[str, str]], str | None]:
        """Return its id, hashes of its arrays and its files, faults as (kind, modality), and why it is unreadable."""
        decoded, files = (hashlib.blake2b(digest_size=DIGEST_BYTES) for _ in range(2))
        faults: list[tuple[str, str]] = []
        try:
            inputs = self.decoder.inputs(example)
            for name, each in inputs.items():
                ready = each.prepared() if each.is_prepared else ByteArray(each.array())
                array = ready.values if ready.positions is None else ready.positions
                decoded.update(f"{name} {array.dtype} {array.shape} ".encode())
                decoded.update(np.ascontiguousarray(array).data)
                kind = None if each.is_prepared else modality(name).fault(array)
                faults += [] if kind is None else [(kind, name)]
            for each in {each.origin: each for each in inputs.values()}.values():
                for block in each.content():
                    files.update(block)
        except PerceiverError as error:
            return example.id, bytes(2 * DIGEST_BYTES), [], str(error)
        return example.id, decoded.digest() + files.digest(), faults, None
