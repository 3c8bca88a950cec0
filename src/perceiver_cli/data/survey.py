"""What a model reads of a data set, in words: its choices, and what the headers of some files show beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from perceiver_cli.data.catalog import Catalog
from perceiver_cli.data.examples import Example
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits


def in_words(specs: Mapping[str, InputSpec], examples: Sequence[Example], limits: Limits) -> dict[str, str]:
    """Return by modality what is read of each file: "2 s at 16 kHz, 64 mel bands; 21 % of 256 files are 8 kHz".

    The files are spread evenly over the examples. Records say nothing of the files that they were made of.
    """
    words = {}
    for name, spec in specs.items():
        kind = modality(spec.modality)
        step = -(-len(examples) // max(1, kind.surveyed))
        places = range(0, len(examples), step) if kind.surveyed and step else ()
        brought = (examples[place].sources.get(name) for place in places)
        sources = [source for source in brought if isinstance(source, Source)]
        words[name] = "; ".join([kind.in_words(spec), *(kind.survey(spec, sources, limits) if sources else ())])
    return words


@dataclass(frozen=True)
class DataFacts:
    """What advice needs to know of a data set.

    counts: training examples by class. shared_folders: folders with files in both train and val, if there are more
    folders than one for each class: a folder may then be a speaker or a video.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    shared_folders: int = 0
    has_val: bool = False
    has_test: bool = False


def facts_of(catalog: Catalog) -> DataFacts:
    """Return the facts of a catalog that has its validation split."""
    folders = [{os.path.dirname(name) for name, _ in catalog.examples(split).named()} for split in ("train", "val")]
    are_many = len(folders[0]) >= 2 * len(catalog.classes) and catalog.group_by is None
    shared = len(folders[0] & folders[1]) if are_many else 0
    return DataFacts(catalog.counts("train"), shared, "val" in catalog.splits, "test" in catalog.splits)
