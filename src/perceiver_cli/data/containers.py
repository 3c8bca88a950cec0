"""From a path to the containers that it stands for: tars, zips, Parquet and Arrow files. No torch."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from perceiver_cli.data.account import Account
from perceiver_cli.data.archives import holds_records, kind_of, unpacked
from perceiver_cli.data.folders import METADATA, entries, walk
from perceiver_cli.data.manifest import SPLIT_NAMES, is_manifest, top_split
from perceiver_cli.data.table_files import holds_files
from perceiver_cli.errors import DataError, PerceiverError, counted
from perceiver_cli.files import open_file, show_path
from perceiver_cli.preprocess.columnar import ARROW, PARQUET
from perceiver_cli.preprocess.detection import looked_at
from perceiver_cli.preprocess.foreign import ZIP, described
from perceiver_cli.preprocess.source import Source
from perceiver_cli.records.shards import INDEX_SUFFIX

SUFFIXES = {  # of containers in a folder; the first kind that the folder has is the data
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    "table": (".parquet", ".arrow"),
    "zip": (".zip",),
}
DATA_FOLDER = "data"  # where Hugging Face's data sets have their files
MAX_NAMES = 100_000  # that braces stand for
RANGE, CHOICE = re.compile(r"\{(\d+)\.\.(\d+)\}"), re.compile(r"\{([^{}]*,[^{}]*)\}")
PAGES = (".json", ".txt", ".md", ".pbtxt")  # files that describe the others


def containers(name: str) -> tuple[str, list[str]] | None:
    """Return the kind of the containers at a path and their paths, or None if there are none.

    A path is a container, a folder of them, or a pattern: `*.tar`, or `{000000..000009}.tar` with a range in braces.
    kind: "records" for tars of records; "archives" for other tars and zips; "tables" for Parquet and Arrow. Raises
    DataError for a pattern without a match.
    """
    if os.path.isdir(name):
        paths = _in_folder(name)
    elif os.path.isfile(name):
        paths = [name] if _kind(name) and (not is_manifest(name) or holds_files(name)) else []
    elif not os.path.exists(name) and (glob.has_magic(name) or RANGE.search(name) or CHOICE.search(name)):
        paths = _matches(name)
    else:
        return None
    kinds = {kind: path for path in paths if (kind := _kind(path)) is not None}
    if len(kinds) > 1:
        named = " and ".join(f"{kind} ({show_path(path)})" for kind, path in sorted(kinds.items()))
        raise DataError(f"{show_path(name)}: {named} together", "expected one kind of files")
    return (next(iter(kinds)), paths) if kinds else None


def _kind(path: str) -> str | None:
    """Return the kind of a container, None for another file."""
    try:
        with open_file(path) as file:
            head, _ = unpacked(file, path)
    except (OSError, ValueError):
        return None
    if head.startswith(PARQUET) or (head.startswith(ARROW) and path.lower().endswith(".arrow")):
        return "tables"
    return kind_of_stream(head)


def kind_of_stream(head: bytes) -> str | None:
    """Return "records" or "archives" for the first bytes of a stream, None for other files."""
    kind = kind_of(head)
    if kind == "zip" and (what := described(head, "")) is not None and what[0] != ZIP:  # of arrays, of an office
        return None
    return "records" if kind == "tar" and holds_records(head) else "archives" if kind else None


def _in_folder(top: str) -> list[str]:
    """Return the containers in a folder, its folders of splits and its folder `data`; none if it has other folders."""
    names, folders = _names(top)
    paths = [os.path.join(top, name) for name in names]
    for folder in folders:
        if top_split(folder) or folder.lower() == DATA_FOLDER:
            paths += [os.path.join(top, folder, name) for name in _names(os.path.join(top, folder))[0]]
    paths = [path for path in paths if os.path.basename(path).lower() not in METADATA]
    for suffixes in SUFFIXES.values():
        if found := [path for path in paths if path.lower().endswith(suffixes)]:
            within = {os.path.basename(os.path.dirname(path)) for path in found}
            return found if within.issuperset(folders) or _kind(found[0]) == "records" else []
    return []


def _names(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the files and of the folders in a folder, sorted, without hidden ones."""
    files: list[str] = []
    folders: list[str] = []
    for entry in entries(folder):
        is_folder = False
        with suppress(OSError):  # a link to itself
            is_folder = entry.is_dir()
        if not entry.name.startswith("."):
            (folders if is_folder else files).append(entry.name)
    return files, folders


def count_containers(name: str, paths: Sequence[str], account: Account) -> None:
    """Count containers, and every path beside them if they lie in a folder; their files are counted as they are read.

    name: the folder, or what else the paths were found by.
    """
    account.folders += len(paths)
    if not os.path.isdir(name):
        account.paths += len(paths)
        return
    own = {os.path.relpath(path, name).replace(os.sep, "/") for path in paths}
    for path, is_folder in walk(name, account):
        if path.endswith(INDEX_SUFFIX) and path.removesuffix(INDEX_SUFFIX) in own:
            account.pass_over("an index of records", path)
        elif not is_folder and path not in own:
            account.pass_over("beside the containers", path)


def _matches(pattern: str) -> list[str]:
    """Return the files that a pattern stands for. Raises DataError if there are none, or a range lacks some."""
    names = list(itertools.islice(_expanded(pattern), MAX_NAMES + 1))
    if len(names) > MAX_NAMES:
        raise DataError(f"{show_path(pattern)}: stands for more than {MAX_NAMES:,} files", "expected a smaller range")
    matches, missing = [], []
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name))
        matches += found
        missing += [] if found else [name]
    if not matches:
        raise DataError(f"{show_path(pattern)}: no file matches this pattern", "expected tars, zips or Parquet files")
    if missing:
        fault = f"{show_path(pattern)}: {len(missing)} of {counted(len(names), 'file')} do not exist"
        raise DataError(fault, f"the first is {show_path(missing[0])}")
    return list(dict.fromkeys(matches))


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the names that braces stand for: {000..009} a range, {a,b} a choice."""
    if (match := RANGE.search(pattern)) is not None:
        first, last = match[1], match[2]
        step = 1 if int(first) <= int(last) else -1
        for number in range(int(first), int(last) + step, step):
            yield from _expanded(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")
    elif (match := CHOICE.search(pattern)) is not None:
        for word in match[1].split(","):
            yield from _expanded(pattern[: match.start()] + word + pattern[match.end() :])
    else:
        yield pattern


def splits_of(paths: Sequence[str]) -> list[str]:
    """Return the split that each archive is named after, alone or by its folder; "train" for all if none is."""
    splits = []
    for path in paths:
        folder, name = os.path.split(path)
        words = [word for word in re.split(r"[^a-z]+", name.partition(".")[0].lower()) if word in SPLIT_NAMES]
        named = SPLIT_NAMES.get(os.path.basename(folder).lower()) if not words else SPLIT_NAMES[words[0]]
        splits.append(named or "train")
    return splits if "train" in splits else ["train"] * len(paths)


def name_of(path: str) -> str:
    """Return the name of a container in the ids of its files: its stem, after its folder if that names a split."""
    folder, name = os.path.split(path)
    folder = os.path.basename(folder)
    return (f"{folder}/" if top_split(folder) else "") + name.partition(".")[0]


def check_foreign(name: str, wanted: str | None) -> None:
    """Raise DataError for a file of a format that is not read, or a folder of nothing but such files.

    wanted: see `looked_at`.
    """
    paths = [name]
    if os.path.isdir(name):
        names, folders = _names(name)
        paths = [os.path.join(name, each) for each in names if not each.lower().endswith(PAGES)] if not folders else []
    refused = partial(_refused, wanted)
    first = next(map(refused, paths), None)
    if first is not None and all(map(refused, paths)):
        raise first


def _refused(wanted: str | None, path: str) -> DataError | None:
    """Return the error of a file whose format is known, and is not one that is read; None for another file."""
    file = looked_at(Source(path), None, wanted)
    with suppress(PerceiverError):
        return file.error if file.error is not None and described(file.source.head(), path) else None
    return None
