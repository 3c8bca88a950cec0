"""Containers of pictures and sound (MP4, MKV, AVI, MPEG), taken apart and decoded by PyAV.

The first bytes say which of FFmpeg's readers is asked, and no other is; it reads a file object, and whatever else the
data asks to open is refused. What a file declares is compared with its size before anything is decoded. PyAV comes
with an extra, and is imported when the first container is read.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

from perceiver_cli.errors import AbsentError, DataError, PerceiverError, UsageError
from perceiver_cli.files import show_text
from perceiver_cli.preprocess.source import HEAD_BYTES, Source
from perceiver_cli.preprocess.spec import Limits

NOUNS = {"video": "picture", "audio": "sound"}
STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis", b"crx ")  # of pictures
SOUND_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ")
SOUND_SUFFIXES = (".mka", ".m4a", ".weba")
COVERS = 0x400 | 0x800  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC and _TIMED_THUMBNAILS
TS_PACKET_BYTES = 188
UNTIMED = ("mpeg",)  # a packet holds several frames and one time: counted from elsewhere, times come out a frame off
STREAMED_SIZES = (0, 0x7FFFF000, 0xFFFFFFFF)  # in an AVI that was written to a pipe
BOX_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
MAX_BOXES = 1_000_000
MAX_FRAMES_PER_S = 1000  # on average; a small file could else unfold into frames without end
SPARE_PACKET_BYTES = 1 << 20  # that the packets of a file may hold above twice its size
SEEK_BACK_S = (0.0, 5.0)  # further back where a keyframe is not the beginning of all that is shown after it


def format_of(head: bytes) -> str | None:
    """Return FFmpeg's name of the container that begins with `head`, or None."""
    if head[4:8] == b"ftyp":
        return None if head[8:12] in STILL_BRANDS else "mov"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip") and head[:1] == b"\0":  # QuickTime before it had ftyp
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head[:4] == b"\0\0\x01\xba":
        return "mpeg"
    return "mpegts" if head[: 3 * TS_PACKET_BYTES : TS_PACKET_BYTES] == b"GGG" else None


def holds_sound_only(head: bytes, name: str) -> bool:
    """Return whether a container says that there is sound alone in it: by its brand, or where it has none by name."""
    if head[4:8] == b"ftyp":
        return head[8:12] in SOUND_BRANDS
    return name.lower().endswith(SOUND_SUFFIXES)


@contextmanager
def opened(source: Source, limits: Limits, kind: Literal["video", "audio"]) -> Iterator[Track]:
    """Yield the first stream of pictures or of sound in a file; nothing is decoded yet.

    Whatever PyAV raises, here or in the body, comes out as a DataError of one line.

    Raises:
        UsageError: PyAV is not installed. AbsentError: the file has no such stream.
        DataError: not a container, truncated, or damaged.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("videos are read by PyAV, which is not there", "pip install 'perceiver-cli[video]'") from error
    with source.open(limits) as file, as_data_errors(source):
        found = format_of(file.read(HEAD_BYTES))
        if found is None:
            raise DataError(f"{source.shown}: not a video container")
        size = file.seek(0, io.SEEK_END)
        _check_sizes(source, file, size, found)
        file.seek(0)
        # Twice the limit: a codec's own frame is a little larger than the picture in it, which is checked later on.
        options = {"max_pixels": str(2 * limits.video_pixels)}
        with av.open(file, format=found, options=options, io_open=_refuse) as container:
            stream = _first(source, container, kind)
            if kind == "video":
                stream.codec_context.options = options
            stream.codec_context.thread_type = "NONE"  # as many files are decoded at once as there are cores
            stream.codec_context.thread_count = 1
            yield Track(source, limits, container, stream, size)


@contextmanager
def as_data_errors(source: Source) -> Iterator[None]:
    """Turn whatever PyAV raises in the body, two dozen types, into a DataError of one line."""
    try:
        yield
    except PerceiverError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
        raise DataError(f"{source.shown}: cannot decode the file: {show_text(str(reason))}") from error


def _refuse(url: str, *_: Any) -> None:
    raise OSError(f"external reference refused: {url}")


def _first(source: Source, container: Any, kind: str) -> Any:
    """Return the first stream of a kind that is neither a cover nor a thumbnail."""
    for stream in getattr(container.streams, kind):
        if not stream.disposition & COVERS:
            if stream.codec_context is None:
                raise DataError(f"{source.shown}: no decoder here for its {NOUNS[kind]}")
            return stream
    raise AbsentError(f"{source.shown}: no {NOUNS[kind]} in it")


class Track:
    """One stream of an open container. Times are seconds from the beginning of the file, the same for all streams."""

    def __init__(self, source: Source, limits: Limits, container: Any, stream: Any, size: int) -> None:
        self.source, self.limits, self.container, self.stream, self.size = source, limits, container, stream, size
        self.tick_s = float(stream.time_base)
        self.zero_s = (container.start_time or 0) / 1e6
        rate = stream.average_rate if stream.type == "video" else None
        self.step_s = 1 / float(rate) if rate else 0.0  # between frames that do not say when they are shown

    @property
    def duration_s(self) -> float:
        """The end of the last frame, as the file declares it or, where it does not, as its packets do."""
        if self.stream.duration:
            return float(((self.stream.start_time or 0) + self.stream.duration) * self.tick_s - self.zero_s)
        if self.container.duration:
            return float(self.container.duration / 1e6)
        with opened(self.source, self.limits, self.stream.type) as again:
            ends = [p.pts + (p.duration or 0) for p in again._packets() if p.pts is not None]
        return max(ends, default=0) * self.tick_s - self.zero_s

    def frames(self, start_s: float = 0.0) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) as they are shown, from the one at `start_s` or an earlier one on.

        To be asked for once. A later start seeks to the keyframe before, so that no more than is needed is decoded.
        """
        if start_s <= 0 or self.container.format.name in UNTIMED:
            yield from self._decoded()
            return
        import av

        for back_s in SEEK_BACK_S:
            found = self._decoded()
            try:
                self.container.seek(int((start_s - back_s + self.zero_s) / self.tick_s), stream=self.stream)
                first = next((shown for shown in found if not shown[1].is_corrupt), None)
            except av.FFmpegError:
                continue
            if first is not None and first[0] <= start_s + self.tick_s:
                yield first
                yield from found
                return
        with opened(self.source, self.limits, self.stream.type) as again:  # an index that leads nowhere
            yield from again._decoded()

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) from where the container stands."""
        count, first_s, time_s = 0, 0.0, -self.step_s
        for packet in self._packets():
            for frame in packet.decode():
                time_s = time_s + self.step_s if frame.pts is None else frame.pts * float(frame.time_base) - self.zero_s
                first_s = time_s if count == 0 else first_s
                count += 1
                if count > MAX_FRAMES_PER_S * (1 + max(0.0, time_s - first_s)):
                    raise DataError(f"{self.source.shown}: more than {MAX_FRAMES_PER_S} frames a second")
                yield time_s, frame

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the stream, no more of them than there can be in the file."""
        allowed = 2 * self.size + SPARE_PACKET_BYTES
        for packet in self.container.demux(self.stream):
            allowed -= packet.size + 1
            if allowed < 0:
                raise DataError(f"{self.source.shown}: the same data is referred to again and again")
            yield packet


# ---------------------------------------------------------------- what a file says of its own size


def _check_sizes(source: Source, file: BinaryIO, size: int, found: str) -> None:
    """Refuse a file that ends before what it declares does, or that counts more samples than it has bytes.

    FFmpeg reads what there is of a truncated file without a word, and makes room for every sample that is counted.
    MPEG streams declare nothing.
    """
    end = 0
    file.seek(0)
    if found == "avi":
        declared = struct.unpack("<4xI", file.read(8))[0]
        end = 0 if declared in STREAMED_SIZES else declared + 7  # some leave out the last byte, which is padding
    elif found == "matroska":
        head = file.read(HEAD_BYTES)
        length, at = _ebml_size(head, 4)
        if head[at + length : at + length + 4] == b"\x18\x53\x80\x67":  # the segment, which is the rest of the file
            length, at = _ebml_size(head, at + length + 4)
            end = at + length
    elif found == "mov":
        for count, (name, at, box_end) in enumerate(_boxes(file, 0, size)):
            if count == MAX_BOXES:
                raise DataError(f"{source.shown}: more than {MAX_BOXES} boxes")
            if name in (b"mdat", b"moov", b"moof"):
                end = max(end, box_end)
            elif name in (b"stsz", b"trun"):
                file.seek(at + 4)
                fields = struct.unpack(">2I", file.read(8).ljust(8, b"\0"))
                samples = fields[1] * max(1, fields[0]) if name == b"stsz" else fields[0]
                if samples > size:
                    raise DataError(f"{source.shown}: declared {samples} bytes of samples, found {size}")
    if end > size:
        raise DataError(f"{source.shown}: declared {end} bytes, found {size}: truncated")


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, where its content begins, where it ends) of every box of an MP4 that is looked at, and inside it."""
    while at + 8 <= end:
        file.seek(at)
        length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        content = at + (16 if length == 1 else 8)
        length = long_length if length == 1 else length or end - at  # 0: as far as there is
        yield name, content, at + length
        if name in BOX_PARENTS:
            yield from _boxes(file, content, min(at + length, end))
        if length < 8:
            return
        at += length


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """Return the size of a Matroska element and where its content begins; 0 where the size is not known."""
    bits = 8 - data[at].bit_length()  # leading zeros: bytes that follow
    value = int.from_bytes(data[at : at + bits + 1], "big") & (1 << 7 * (bits + 1)) - 1
    return (0 if value == (1 << 7 * (bits + 1)) - 1 else value), at + bits + 1
