"""Video containers (MP4, MKV, AVI, MPEG): the claims of a file checked, then its streams decoded by PyAV.

The first bytes choose one of FFmpeg's readers; FFmpeg does not guess. The reader gets a file object, and may open no
other file or address. PyAV is an extra, imported with the first container.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

from perceiver_cli.errors import AbsentError, DataError, UsageError
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

NOUNS = {"video": "picture", "audio": "sound"}
STILL_BRANDS = rb"hei[cxms]|mif1|msf1|avi[fs]|crx "  # of an MP4 that is a still image
# The signature of each container, by the name of FFmpeg's reader. A new container is one entry here.
FORMATS = {
    # A brand of videos or sounds, or QuickTime, which is older than brands.
    "mov": rb"....ftyp(?!" + STILL_BRANDS + rb")|\0...(?:moov|mdat|wide|free|skip)",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"RIFF....AVI",
    "mpeg": rb"\0\0\x01\xba",
    "mpegts": rb"G.{187}G.{187}G",  # the first bytes of three packets of 188 bytes
}
SOUND_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ")
SOUND_SUFFIXES = (".mka", ".m4a", ".weba")
COVERS = 0x400 | 0x800  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC and _TIMED_THUMBNAILS
UNTIMED = ("mpeg",)  # one time for several frames of a packet: after a seek, counted times would be one frame off
# Sizes that RIFF and AU files declare if they were written to a pipe: unset, SoX's largest, or the largest.
STREAMED_SIZES = (0, 0x7FFFF000, 0xFFFFFFFF)
BOX_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
MAX_BOXES = 1_000_000
MAX_BOX_DEPTH = 10  # FFmpeg refuses deeper boxes
MAX_FRAMES_PER_S = 1000  # on average; without a limit, a small file could unfold into endless frames
SPARE_PACKET_BYTES = 1 << 20  # the packets of a file may hold this more than twice its size
SEEK_BACK_S = (0.0, 5.0)  # tried in turn: some frames need data from before the last keyframe


def format_of(head: bytes) -> str | None:
    """Return FFmpeg's name of the container that begins with `head`, or None if `head` begins no container."""
    return next((name for name, signature in FORMATS.items() if re.match(signature, head, re.DOTALL)), None)


def holds_sound_only(head: bytes, name: str) -> bool:
    """Return whether a container declares that it holds only sound, by its brand or else by its suffix."""
    return head[8:12] in SOUND_BRANDS if head[4:8] == b"ftyp" else name.lower().endswith(SOUND_SUFFIXES)


@contextmanager
def open_track(source: Source, limits: Limits, kind: Literal["video", "audio"]) -> Iterator[Track]:
    """Yield the first stream of pictures or of sound in a file, without covers and thumbnails; no frame is decoded yet.

    Raises UsageError without PyAV, AbsentError if the file has no such stream, and DataError for a file that is no
    container, truncated or damaged. Every exception of PyAV, here or in the `with`, becomes a DataError.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("PyAV, which reads videos, is missing", "pip install 'perceiver-cli[video]'") from error
    with source.open(limits) as file, as_data_errors(source, "file"):
        reader = format_of(file.read(HEAD_BYTES))
        if reader is None:
            raise DataError(f"{source.shown}: not a video container")
        size = file.seek(0, io.SEEK_END)
        _check_sizes(source, file, size, reader)
        file.seek(0)
        # Twice the limit: a codec's frame is a little larger than its picture, which is checked later.
        options = {"max_pixels": str(2 * limits.video_pixels)}
        with av.open(file, format=reader, options=options, io_open=refuse_reference) as container:
            streams = getattr(container.streams, kind)
            stream = next((each for each in streams if not each.disposition.value & COVERS), None)
            if stream is None:
                raise AbsentError(f"{source.shown}: no {NOUNS[kind]} in it")
            if stream.codec_context is None:
                raise DataError(f"{source.shown}: no decoder for its {NOUNS[kind]}")
            if kind == "video":
                stream.codec_context.options = options
            stream.codec_context.thread_type = "NONE"  # several files are decoded at once, one on each core
            stream.codec_context.thread_count = 1
            yield Track(source, limits, container, stream, size)


def refuse_reference(url: str, *_: Any) -> None:
    """Raise OSError: PyAV calls this to open a file or address that the data names."""
    raise OSError(f"external reference refused: {url}")


class Track:
    """One stream of an open container. Times are seconds from the start of the file, the same for all its streams."""

    def __init__(self, source: Source, limits: Limits, container: Any, stream: Any, size: int) -> None:
        self.source, self.limits, self.container, self.stream, self.size = source, limits, container, stream, size
        self.tick_s = float(stream.time_base)
        self.zero_s = (container.start_time or 0) / 1e6
        rate = stream.average_rate if stream.type == "video" else None
        self.step_s = 1 / float(rate) if rate else 0.0  # between frames without a time

    @property
    def duration_s(self) -> float:
        """The end of the last frame in seconds, as the stream, else the file, else its packets declare it."""
        if self.stream.duration:
            return float(((self.stream.start_time or 0) + self.stream.duration) * self.tick_s - self.zero_s)
        if self.container.duration:
            return float(self.container.duration / 1e6)
        with open_track(self.source, self.limits, self.stream.type) as again:
            ends = [p.pts + (p.duration or 0) for p in again._packets() if p.pts is not None]
        return max(ends, default=0) * self.tick_s - self.zero_s

    def frames(self, start_s: float = 0.0) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) in the order of display, from the frame shown at `start_s` or an earlier one on.

        May be called once. A later start seeks to the keyframe before it, so that fewer frames are decoded.
        """
        if start_s <= 0 or self.container.format.name in UNTIMED:
            yield from self._decoded()
            return
        import av

        for back_s in SEEK_BACK_S:
            frames = self._decoded()
            try:
                self.container.seek(int((start_s - back_s + self.zero_s) / self.tick_s), stream=self.stream)
                first = next((shown for shown in frames if not shown[1].is_corrupt), None)
            except av.FFmpegError:
                continue
            if first is not None and first[0] <= start_s + self.tick_s:
                yield first
                yield from frames
                return
        with open_track(self.source, self.limits, self.stream.type) as again:  # the index of the file is wrong
            yield from again._decoded()

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) from the current place of the container on. Raises DataError for too many frames."""
        first_s, time_s = 0.0, -self.step_s
        for count, frame in enumerate(frame for packet in self._packets() for frame in packet.decode()):
            time_s = time_s + self.step_s if frame.pts is None else frame.pts * float(frame.time_base) - self.zero_s
            first_s = time_s if count == 0 else first_s
            if count >= MAX_FRAMES_PER_S * (1 + max(0.0, time_s - first_s)):
                raise DataError(f"{self.source.shown}: more than {MAX_FRAMES_PER_S} frames a second")
            yield time_s, frame

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the stream. Raises DataError if together they are far larger than the file."""
        allowed = 2 * self.size + SPARE_PACKET_BYTES
        for packet in self.container.demux(self.stream):
            allowed -= packet.size + 1
            if allowed < 0:
                raise DataError(f"{self.source.shown}: its index names the same data again and again")
            yield packet


def _check_sizes(source: Source, file: BinaryIO, size: int, reader: str) -> None:
    """Raise DataError if a file is shorter than it declares, or counts more samples than it has bytes."""
    # FFmpeg reads truncated files without an error, and allocates memory for every counted sample.
    end = 0  # MPEG streams declare no size
    file.seek(0)
    if reader == "avi":
        declared = struct.unpack("<4xI", file.read(8))[0]
        end = 0 if declared in STREAMED_SIZES else declared + 7  # + 8, but some files omit one byte of padding
    elif reader == "matroska":
        head = file.read(HEAD_BYTES)
        length, at = _ebml_size(head, 4)
        if head[at + length : at + length + 4] == b"\x18\x53\x80\x67":  # the segment, which is the rest of the file
            length, at = _ebml_size(head, at + length + 4)
            end = at + length
    elif reader == "mov":
        end = _end_of_boxes(source, file, size)
    if end > size:
        raise DataError(f"{source.shown}: declared {end} bytes, found {size}: truncated")


def _end_of_boxes(source: Source, file: BinaryIO, size: int) -> int:
    """Return the end of the last box of media or index. Raises DataError for a count of samples above `size`."""
    end = 0
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
    return end


def _boxes(file: BinaryIO, at: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start of content, end) of every box of an MP4 between two offsets, and of the boxes inside."""
    while at + 8 <= end:
        file.seek(at)
        length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        content = at + (16 if length == 1 else 8)
        length = long_length if length == 1 else length or end - at  # 0: up to the end
        yield name, content, at + length
        if name in BOX_PARENTS and depth < MAX_BOX_DEPTH:
            yield from _boxes(file, content, min(at + length, end), depth + 1)
        if length < 8:
            return
        at += length


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """Return the size of a Matroska element, 0 if unknown, and the offset of its content."""
    bits = 8 - data[at].bit_length()  # leading zeros: the number of bytes that follow
    value = int.from_bytes(data[at : at + bits + 1], "big") & (1 << 7 * (bits + 1)) - 1
    return (0 if value == (1 << 7 * (bits + 1)) - 1 else value), at + bits + 1
