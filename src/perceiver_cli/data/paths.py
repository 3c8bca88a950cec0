"""From the paths in a manifest to files: Windows paths, file URLs, missing files. No torch."""

from __future__ import annotations

import glob
import ntpath
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from urllib.parse import unquote, urlsplit

from perceiver_cli.data.cells import bytes_of
from perceiver_cli.data.manifest import Labels, Row
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.detection import File
from perceiver_cli.preprocess.source import Source

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: C:/ is a drive
SEARCHED = 100_000  # paths that are looked at in search of a missing file
ROOTED = re.compile(r"[A-Za-z]:[\\/]|\\\\|/")  # an absolute path, here or on Windows


def located(rows: Sequence[Row], folder: str, shown: str, labels: Labels) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a manifest with paths as this machine writes them, and notes on changed and missing ones.

    If no file has a path as it stands, other forms are tried: slashes for backslashes, the path in a file URL, no
    blanks around it, the other normal form of Unicode, an absolute path of another machine below `folder`, the only
    file that adds a suffix to it. A row whose file is missing gets an error. Raises DataError if labels are wanted and
    no file exists.
    """
    moved = _moved([path for row in rows for path in row.paths], folder)
    changed: dict[str, str] = {}
    missing: Counter[str] = Counter()  # several rows may name one file
    every = 0
    suffixed = _Suffixed(folder)

    def local(path: str) -> str:
        nonlocal every
        every += 1
        for candidate in _readings(path, moved):
            if not _is_missing(folder, candidate):
                if candidate != path:
                    changed[path] = candidate
                return candidate
        if (found := suffixed.of(path)) is not None:
            changed[path] = found
            return found
        missing[path] += 1
        return path

    rows = [row.with_paths(local) for row in rows]
    notes = []
    if changed:
        first, now = next(iter(changed.items()))
        notes.append(
            f"{counted(len(changed), 'path')} read in another form, such as {show_path(first)} as {show_path(now)}"
        )
    if not missing:
        return rows, tuple(notes)
    first = next(iter(missing))
    place = f"paths are relative to {show_path(folder or '.')}"
    fault = f"{missing.total():,} of {counted(every, 'file')} do not exist, the first {show_path(first)}"
    advice = f"{place}; {_advice(first, folder)}"
    if (lies := _elsewhere(first, folder)) is not None:
        advice += f"; there is {show_path(lies)}"
    if every == missing.total() and labels != "ignored":
        raise DataError(f"{shown}: {fault}", advice)
    notes.append(f"{fault}; {advice}")
    return [_without_file(row, folder, place) if row.path in missing else row for row in rows], tuple(notes)


def _without_file(row: Row, folder: str, place: str) -> Row:
    source = Source(os.path.join(folder, row.path))
    error = DataError(f"{show_path(row.path)}: no such file", f"{place}; {_advice(row.path, folder)}")
    return replace(row, file=File(row.path, source, error))


class _Suffixed:
    """The files of folders by their names without suffixes; each folder is listed once."""

    def __init__(self, top: str) -> None:
        self.top = top
        self.stems: dict[str, dict[str, list[str]]] = {}

    def of(self, path: str) -> str | None:
        """Return the only existing path that adds a suffix to `path`; None if there are none or several."""
        folder, name = os.path.split(path)
        if folder not in self.stems:
            stems: dict[str, list[str]] = defaultdict(list)
            with suppress(OSError, ValueError):
                for each in os.listdir(os.path.join(self.top, folder) or "."):
                    stems[os.path.splitext(each)[0]].append(each)
            self.stems[folder] = stems
        found = self.stems[folder].get(name, []) if name else []
        return os.path.join(folder, found[0]) if len(found) == 1 and found[0] != name else None


def _readings(path: str, moved: str) -> Iterator[str]:
    """Yield a path as it stands, then as other programs mean it. moved: start of absolute paths to leave out."""
    yield path
    plain = path.strip()
    if plain.lower().startswith("file:"):
        plain = _path_of_url(plain)
    yield plain
    yield bytes_of(path)
    slashed = plain.replace("\\", "/")
    yield slashed
    if re.match(r"[A-Za-z]:/", slashed):
        yield f"/mnt/{slashed[0].lower()}{slashed[2:]}"  # a drive of Windows, as its Linux (WSL) mounts it
    if moved and slashed.startswith(moved):
        yield slashed.removeprefix(moved)
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, slashed)


def _path_of_url(url: str) -> str:
    """Return the path in a file URL; the URL itself if it is of another machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    if parts.netloc not in ("", "localhost"):
        return url
    path = unquote(parts.path, errors="surrogateescape")
    return path[1:] if re.match(r"/[A-Za-z]:/", path) else path


def _moved(paths: Sequence[str], folder: str) -> str:
    """Return the start to cut from another machine's absolute paths, so that they lie below `folder`, or "".

    All of these paths share it, so that no two of them become one.
    """
    absolute = [_path_of_url(path) if path.lower().startswith("file:") else path for path in map(str.strip, paths)]
    absolute = [path.replace("\\", "/") for path in absolute if ROOTED.match(path) and not os.path.exists(path)]
    if not absolute:
        return ""
    first, last = (posixpath.dirname(path).split("/") for path in (min(absolute), max(absolute)))
    shared = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    for count in range(1, len(shared) + 1):
        start = "/".join(shared[:count]) + "/"
        if not _is_missing(folder, absolute[0].removeprefix(start)):
            return start
    return ""


def _is_missing(folder: str, path: str) -> bool:
    """Return whether there is no file of this path; one that cannot be reached is not missing."""
    try:
        os.stat(os.path.join(folder, path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def _advice(path: str, folder: str) -> str:
    """Return what may be wrong with the path of a missing file."""
    if "\0" in path:
        return "no path has a NUL character: the manifest is damaged"
    if URL.match(path):
        return (
            "nothing is downloaded: name local files" if not path.lower().startswith("file:") else "no such file here"
        )
    if ntpath.splitdrive(path)[0] or path.startswith("\\\\"):
        return "this is a Windows path: pass --root with the folder here that holds the files"
    if "\\" in path:
        return "backslashes are read as slashes too: pass --root with the folder here that holds the files"
    whole = os.path.join(folder, path)
    if (other := _other_case(whole)) is not None:
        return f"upper and lower case differ: there is {show_path(other)}"
    if beside := glob.glob(f"{glob.escape(whole)}.*"):
        names = " and ".join(show_path(os.path.basename(name)) for name in sorted(beside)[:2])
        return f"the suffix is missing, and there are {names}"
    return "pass --root with the folder that holds them"


def _elsewhere(path: str, folder: str) -> str | None:
    """Return a file deeper in the folder whose path ends like the missing one, None if a short search finds none."""
    left = SEARCHED
    for place, _, names in os.walk(folder or "."):
        if place != (folder or ".") and os.path.isfile(there := os.path.join(place, path)):
            return there
        left -= len(names) + 1
        if left < 0:
            break
    return None


def _other_case(path: str) -> str | None:
    """Return the existing path that differs in upper and lower case alone, or None."""
    if not path or os.path.exists(path) or len(path) > 4096:
        return path or None
    parent, name = os.path.split(path)
    if parent == path:
        return None
    there = _other_case(parent) if parent else "."
    try:
        names = os.listdir(there) if there else []
    except (OSError, ValueError):
        return None
    found = next((each for each in sorted(names) if each.casefold() == name.casefold()), None)
    return None if found is None or there is None else os.path.join(there if parent else "", found)
