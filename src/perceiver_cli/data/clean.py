"""A list of the good files of a data set: a manifest to train on, without what `lint` found. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from perceiver_cli.data.catalog import Catalog
from perceiver_cli.data.examples import Example, Records
from perceiver_cli.data.lint import LintReport
from perceiver_cli.data.manifest import SEVERAL
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import check_suffix, show_path, write_text
from perceiver_cli.preprocess.source import Source

KEPT_FIRST = ("test", "val", "train")  # the copy in the first of these splits stays: training has the most files
Key = tuple[str, str]  # split and id


def left_out(report: LintReport) -> dict[Key, str]:
    """Return why each bad example is left out: unreadable, faulty, or a copy.

    Of several copies one stays, first in test, then in val, then in train; none stays if their labels differ. A fault
    of half of a class, such as silence, is what the class means, so its examples stay.
    """
    reasons = {(split, name): "unreadable" for split, name, _ in report.unreadable}
    labels = {(split, e.id): e.labels for split, e in _examples(report.catalog)}
    for kind, faults in report.faults.items():
        keys = [(split, name) for split, name, _ in faults]
        sizes = Counter(labels.values())
        faulty = Counter(labels[key] for key in keys)
        reasons |= {key: kind for key in keys if 2 * faulty[labels[key]] < sizes[labels[key]]}
    for group in report.copies:
        keys = [(split, name) for split, name, _ in group.examples]
        keys.sort(key=lambda key: KEPT_FIRST.index(key[0]))
        rest = keys if group.conflict else keys[1:]
        reasons |= dict.fromkeys(rest, "conflict" if group.conflict else "copy")
    return reasons


def is_listable(catalog: Catalog) -> bool:
    """Return whether a manifest can name every example: files on disk, neither records nor members of archives."""
    return not any(isinstance(examples, Records) for examples in catalog.splits.values()) and all(
        isinstance(source, Source) and source.data is None
        for _, example in _examples(catalog)
        for source in example.sources.values()
    )


def write_clean(report: LintReport, output: str) -> tuple[int, int]:
    """Write the list of good examples to FILE.csv or FILE.jsonl; return how many are in it and how many left out.

    Paths are relative to the list's folder. Raises UsageError for another suffix, for data that no list can name, and
    for a label that a CSV would part in two.
    """
    suffix = check_suffix(output, (".csv", ".jsonl"), "-o", "not a format of lists")
    catalog = report.catalog
    if not is_listable(catalog):
        raise UsageError(f"{show_path(report.data)}: a list names files, not records or members of archives")
    bad, folder = left_out(report), os.path.dirname(os.path.abspath(output))
    every = list(_examples(catalog))
    good = [(split, example) for split, example in every if (split, example.id) not in bad and example.sources]
    if not good:
        raise DataError(f"{show_path(report.data)}: no good file to list")
    is_single = all(len(example.files) == 1 for _, example in good)
    rows = [_row(split, example, catalog, folder, is_single=is_single) for split, example in good]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if suffix == ".jsonl":
        write_text(output, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        labels = (label for row in rows for label in row.get("labels", ()) if SEVERAL.search(label))
        if (label := next(labels, None)) is not None:
            raise UsageError(f"label {show_path(label)}: a CSV separates labels at ; , and |", "pass -o FILE.jsonl")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: ";".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        write_text(output, text.getvalue())
    return len(good), len(every) - len(good)


def _examples(catalog: Catalog) -> Iterator[tuple[str, Example]]:
    for split in sorted(catalog.splits):
        for example in catalog.splits[split]:
            yield split, example


def _row(split: str, example: Example, catalog: Catalog, folder: str, *, is_single: bool) -> dict[str, str | list[str]]:
    """Return the cells of an example: its path, or one for each modality; its label or labels; its split."""
    paths = {name: source.name for name, source in example.sources.items() if isinstance(source, Source)}
    paths = {"path": next(iter(paths.values()))} if is_single else paths
    cells: dict[str, str | list[str]] = {
        name: Path(os.path.relpath(path, folder)).as_posix() for name, path in paths.items()
    }
    labels = [catalog.classes[label] for label in example.labels]
    cells |= {"labels": labels} if catalog.multi_label else {"label": labels[0] if labels else ""}
    return cells | ({"split": split} if len(catalog.splits) > 1 else {})
