"""Archives read in place: where the members of tars and zips lie, so that any process opens them there. No torch.

A tar and a zip are listed once, and no member is unpacked to a file. A compressed tar and a stream have no places:
they are copied to a temporary file that ends with the process. The names of members are only ids, never paths.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from perceiver_cli.data.members import (
    READ_BYTES,
    ZIP_MEMBER,
    Archive,
    Deflated,
    Slice,
    copied,
    replayed,
    state_of,
    stream_errors,
)
from perceiver_cli.errors import DataError, PerceiverError, counted
from perceiver_cli.files import cannot_read, open_file, show_path
from perceiver_cli.preprocess.source import Member
from perceiver_cli.records.stream import BLOCK, HEADER, ZEROS, compression

ZIP = (ZIP_MEMBER, b"PK\x05\x06")  # a zip, and one without members
MAX_NAME_BYTES = 1 << 16  # of the name of a member
MAX_DIRECTORY_BYTES = 256 << 20  # of the directory of a zip: about two million members
MAX_LINKS = 8  # links between a name and its file
METHODS = {8: "deflate", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 98: "PPMd", 99: "AES"}
OPENERS: dict[str, Callable[[Any], Any]] = {
    "zcat": lambda file: gzip.GzipFile(fileobj=file), "xz -dc": lzma.LZMAFile, "bzcat": bz2.BZ2File,
}  # fmt: skip


@dataclass
class Contents:
    """The contents of an archive: the place of each file by its path, and the paths of its folders.

    unread: (reason, name) of each other member; files, folders and these are all members.
    """

    archive: Archive
    files: dict[str, Member] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, member: Member) -> None:
        """Add a file; a later one of the same name replaces it, as it would be if they were unpacked."""
        if not path:
            self.unread.append(("without a name", path))
            return
        if path in self.files:
            self.unread.append(("replaced by a later member of the same name", path))
        self.files[path] = member

    def link(self, links: dict[str, str | None]) -> None:
        """Add links to files of the archive. links: the target of each path, None for one outside."""
        for path, target in links.items():
            for _ in range(MAX_LINKS):
                target = links.get(target or "", target)
            if target in self.files and path not in self.files:
                self.files[path] = self.files[target]
            else:
                self.unread.append(("a link to no file of the archive", path))


def kind_of(head: bytes) -> str | None:
    """Return "tar" or "zip" for the first bytes of an archive, else None."""
    if head.startswith(ZIP):
        return "zip"
    block = head[:BLOCK]
    if len(block) < BLOCK or block == ZEROS:
        return None
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # its checksum tells, also without "ustar"
    except (tarfile.HeaderError, ValueError):
        return None
    return "tar"


def holds_records(head: bytes) -> bool:
    """Return whether a tar begins as records do."""
    return head.startswith(HEADER.encode() + b"\0")


def path_of(name: str) -> str:
    """Return the path of a member: its name without a `/` at the start, `./` and `..`."""
    return posixpath.normpath("/" + name.lstrip("/"))[1:]


def _target_of(link: str, folder: str) -> str | None:
    """Return the path that a link in a folder leads to, None if it leads out of the archive."""
    path = posixpath.normpath(posixpath.join("/x", folder, link))
    return path[3:] if path.startswith("/x/") else None


def contents_of(file: BinaryIO, archive: Archive) -> Contents:
    """Return what a tar or zip holds. Raises DataError if it is damaged or cut short, or has encrypted members."""
    shown = show_path(archive.path)
    contents = Contents(archive)
    file.seek(0)
    kind = kind_of(file.read(BLOCK))
    file.seek(0)
    try:
        _list_zip(file, contents) if kind == "zip" else _list_tar(file, contents)
    except PerceiverError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        count = len(contents.files)
        raise DataError(f"{shown}: a damaged {kind or 'tar'} after {counted(count, 'file')}: {error}") from error
    except (OSError, EOFError, ValueError, ArithmeticError, RuntimeError, LookupError, struct.error) as error:
        raise DataError(f"{shown}: a damaged {kind or 'tar'}: {error}") from error
    return contents


class _Careful:
    """A file that gives at most `most` bytes at once: a hostile archive decides how many its reader asks for."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most = file, most
        self.seek, self.tell, self.name = file.seek, file.tell, ""

    def read(self, count: int = -1) -> bytes:
        data = b"" if count > self.most else self.file.read(self.most + 1 if count < 0 else count)
        if max(count, len(data)) > self.most:
            raise ValueError(f"names of {counted(max(count, len(data)), 'byte')}, expected {self.most} at most")
        return data

    def seekable(self) -> bool:
        return True


def _list_tar(file: BinaryIO, contents: Contents) -> None:
    """Add the members of a tar, or of several that follow each other."""
    careful: Any = _Careful(file, MAX_NAME_BYTES)
    tar = tarfile.TarFile(fileobj=careful, mode="r", encoding="utf-8", errors="surrogateescape")
    size, links = contents.archive.state[0], dict[str, str | None]()
    at = 0
    while (at := _after_zeros(file, at)) < size:
        file.seek(at)
        tar.offset = at
        info = tarfile.TarInfo.fromtarfile(tar)
        if tar.offset <= at or info.size < 0:
            raise tarfile.HeaderError("a member of negative size")
        at = tar.offset
        if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
            count = len(contents.files)
            fault = f"{show_path(contents.archive.path)}: cut short: it ends in member {count + 1}"
            raise DataError(f"{fault}, {show_path(info.name)}", "fetch it again")
        path = path_of(info.name)
        if info.isdir():
            contents.folders.append(path)
        elif info.issym() or info.islnk():
            folder = posixpath.dirname(path) if info.issym() else ""  # a hard link names a member
            links[path] = _target_of(info.linkname if info.issym() else path_of(info.linkname), folder)
        elif info.issparse() or not info.isreg():
            contents.unread.append(("a sparse file" if info.issparse() else "no regular file", path))
        else:
            contents.add(path, Slice(contents.archive, info.offset_data, info.size))
    contents.link(links)


def _after_zeros(file: BinaryIO, at: int) -> int:
    """Return the place of the next block of a tar that is not zeros, from a place on."""
    file.seek(at)
    if (block := file.read(BLOCK)) and block != ZEROS[: len(block)]:
        return at
    file.seek(at)
    while data := file.read(READ_BYTES):
        rest = data.lstrip(b"\0")
        if rest:
            return at + (len(data) - len(rest)) // BLOCK * BLOCK
        at += len(data)
    return at


def _list_zip(file: BinaryIO, contents: Contents) -> None:
    """Add the members of a zip."""
    careful: Any = _Careful(file, MAX_DIRECTORY_BYTES)
    links: dict[str, str | None] = {}
    locked: dict[str, list[str]] = {}
    with zipfile.ZipFile(careful) as opened:
        for info in opened.infolist():
            path = path_of(_name_in_zip(info))
            mode = info.external_attr >> 16
            if info.is_dir():
                contents.folders.append(path)
                continue
            member = Deflated(
                contents.archive, info.header_offset, info.compress_size, info.file_size, info.CRC,
                stored=info.compress_type == zipfile.ZIP_STORED,
            )  # fmt: skip
            if info.flag_bits & 0x1:
                locked.setdefault("encrypted", []).append(path)
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                method = METHODS.get(info.compress_type, f"method {info.compress_type}")
                locked.setdefault(f"compressed by {method}", []).append(path)
            elif stat.S_ISLNK(mode) and info.create_system == 3:
                with member.open(MAX_NAME_BYTES) as text:
                    target = text.read().decode("utf-8", "surrogateescape")
                links[path] = _target_of(target, posixpath.dirname(path))
            else:
                contents.add(path, member)
    for reason, paths in locked.items():
        shown, every = show_path(contents.archive.path), len(contents.files) + sum(map(len, locked.values()))
        fault = f"{shown}: {len(paths)} of {counted(every, 'file')} are {reason}, the first {show_path(paths[0])}"
        raise DataError(fault, f"unpack it: 7z x {shown} -oFOLDER")
    contents.link(links)


def _name_in_zip(info: zipfile.ZipInfo) -> str:
    """Return the name of a member as its writer meant it: many write UTF-8 and do not say so."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        with suppress(ValueError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/") if info.create_system != 3 and "/" not in name else name


def opened(path: str) -> Contents:
    """Return what the tar or zip at a path holds; a compressed tar is copied. Raises DataError or ResourceError."""
    try:
        with open_file(path) as file:
            if compression(file.read(BLOCK)) is None:
                return contents_of(file, Archive(path, path, state_of(file)))
            file.seek(0)
            return contents_of_stream(unpacked(file, path)[1], path, state_of(file)[0])
    except OSError as error:
        raise cannot_read(path, error) from error


def contents_of_stream(file: BinaryIO, name: str, packed: int = 0) -> Contents:
    """Return what the archive in a stream holds, which is copied; see `members.copied`."""
    archive = copied(file, name, packed)
    with archive.buffered() as copy:
        return contents_of(copy, archive)


def unpacked(file: BinaryIO, name: str) -> tuple[bytes, BinaryIO]:
    """Return the first bytes of a stream, and the stream from its start, uncompressed, to be read once.

    Raises DataError for a damaged stream, or one compressed by zstd.
    """
    head = file.read(BLOCK)
    stream = replayed(head, file)
    if (command := compression(head)) is None:
        return head, stream
    if command not in OPENERS:
        raise DataError(f"{show_path(name)}: compressed by zstd", f"unpack it: {command} FILE | perceiver ... -")
    inner = OPENERS[command](stream)
    with stream_errors(name):
        head = inner.read(BLOCK)
    return head, replayed(head, inner)
