"""The claims of a sound file, checked before libsndfile reads it: sizes of chunks, pages and headers against the file.

libsndfile reads truncated files without an error and a WAV of size 0 as empty. It guesses the length of an MP3 that
declares none, and stops after the first stream of a chained Ogg file.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, Literal

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.container import MPEG_SOUND, STREAMED_SIZES, after_tags, end_of_ogg, last_page
from perceiver_cli.preprocess.source import Source

CHUNKED = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff", b"caff")
MAX_CHUNKS = 10_000
UNKNOWN_SIZE = (1 << 64) - 1  # of a CAF that was written to a pipe
XING = re.compile(rb"(?:Xing|Info)\0..(?P<flags>.)(?P<frames>.{4})(?P<bytes>.{4})", re.DOTALL)
VBRI = re.compile(rb"VBRI.{6}(?P<bytes>.{4})(?P<frames>.{4})", re.DOTALL)


def checked(source: Source, file: BinaryIO) -> BinaryIO:
    """Return `file`, rewound; for a WAV that was streamed with size 0, a copy that declares the largest size.

    Raises DataError for a file that declares more sound than it has.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = file.read(24)
    magic = header[:4]
    if magic == b".snd" and len(header) == 24:
        at, declared = struct.unpack_from(">2I", header, 4)
        _check_sound_bytes(source, declared, size - at)
    elif magic == b"NIST":
        _check_nist(source, file, size)
    elif magic == b"OggS":
        if (end := end_of_ogg(file, size)) > size:
            raise DataError(f"{source.shown}: declared {end} bytes, found {size}: truncated")
    elif magic in CHUNKED and (at := _checked_chunks(source, file, size, magic)):
        file.seek(0)
        data = bytearray(file.read())
        data[at - 4 : at] = b"\xff" * 4
        return io.BytesIO(data)
    file.seek(0)
    return file


def _checked_chunks(source: Source, file: BinaryIO, size: int, magic: bytes) -> int:
    """Return the offset of the sound in a WAV of size 0 that has some, else 0. Raises as `checked`."""
    order = "<" if magic in (b"RIFF", b"RF64") else ">"
    long_size = 0
    for name, at, declared in _chunks(file, magic, order):
        if name in (b"data", b"SSND"):
            declared = long_size if declared == 0xFFFFFFFF and long_size else declared
            if not (magic == b"caff" and declared == UNKNOWN_SIZE):
                _check_sound_bytes(source, declared, size - at)
            file.seek(at)
            is_streamed = name == b"data" and declared == 0 and at < size and magic in (b"RIFF", b"RIFX", b"RF64")
            return at if is_streamed and not _is_chunk(file.read(16), size - at, order) else 0
        if name == b"ds64" and magic == b"RF64":  # the 64-bit sizes of the file and of its sound
            file.seek(at + 8)
            long_size = int.from_bytes(file.read(8), "little")
    return 0


def _chunks(file: BinaryIO, magic: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset, size) of the chunks of a WAV, AIFF, CAF or W64 file."""
    # First chunk; bytes of a chunk's name, of its header; whether its size counts the header; alignment.
    layouts = {b"caff": (8, 4, 12, False, 1), b"riff": (40, 16, 24, True, 8)}
    at, name_bytes, header_bytes, counts_header, align = layouts.get(magic, (12, 4, 8, False, 2))
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        header = file.read(header_bytes)
        if len(header) < header_bytes:
            return
        declared = int.from_bytes(header[name_bytes:], "little" if order == "<" or magic == b"riff" else "big")
        declared = max(0, declared - header_bytes) if counts_header else declared
        yield header[:4], at + header_bytes, declared
        at += header_bytes + -(-declared // align) * align
        if at >= 1 << 63:
            return


def _check_sound_bytes(source: Source, declared: int, available: int) -> None:
    if declared > available and declared not in STREAMED_SIZES:
        raise DataError(f"{source.shown}: declared {declared} bytes of sound, found {max(0, available)}")


def _is_chunk(data: bytes, room: int, order: str) -> bool:
    """Return whether `data` begins a RIFF chunk and not sound: a printable name, and a size within `room`."""
    is_name = len(data) >= 8 and all(0x20 <= byte < 0x7F for byte in data[:4])
    return is_name and bool(struct.unpack_from(f"{order}I", data, 4)[0] <= room - 8)


def _check_nist(source: Source, file: BinaryIO, size: int) -> None:
    """Raise DataError for a SPHERE file that is compressed or declares more sound than it has."""
    file.seek(0)
    head = file.read(16_384)
    fields = dict(re.findall(rb"^(\w+) -[irs]\d* ([^\n]*)$", head.partition(b"\nend_head")[0], re.MULTILINE))
    coding = fields.get(b"sample_coding", b"pcm").decode("latin-1").strip()
    if "," in coding:
        raise DataError(
            f"{source.shown}: NIST SPHERE compressed as {coding!a}", "convert it: sph2pipe -f wav IN OUT.wav"
        )
    numbers = [fields.get(name, b"") for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    begin = head[8:16].strip()
    if begin.isdigit() and all(re.fullmatch(rb"\s*\d{1,15}\s*", number) for number in numbers):
        count, channels, width = map(int, numbers)
        _check_sound_bytes(source, count * channels * width, size - int(begin))


def is_chained(file: BinaryIO) -> bool:
    """Return whether an Ogg file ends with another stream than it begins with: recordings of radio, joined files."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    first, page = file.read(27), last_page(file, size)
    return page is not None and page[1][14:18] != first[14:18]


def mp3_length(source: Source, file: BinaryIO) -> Literal["declared", "guessed", "joined"]:
    """Return how libsndfile finds the length of an MP3: "declared" in its first frame, or "guessed".

    "joined": another MP3 follows, which it would not read.


    Raises DataError for an MP3 that declares more bytes than it has.
    """
    begin, size = after_tags(file), file.seek(0, io.SEEK_END)
    file.seek(begin)
    frame = file.read(256)
    claim = XING.search(frame) or VBRI.search(frame)
    if claim is None:
        return "guessed"
    flags = claim["flags"][0] if claim.re is XING else 3
    num_frames, num_bytes = (int.from_bytes(claim[name], "big") for name in ("frames", "bytes"))
    if not flags & 1 or num_frames == 0:
        return "guessed"
    if flags & 2 == 0 or num_bytes == 0:
        return "declared"
    _check_sound_bytes(source, num_bytes, size - begin)
    file.seek(begin + num_bytes)
    return "joined" if re.match(rb"ID3|" + MPEG_SOUND, file.read(4), re.DOTALL) else "declared"
