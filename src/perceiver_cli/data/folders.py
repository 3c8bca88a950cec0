"""From a data folder to rows: class folders, and metadata beside the files. No torch."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from perceiver_cli.config import DataConfig
from perceiver_cli.data.account import Account
from perceiver_cli.data.layout import by_folder
from perceiver_cli.data.manifest import (
    NO_OPTIONS,
    SPLIT_NAMES,
    ColumnError,
    Labels,
    Manifest,
    Row,
    is_manifest,
    read_manifest,
    top_split,
)
from perceiver_cli.data.paths import located
from perceiver_cli.errors import DataError
from perceiver_cli.files import cannot_read, perceiver_command, show_path
from perceiver_cli.preprocess.detection import File
from perceiver_cli.run_folder import METRICS_FILE, MODEL_FILE, PREDICTIONS_FILE, SUMMARY_FILE

# Names that file servers and systems put beside users' files, in lower case.
SYSTEM = {
    "@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found", "__macosx",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip
# Unfinished downloads of browsers and others, backups of editors, locks of office programs.
LEFT_OVER = re.compile(r"~\$.*|.*(?:~|\.(?:part|partial|filepart|crdownload|opdownload|download))", re.I | re.S)
# The files by which an output of this program is known: a run folder, and a report of `evaluate -o`.
OUTPUTS = ({MODEL_FILE, METRICS_FILE}, {SUMMARY_FILE, PREDICTIONS_FILE})
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MAX_ENTERED = 16  # times that one folder is entered through links: links to each other would never end


def walk(top: str | os.PathLike[str], account: Account) -> Iterator[tuple[str, bool]]:
    """Yield the path below a folder of every file and folder that may hold data, and whether it is a folder.

    The order is by name, a folder's files before its folders. Links are followed, except to a folder that contains
    them. Passed over are hidden paths, files of systems, what this program wrote, and what is no file. `account` counts
    every path. Raises DataError for a folder that cannot be listed: its files would be missing in silence.
    """
    account.paths += 1
    yield from _walk(os.fspath(top), "", account, (), Counter())


Place = tuple[int, int]  # device and inode


def _walk(
    top: str, below: str, account: Account, above: tuple[Place, ...], entered: Counter[Place], *, linked: bool = False
) -> Iterator[tuple[str, bool]]:
    """Yield as `walk` for a folder `below` the top. above: the folders around it; entered: visits through links."""
    folder = os.path.join(top, below) if below else top
    listed = entries(folder)
    account.folders += 1
    if below and _is_output(listed):
        num_below = sum(map(_count, listed))
        _found(account, num_below, linked=linked)
        account.folders -= 1
        account.pass_over("written by this program", below, num_below + 1)
        return
    if below:
        yield below, True
    folders = []
    for entry in listed:
        name = f"{below}/{entry.name}" if below else entry.name  # slashes on any system: it becomes an id
        reason = reason_of(entry.name)
        count = 1 if reason is None else _count(entry)
        _found(account, count, linked=linked)
        status = _status(entry) if reason is None else None
        if status is not None and stat.S_ISDIR(status.st_mode):
            folders.append((name, status, entry.is_symlink()))
        elif status is not None and stat.S_ISREG(status.st_mode):
            yield name, False
        else:
            account.pass_over(reason or ("a link to nothing" if status is None else "no regular file"), name, count)
    here = os.stat(folder)
    above = (*above, (here.st_dev, here.st_ino))
    for name, status, is_link in folders:
        place = status.st_dev, status.st_ino
        if is_link:
            entered[place] += 1
            if place in above or entered[place] > MAX_ENTERED:
                account.pass_over("a link to a folder that contains it", name)
                continue
        yield from _walk(top, name, account, above, entered, linked=linked or is_link)


def reason_of(name: str) -> str | None:
    """Return why a path with this last name is passed over, None if it may hold data."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in SYSTEM:
        return "of the system"
    return "unfinished or a backup" if LEFT_OVER.fullmatch(name) else None


def _is_output(listed: Sequence[os.DirEntry[str]]) -> bool:
    """Return whether a folder was written by this program, or is one of run folders, such as runs/."""
    names = {entry.name for entry in listed}
    if "latest" in names:
        runs = [entry for entry in listed if entry.name != "latest" and entry.is_dir(follow_symlinks=False)]
        return bool(runs) and all(_is_output(entries(run.path)) for run in runs)
    return any(output <= names for output in OUTPUTS)


def _found(account: Account, count: int, *, linked: bool) -> None:
    if linked:
        account.linked += count
    else:
        account.paths += count


def entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name. Raises DataError if it cannot be listed."""
    try:
        with os.scandir(folder) as unsorted:
            return sorted(unsorted, key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_read(error.filename or folder, error) from error


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return the status of an entry behind all links, None if it is a link to nothing or to itself."""
    try:
        return os.stat(entry.path)
    except OSError as error:
        if entry.is_symlink():
            return None
        raise cannot_read(entry.path, error) from error


def _count(entry: os.DirEntry[str]) -> int:
    """Return the number of paths of an entry as `find` counts them: itself and all below it."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return 1 + sum(len(folders) + len(names) for _, folders, names in os.walk(entry.path))


def rows_in(
    top: Path, account: Account, notes: list[str], options: DataConfig = NO_OPTIONS, labels: Labels = "needed"
) -> Manifest:
    """Return a row for every file of a data folder, its path below the folder, as those of one manifest.

    Rows come from the first of: metadata.csv, .jsonl or .parquet with labels and file_name, in the folder or in each
    split's (Hugging Face's imagefolder and audiofolder); class folders, `split/class/file`, `class/split/file`
    (ModelNet's) or `class/file`; manifests named after splits (train.txt, val.csv). `options` name columns. `account`
    counts the paths without a row. Raises DataError for an unreadable manifest or one without that column.
    """
    entries = list(walk(top, account))
    files = [path for path, is_folder in entries if not is_folder]
    unlabelled: ColumnError | None = None
    try:
        if metadata := _metadata(files):
            read = [read_manifest(top / path, options, labels, beside=place) for path, place in metadata.items()]
            return _joined(read, top, files, metadata, account, notes, options, labels)
    except ColumnError as error:
        unlabelled = error
    rows, rest = by_folder(entries, notes)
    if unlabelled is not None:
        if not rows or options.group_by is not None or options.of_manifest:
            raise unlabelled
        notes.append(f"the classes are those of folders: {unlabelled}")
    if rows and options.group_by is not None:
        fault = f"{show_path(top)}: no column {show_path(options.group_by)}: classes are folders"
        begun = perceiver_command(["perceiver", "lint", os.fspath(top), "-o", "files.csv"])
        columns = f"path, label and {show_path(options.group_by)}"
        raise DataError(fault, f"group by parent, or pass a manifest with columns {columns}; to begin one: {begun}")
    if rows and options.of_manifest:
        fault = f"{show_path(top)}: classes are folders: no manifest to which {', '.join(options.of_manifest)} applies"
        raise ColumnError(fault, "name the manifest")
    lists = {} if rows else {path: split for path in files if (split := _list_of(path))}
    if not lists:
        for path, reason in rest.items():
            account.leave(reason, path)
        return Manifest(rows, multi_label=False)
    read = _tables(top, lists, options, labels)
    return _joined(read, top, files, lists, account, notes, options, labels)


def _tables(top: Path, lists: Mapping[str, str], options: DataConfig, labels: Labels) -> list[Manifest]:
    """Return the manifests of a folder, that of train first; the others have the kinds of its columns."""
    read: list[Manifest] = []
    for path, split in sorted(lists.items(), key=lambda pair: (pair[1] != "train", pair[0])):
        if read and read[0].columns and options.columns is None:
            options = options.model_copy(update={"columns": dict(read[0].columns)})
        own = read_manifest(top / path, options, labels, split=split)
        read.append(replace(own, rows=[row.of(path) for row in own.rows] if len(lists) > 1 else own.rows))
    return read


def _list_of(path: str) -> str | None:
    """Return the split of a manifest named after it at the top of a data folder, else None."""
    return SPLIT_NAMES.get(Path(path).stem.lower()) if os.path.dirname(path) == "" and is_manifest(path) else None


def has_metadata(top: str) -> bool:
    """Return whether a data folder or one of its split folders has metadata."""
    places = ["", *(name for name in os.listdir(top) if top_split(name))]
    return any(os.path.isfile(os.path.join(top, place, name)) for place in places for name in METADATA)


def rows_with_metadata(top: Path, files: Sequence[str], account: Account, options: DataConfig) -> list[Row]:
    """Return a row for every file of a folder to predict: as its metadata names them, then the others."""
    metadata = _metadata(files)
    try:
        read = [read_manifest(top / path, options, "ignored", beside=place) for path, place in metadata.items()]
    except ColumnError:
        if options.of_manifest:
            raise
        return list(map(Row, files))  # the metadata is about something else
    folder = os.path.abspath(options.root) if options.root is not None else os.fspath(top)
    rows, _ = located([row for each in read for row in each.rows], folder, show_path(top), "ignored")
    named = {_plain(path) for row in rows for path in row.paths}
    for path in metadata:
        account.pass_over("a manifest", path)
    rows = rows if options.root is None else [row.below(folder) for row in rows]
    return rows + [Row(path) for path in files if path not in named and path not in metadata]


def _metadata(files: Sequence[str]) -> dict[str, str]:
    """Return the metadata of a data folder and its split folders, each with its folder."""
    paths = {path: os.path.dirname(path) for path in files if os.path.basename(path) in METADATA}
    return {path: place for path, place in paths.items() if not place or ("/" not in place and top_split(place))}


def _joined(
    read: Sequence[Manifest],
    top: Path,
    files: Sequence[str],
    lists: Collection[str],
    account: Account,
    notes: list[str],
    options: DataConfig,
    labels: Labels,
) -> Manifest:
    """Return the rows of the manifests in a folder as one manifest.

    `account` counts the files that they do not name or leave out, and those that they name again or that are absent.
    """
    rows = [row for each in read for row in each.rows]
    rows, paths = located(rows, options.root or os.fspath(top), show_path(top), labels)
    notes += [*dict.fromkeys(note for each in read for note in each.notes), *paths]
    unlabelled = [_plain(path) for each in read for path in each.unlabelled]
    each = [*unlabelled, *(_plain(path) for row in rows for path in set(row.paths))]
    named = set(each)
    account.absent += len(each) - len(named.intersection(files))
    for path in unlabelled:
        account.unlabelled.add(path)
    for path in files:
        if path in lists:
            account.pass_over("a manifest", path)
        elif path not in named:
            account.pass_over("named by no manifest", path)
    account.absent += sum(not row.paths for row in rows if row.cells)  # cells are in no file of their own
    several = any(one.multi_label for one in read)
    return Manifest(rows, several, columns=next((one.columns for one in read if one.columns), {}))


def _plain(path: str) -> str:
    """Return a path as `walk` writes it."""
    return posixpath.normpath(path.replace(os.sep, "/"))


def parent(path: str) -> str:
    """Return the name of the folder that a file lies in."""
    return os.path.basename(os.path.dirname(path))


def suffix_of(path: str) -> str:
    """Return the suffix of a path in lower case, or "no suffix"."""
    return os.path.splitext(path)[1].lower() or "no suffix"


def of_suffix(file: File) -> str:
    """Return a file's suffix and its modality, if any, to say why it is passed over."""
    suffix = suffix_of(file.path)
    return f"{suffix} ({file.source.kinds[0]})" if file.source.kinds else suffix


def tally(counter: Counter[str]) -> str:
    """Return the five most common names with their counts, for a message."""
    shown = ", ".join(f"{show_path(name)} {count}" for name, count in counter.most_common(5))
    return shown + (", ..." if len(counter) > 5 else "")
