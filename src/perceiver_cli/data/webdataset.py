"""From tars and zips to rows: class folders, or WebDataset's files of one key with its label beside them. No torch."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from perceiver_cli.config import DataConfig
from perceiver_cli.data.account import FLAT, Account
from perceiver_cli.data.archives import Contents
from perceiver_cli.data.cells import as_label
from perceiver_cli.data.containers import name_of, splits_of
from perceiver_cli.data.folders import METADATA, reason_of
from perceiver_cli.data.layout import by_folder
from perceiver_cli.data.manifest import NEEDED, SPLIT_NAMES, ColumnError, Labels, Row, read_manifest, top_split
from perceiver_cli.data.pairing import MOST, stem
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import parse_json, show_path, show_text
from perceiver_cli.preprocess.source import Member, Source
from perceiver_cli.preprocess.spec import Limits

LABEL, FACTS, CAPTION = "cls", "json", "txt"  # suffixes of the files that say something about the others of their key
FIELDS = ("label", "class", "cls")  # fields of KEY.json that are a label, if no option names one
CLASS_NAMES = ("classes.txt", "classnames.txt", "class_names.txt", "labels.txt", "classnames", "classes")
PAGES = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|citation)\b.*", re.IGNORECASE)  # beside the one folder
SMALL = Limits(file_bytes=1 << 20)  # for a label, the facts of a key, the names of classes
SHOWN = 8  # fields of a JSON that a message names


@dataclass
class Packed:
    """The files of an archive that may hold data: keys are WebDataset's, each with the paths of its suffixes."""

    contents: Contents
    files: Mapping[str, Member]
    keys: Mapping[str, dict[str, str]]
    split: str = "train"
    prefixes: dict[str, str] = field(default_factory=dict)  # of a key that an earlier archive has too

    def source(self, path: str, shown: str | None = None) -> Source:
        """Return a member as a source; `shown` is its path in messages."""
        return Source(os.path.join(self.contents.archive.path, shown or path), self.files[path])

    def text(self, path: str) -> bytes:
        """Return the bytes of a small member."""
        source = self.source(path)
        return source.read(SMALL) if self.files[path].size else b""


def rows_of(
    each: Sequence[Contents], labels: Labels, options: DataConfig, account: Account, notes: list[str]
) -> tuple[list[Row], bool]:
    """Return a row for each file of tars and zips that may hold data, and whether the data is multi-label.

    Labels are those of KEY.cls, metadata, a field of KEY.json, class folders, in an archive or in its one folder at the
    top, or the names of the archives. labels: see `listing.listed`. account: counts every member. Raises DataError for
    damaged labels, and if labels are needed and missing.
    """
    splits = splits_of([contents.archive.path for contents in each])
    archives = [_packed(contents, split, account) for contents, split in zip(each, splits, strict=True)]
    seen: dict[str, int] = {}
    for number, packed in enumerate(archives):
        name = name_of(packed.contents.archive.path)
        packed.prefixes = {
            key: f"{name}/"
            for key in {*packed.keys, *map(stem, packed.files)}
            if seen.setdefault(key, number) != number
        }
    is_keyed = any(LABEL in of_key and len(of_key) > 1 for packed in archives for of_key in packed.keys.values())
    if labels != "ignored" and not is_keyed:
        if described := _by_metadata(archives, labels, options, account, notes):
            return described
        if options.label_column is None:
            rows = [row for packed in archives for row in _by_folder(packed, account, notes)]
            if rows or (rows := _by_archive(archives, notes)):
                return rows, False
    is_keyed = is_keyed or _has_facts(archives)
    files = [(packed, *each) for packed in archives for each in _data_files(packed, is_keyed, account)]
    if labels != "ignored" and is_keyed and (found := _labels(archives, options, notes)):
        rows = [_row(packed, key, path, name, found.get(_place(packed, key))) for packed, key, path, name in files]
        for row in [row for row in rows if not row.labels and labels in NEEDED]:
            account.unlabelled.add(row.path)
        return [row for row in rows if row.labels or labels not in NEEDED], False
    if labels in NEEDED:
        raise _no_labels(archives, options)
    return [_row(packed, key, path, name, None) for packed, key, path, name in files], False


def _packed(contents: Contents, split: str, account: Account) -> Packed:
    """Return the files of an archive that may hold data; the account gets all others."""
    account.inside += len(contents.files) + len(contents.folders) + len(contents.unread)
    account.folders += len(contents.folders)
    for reason, path in contents.unread:
        account.pass_over(reason, path)
    files = {}
    for path, member in contents.files.items():
        hidden = next(filter(None, map(reason_of, path.split("/"))), None)
        if hidden is not None:
            account.pass_over(hidden, path)
        else:
            files[path] = member
    return Packed(contents, files, _keys(files), split)


def _keys(files: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the path of each suffix by key: a path up to its first dot, or to its last one where names have dots."""
    for last in (False, True):
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        sayings: Counter[tuple[str, str]] = Counter()
        for path in files:
            folder, slash, name = path.rpartition("/")
            key, _, suffix = name.rpartition(".") if last else name.partition(".")
            key, suffix = (key, suffix) if key else (name, "")
            keys[folder + slash + key].setdefault(suffix.lower(), path)
            sayings[folder + slash + key, _ending(suffix)] += 1
        if all(count == 1 or ending not in (LABEL, FACTS) for (_, ending), count in sayings.items()):
            break
    return {
        key: {_ending(s) if _ending(s) in (LABEL, FACTS) else s: p for s, p in own.items()} for key, own in keys.items()
    }


def _ending(suffix: str) -> str:
    return suffix.rpartition(".")[2].lower()


def _has_facts(archives: Sequence[Packed]) -> bool:
    """Return whether most keys with data have a JSON or a caption beside it."""
    data = [own.keys() for packed in archives for own in packed.keys.values() if own.keys() - {FACTS, CAPTION, LABEL}]
    return sum(bool(own & {FACTS, CAPTION}) for own in data) > MOST * len(data)


def _data_files(packed: Packed, is_keyed: bool, account: Account) -> Iterator[tuple[str, str, str]]:
    """Yield key, path and name of each file that may hold data: one of a suffix per key, if the files have keys.

    The name of a keyed file is its key with its last suffix, so that the files of a key are one example.
    """
    if not is_keyed:
        yield from (("", path, path) for path in sorted(packed.files, key=_as_walked))
        return
    for path in sorted(packed.files.keys() - {path for own in packed.keys.values() for path in own.values()}):
        account.pass_over("a second file of its key and suffix", path)
    for key, own in sorted(packed.keys.items()):
        seen: set[str] = set()
        for suffix in sorted(own, key=lambda suffix: (suffix.count("."), suffix)):
            if os.path.basename(own[suffix]).lower() in CLASS_NAMES:
                account.pass_over("the names of the classes", own[suffix])
            elif suffix in (LABEL, FACTS, CAPTION):
                account.pass_over("about the other files of its key", own[suffix])
            elif _ending(suffix) in seen:
                account.pass_over("a second file of its key and suffix", own[suffix])
            else:
                seen.add(_ending(suffix))
                yield key, own[suffix], key + os.path.splitext(own[suffix])[1]


def _row(packed: Packed, key: str, path: str, name: str, label: tuple[str, str] | None) -> Row:
    name = packed.prefixes.get(key or stem(path), "") + name
    labels, group = ((label[0],), label[1]) if label else ((), "")
    return Row(name, split=packed.split, labels=labels, group=group, source=packed.source(path, name))


def _place(packed: Packed, key: str) -> tuple[str, str]:
    return packed.contents.archive.path, key


def _labels(
    archives: Sequence[Packed], options: DataConfig, notes: list[str]
) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (label, group) by archive and key, for keys with a label."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    names: dict[str, Sequence[str]] = {}
    fields = (options.label_column,) if options.label_column is not None else FIELDS
    by_field = options.label_column is not None or not any(
        LABEL in own for packed in archives for own in packed.keys.values()
    )
    for packed in archives:
        for key, own in packed.keys.items():
            facts: Mapping[str, object] = {}
            if FACTS in own and (by_field or options.group_by is not None):
                facts = _facts(packed, own[FACTS])
            if by_field:
                label = next(
                    (text for name in fields if (text := _scalar(packed, own.get(FACTS, key), name, facts))), ""
                )
            else:
                label = _text(packed, own[LABEL]) if LABEL in own else ""
            if label:
                group = _scalar(packed, own.get(FACTS, key), options.group_by or "", facts)
                found[_place(packed, key)] = label, group
    if all(re.fullmatch(r"\d{1,9}", label) for label, _ in found.values()):
        for packed in archives:
            if listed := _class_names(packed):
                place, names[packed.contents.archive.path] = listed
                notes.append(f"the names of the classes are those in {show_path(place)}")
    if options.group_by is not None and not all(group for _, group in found.values()):
        raise ColumnError(f"{_shown(archives)}: some KEY.json have no field {show_path(options.group_by)} to group by")
    return {place: (_named(names.get(place[0]), label, place), group) for place, (label, group) in found.items()}


def _named(names: Sequence[str] | None, label: str, place: tuple[str, str]) -> str:
    if names is None:
        return label
    if int(label) >= len(names):
        fault = f"{show_path(os.path.join(*place))}: label {label}, but there are names of {len(names)} classes"
        raise DataError(fault, "expected a name for each index, from 0 on")
    return names[int(label)]


def _class_names(packed: Packed) -> tuple[str, list[str]] | None:
    """Return the names of the classes, in order, and the file that says them: in the archive, or beside it."""
    path = packed.contents.archive.path
    inside = [name for name in packed.files if name.lower() in CLASS_NAMES]
    folders = [os.path.dirname(path)]
    if top_split(os.path.basename(folders[0])):
        folders.append(os.path.dirname(folders[0]))
    beside = [os.path.join(folder, name) for folder in folders for name in CLASS_NAMES]
    beside = [each for each in beside if os.path.isfile(each)]
    if not inside and not beside:
        return None
    source = packed.source(inside[0]) if inside else Source(beside[0])
    text = source.read(SMALL).decode("utf-8-sig", "replace")
    names = [line.strip() for line in text.rstrip().split("\n")]
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{source.shown}: a class name is empty or stands twice", "expected a class in each line")
    return source.name, names


def _facts(packed: Packed, path: str) -> Mapping[str, object]:
    """Return the object in KEY.json."""
    try:
        facts = parse_json(packed.text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{packed.source(path).shown}: not JSON: {show_text(str(error))}") from error
    return facts if isinstance(facts, dict) else {"": facts}


def _scalar(packed: Packed, path: str, name: str, facts: Mapping[str, object]) -> str:
    """Return a field of KEY.json as text, "" for none."""
    try:
        return as_label(facts.get(name))
    except ValueError as error:
        fault = f"{packed.source(path).shown}: the field {show_path(name)} is {error}"
        raise DataError(fault, "expected text or a number") from error


def _text(packed: Packed, path: str) -> str:
    """Return the label in KEY.cls."""
    try:
        return as_label(packed.text(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{packed.source(path).shown}: a label that is no text", "expected an index or a name"
        ) from error


def _no_labels(archives: Sequence[Packed], options: DataConfig) -> ColumnError:
    """Return the error of archives without labels: what is there instead, and what makes a label of it."""
    own = [of_key for packed in archives for of_key in packed.keys.values()]
    facts = next(((p, k[FACTS]) for p in archives for k in p.keys.values() if FACTS in k and len(k) > 1), None)
    has = [f"{counted(sum(map(_has_caption, own)), 'caption')}"] if any(map(_has_caption, own)) else []
    fields = sorted(_facts(*facts)) if facts is not None else []
    has += [f"KEY.json with {', '.join(map(show_path, fields[:SHOWN]))}"] if fields else []
    wanted = "" if options.label_column is None else f" {show_path(options.label_column)}"
    fault = f"{_shown(archives)}: no label{wanted} in {counted(sum(len(p.files) for p in archives), 'file')}"
    fault += f": found {' and '.join(has)}" if has else ""
    hint = "expected class folders, KEY.cls, or KEY.json with a field label, class or cls"
    return ColumnError(fault, hint + ("; --label-column FIELD names another" if fields else ""))


def _has_caption(of_key: Mapping[str, str]) -> bool:
    return CAPTION in of_key and len(of_key) > 1


def _shown(archives: Sequence[Packed]) -> str:
    first = show_path(archives[0].contents.archive.path)
    return first if len(archives) == 1 else f"{first} and {counted(len(archives) - 1, 'other')}"


def _by_metadata(
    archives: Sequence[Packed], labels: Labels, options: DataConfig, account: Account, notes: list[str]
) -> tuple[list[Row], bool] | None:
    """Return the rows of the metadata in archives and whether the data is multi-label, None without metadata."""
    found: list[Row] = []
    several = False
    for packed in archives:
        lists = [path for path in packed.files if os.path.basename(path) in METADATA]
        if not lists:
            continue
        top = os.path.commonpath([os.path.dirname(path) for path in lists])
        top = os.path.dirname(top) if top_split(os.path.basename(top)) else top
        named = set(lists)
        for path in lists:
            try:
                read = read_manifest(
                    packed.source(path),
                    options,
                    labels,
                    beside=posixpath.relpath(os.path.dirname(path) or ".", top or "."),
                )
            except ColumnError:
                return None
            notes += read.notes
            several = several or read.multi_label
            rows = [(row, member) for row in read.rows if (member := posixpath.normpath(posixpath.join(top, row.path)))]
            absent = [member for _, member in rows if member not in packed.files]
            if absent or any(row.columns for row in read.rows):
                fault = "files in several columns, expected one column of paths in an archive"
                if absent:
                    lacking = f"{len(absent)} of {counted(len(rows), 'file')}"
                    fault = f"{lacking} are not in the archive, the first {show_path(absent[0])}"
                raise DataError(f"{packed.source(path).shown}: {fault}", "unpack it")
            named.update(member for _, member in rows)
            found += [replace(row, source=packed.source(member, row.path)) for row, member in rows]
            account.pass_over("a manifest", path)
        for path in sorted(packed.files.keys() - named):
            account.pass_over("named by no manifest", path)
    return (found, several) if found else None


def _by_folder(packed: Packed, account: Account, notes: list[str]) -> list[Row]:
    """Return the rows of class folders in an archive, below its one folder at the top if all are in it."""
    top = _top(packed.files)
    below = {path[len(top) :]: path for path in packed.files if path.startswith(top)}  # the paths of members
    paths = sorted(below, key=_as_walked)
    rows, rest = by_folder(((path, False) for path in paths), notes)
    if not rows:
        return []
    for path in sorted(packed.files.keys() - below.values()):
        account.pass_over(FLAT, path)
    for path, why in rest.items():
        account.leave(why, path)
    found = []
    for row in rows:
        path = packed.prefixes.get(stem(below[row.path]), "") + row.path
        split = row.split if packed.split == "train" else packed.split
        found.append(Row(path, split=split, labels=row.labels, source=packed.source(below[row.path], path)))
    return found


def _by_archive(archives: Sequence[Packed], notes: list[str]) -> list[Row]:
    """Return the rows of archives that are named after classes, as ImageNet's; none if the names are those of shards.

    Names of shards differ in their numbers alone, or name splits. ImageNet's classes do too: n and eight digits.
    """
    names = [os.path.basename(name_of(packed.contents.archive.path)) for packed in archives]
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    forms = {re.sub(r"\d+", "0", name) for name in names}
    are_classes = len(forms) > 1 or all(re.fullmatch(r"n\d{8}", name) for name in names)
    if len(set(names)) < 2 or not are_classes or not words.isdisjoint(SPLIT_NAMES):
        return []
    if not all(packed.files and not any("/" in path for path in packed.files) for packed in archives):
        return []
    notes.append(f"each archive is a class: {counted(len(set(names)), 'name')}, the first {show_path(min(names))}")
    rows = []
    for packed, name in zip(archives, names, strict=True):
        for path in sorted(packed.files, key=_as_walked):
            shown = f"{name_of(packed.contents.archive.path)}/{path}"
            rows.append(Row(shown, split=packed.split, labels=(name,), source=packed.source(path, shown)))
    return rows


def _top(files: Iterable[str]) -> str:
    """Return the one folder that holds all class folders, with a slash; "" if they are at the top."""
    top, inner = "", list(files)
    while True:
        inner = [path for path in inner if "/" in path or not PAGES.fullmatch(path)]
        firsts = {path.partition("/")[0] for path in inner}
        below = [path.partition("/")[2] for path in inner]
        if len(firsts) != 1 or any(map(top_split, firsts)) or not any("/" in path for path in below):
            return top
        top += firsts.pop() + "/"
        inner = below


def _as_walked(path: str) -> list[tuple[bool, str]]:
    """Return the key of the order in which a folder is walked: by name, files before folders."""
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, name)]
