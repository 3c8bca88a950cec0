"""Containers of video and sound (MP4, MKV, AVI ...): checks what a file declares, then decodes its streams by PyAV.

The first bytes choose one of FFmpeg's readers; FFmpeg does not guess. The reader gets a file object, and may open no
other file or address. PyAV is an extra, imported with the first container.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, BinaryIO, Literal

from perceiver_cli.errors import AbsentError, DataError, UsageError
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

NOUNS = {"video": "picture", "audio": "sound"}
STILL_BRANDS = rb"he[iv][cxms]|mif1|msf1|avi[fs]|crx "  # of an MP4 that is a still image
# MPEG audio, layer II or III: the bits of the sync, and no reserved version, layer, bitrate or rate. The sync alone, 11
# bits, would match UTF-16 text (0xFF 0xFE, which is layer I).
_MPEG_RATES = re.escape(bytes(byte for byte in range(256) if byte >> 4 not in (0, 15) and byte >> 2 & 3 != 3))
MPEG_SOUND = rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][" + _MPEG_RATES + rb"]."
_PACKETS = rb"(?:G.{187}G.{187}G|G.{191}G.{191}G|G.{203}G.{203}G)"  # three of 188 bytes, of 192 (AVCHD) or of 204
# The signature of each container, by the name of FFmpeg's reader. A new container is one entry here.
FORMATS = {
    # A brand of videos or sounds, or QuickTime, which is older than brands.
    "mov": rb"....ftyp(?!" + STILL_BRANDS + rb")|\0...(?:moov|mdat|wide|free|skip)",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"RIFF....AVI",
    "mpeg": rb"\0\0\x01\xba",
    "mpegvideo": rb"\0\0\x01\xb3",
    "mpegts": rb"(?:....)?" + _PACKETS,
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c",
    "flv": rb"FLV\x01[\0-\x05]\0\0\0\x09",
    "ogg": rb"OggS.{0,600}?(?:\x80theora|OVP80\x01|BBCD\0)",  # with pictures
    "mxf": rb"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01",
    "dv": rb"\x1f\x07\0[\x3f\xbf]",
    "aac": rb"\xff[\xf0\xf1\xf8\xf9][\x00-\x33\x40-\x73\x80-\xb3\xc0-\xf3]",  # ADTS; a rate of the 13 that exist
    "amr": rb"#!AMR(?:-WB)?\n",
    "wv": rb"wvpk.{4}[\x02-\x10]\x04",
}
# Signatures of streams that may begin anywhere, so that the suffix of the name must agree.
BY_SUFFIX = {
    "mpegts": ((".ts", ".mts", ".m2ts", ".m2t"), rb".{0,204}?" + _PACKETS),
    "mp3": ((".mp3", ".mp2", ".mpga"), rb"(?!ID3)(?:\0*\Z|.*?" + MPEG_SOUND + rb")"),
    "aac": ((".aac",), rb"ID3|.{0,2048}?" + FORMATS["aac"]),
}
SOUND_READERS = ("aac", "amr", "wv", "mp3")
SOUND_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ")
SOUND_SUFFIXES = (".mka", ".m4a", ".m4b", ".weba", ".oga", ".spx", ".opus")
SOUND_OF_ASF = b"\x40\x9e\x69\xf8\x4d\x5b\xcf\x11\xa8\xfd\0\x80\x5f\x5c\x44\x2b"  # the type of a stream
VIDEO_OF_ASF = b"\xc0\xef\x19\xbc\x4d\x5b\xcf\x11\xa8\xfd\0\x80\x5f\x5c\x44\x2b"  # the type of a stream
COVERS = 0x400 | 0x800  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC and _TIMED_THUMBNAILS
# Streams without a header: FFmpeg guesses their length by their first frames, so packets are counted.
COUNTED = ("mp3", "aac", "amr", "mpegvideo")
UNTIMED = ("mpeg",)  # one time for several frames of a packet: after a seek, counted times would be one frame off
MAX_TAGS = 100  # of ID3, one after another
MAX_PAGE_BYTES = 65_307  # of Ogg
ASF_FILE = b"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4\0\xc0\x0c\x20\x53\x65"  # the object of a file's properties
# Sizes that RIFF and AU files declare if they were written to a pipe: unset, SoX's largest, or the largest.
STREAMED_SIZES = (0, 0x7FFFF000, 0xFFFFFFFF)
BOX_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
MAX_BOXES = 1_000_000
MAX_BOX_DEPTH = 10  # FFmpeg refuses deeper boxes
MAX_FRAMES_PER_S = 1000  # on average; without a limit, a small file could unfold into endless frames
# A file may end this much before the end that it declares: encoders pad, and headers round.
SPARE_S, SPARE_SHARE = 0.3, 0.02
LEAST_SOUND = 0.25  # share of the bytes of a stream without a header that must be packets; else it is no such stream
SPARE_PACKET_BYTES = 1 << 20  # the packets of a file may hold this more than twice its size
SEEK_BACK_S = (0.0, 5.0)  # tried in turn: some frames need data from before the last keyframe


def is_installed() -> bool:
    """Return whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def format_of(head: bytes, name: str = "") -> str | None:
    """Return FFmpeg's name of the container that begins with `head`, or None. A cut stream needs its suffix."""
    for reader, signature in FORMATS.items():
        if re.match(signature, head, re.DOTALL):
            return reader
    for reader, (suffixes, signature) in BY_SUFFIX.items():
        if name.lower().endswith(suffixes) and re.match(signature, head, re.DOTALL):
            return reader
    return None


def holds_sound_only(head: bytes, name: str) -> bool:
    """Return whether a container declares that it holds only sound, by its content, its brand or else its suffix."""
    reader = format_of(head, name)
    if reader in SOUND_READERS or (reader == "flv" and head[4:5] == b"\x04"):
        return True
    if reader == "asf":
        return name.lower().endswith(".wma") or (SOUND_OF_ASF in head and VIDEO_OF_ASF not in head)
    return head[8:12] in SOUND_BRANDS or name.lower().endswith(SOUND_SUFFIXES)


@contextmanager
def open_track(
    source: Source, limits: Limits, kind: Literal["video", "audio"], reader: str | None = None, counted: bool = False
) -> Iterator[Track]:
    """Yield the first stream of pictures or of sound in a file, without covers and thumbnails; no frame is decoded yet.

    reader: FFmpeg's, for a file that is no container. counted: the length is found by counting packets, as in streams
    of COUNTED, and times may begin anew, as in joined files. Raises UsageError without PyAV, AbsentError if the file
    has no such stream, and DataError for a file that is no container, truncated or damaged. Every exception of PyAV,
    here or in the `with`, becomes a DataError.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("PyAV, which reads videos, is missing", "pip install 'perceiver-cli[video]'") from error
    with source.open(limits) as file, as_data_errors(source, "file"):
        reader = reader or format_of(file.read(HEAD_BYTES), source.name)
        if reader is None:
            raise DataError(f"{source.shown}: not a video container")
        size = file.seek(0, io.SEEK_END)
        _check_sizes(source, file, size, reader)
        counted = counted or reader in COUNTED
        begin = after_tags(file) if counted else 0
        file.seek(0)
        # Twice the limit: a codec's frame is a little larger than its picture, which is checked later.
        options = {"max_pixels": str(2 * limits.video_pixels)}
        with av.open(_Seekable(file), format=reader, options=options, io_open=refuse_reference) as container:
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
            yield Track(source, limits, container, stream, reader, counted, size - begin)


def refuse_reference(url: str, *_: Any) -> None:
    """Raise OSError: PyAV calls this to open a file or address that the data names."""
    raise OSError(f"external reference refused: {url}")


class _Seekable:
    """A file for PyAV. `seek` returns -1 for an impossible position: PyAV would print a traceback of an exception."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError):
            return -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Track:
    """One stream of an open container. Times are seconds from the start of the file, the same for all its streams."""

    def __init__(
        self, source: Source, limits: Limits, container: Any, stream: Any, reader: str, counted: bool, size: int
    ) -> None:
        self.source, self.limits, self.container, self.stream = source, limits, container, stream
        self.reader, self.counted, self.size = reader, counted, size
        self.last_packet_s = 0.0  # when the latest packet of the stream begins
        self.tick_s = float(stream.time_base)
        self.zero_s = (container.start_time or 0) / 1e6
        rate = stream.average_rate if stream.type == "video" else None
        self.step_s = 1 / float(rate) if rate else 0.0  # between frames without a time

    @property
    def duration_s(self) -> float:
        """The end of the last frame in seconds, as the stream, else the file, else its packets declare it."""
        if self.stream.duration and not self.counted:
            return float(((self.stream.start_time or 0) + self.stream.duration) * self.tick_s - self.zero_s)
        if self.container.duration and not self.counted:
            return float(self.container.duration / 1e6)
        with self._again() as again:
            packets = [packet for packet in again._packets() if packet.pts is not None]
        if self.counted:
            total = step = packets[0].duration or 0 if packets else 0
            for before, packet in pairwise(packets):
                step = packet.pts - before.pts if packet.pts > before.pts else step  # joined files begin anew
                total += step
            return float(total * self.tick_s)
        return max((p.pts + (p.duration or 0) for p in packets), default=0) * self.tick_s - self.zero_s

    def _again(self) -> AbstractContextManager[Track]:
        return open_track(self.source, self.limits, self.stream.type, self.reader, self.counted)

    def frames(self, start_s: float = 0.0) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) in the order of display, from the frame shown at `start_s` or an earlier one on.

        May be called once. A later start seeks to the keyframe before it, so that fewer frames are decoded. Raises
        DataError after the last frame if the file declares more than it holds, or holds more than could be decoded.
        """
        if start_s <= 0 or self.counted or self.reader in UNTIMED:
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
        with self._again() as again:  # the index of the file is wrong
            yield from again._decoded()

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        """Yield (time, frame) from the current place of the container on. Raises DataError as `frames`."""
        first_s, time_s, last_s, joined_s = 0.0, -self.step_s, 0.0, 0.0
        for count, frame in enumerate(frame for packet in self._packets() for frame in self._frames_of(packet)):
            is_timed = frame.pts is not None and self.reader != "mpegvideo"  # whose times are FFmpeg's guesses
            own_s = frame.pts * float(frame.time_base) - self.zero_s if is_timed else time_s - joined_s + self.step_s
            if self.counted and own_s + joined_s < time_s:  # the next of joined files
                joined_s = time_s + self.step_s - own_s
            time_s = own_s + joined_s
            first_s = time_s if count == 0 else first_s
            last_s = max(last_s, time_s)
            if count >= MAX_FRAMES_PER_S * (1 + max(0.0, time_s - first_s)):
                raise DataError(f"{self.source.shown}: more than {MAX_FRAMES_PER_S} frames a second")
            if self.stream.type == "audio":
                self.step_s = frame.samples / frame.sample_rate
            yield time_s, frame
        self._check_end(last_s, self.last_packet_s, "decoded")

    def _frames_of(self, packet: Any) -> list[Any]:
        """Return the frames of a packet; none if it is a tag between the frames of a stream without a header."""
        import av

        try:
            return packet.decode()  # type: ignore[no-any-return]
        except av.InvalidDataError:
            if self.counted and self.stream.type == "audio":
                return []
            raise

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the stream to the end of the file.

        Raises DataError if together they are far larger than the file, or end well before the end that it declares.
        """
        # The packets of all streams are looked at: the length that a file declares is that of its longest stream.
        num_bytes, end_s, step_s = 0, 0.0, 0.0
        for packet in self.container.demux():
            if packet.pts is not None:
                begin_s = packet.pts * float(packet.time_base) - self.zero_s
                step_s, end_s = (
                    max(step_s, begin_s - end_s),
                    max(end_s, begin_s + float((packet.duration or 0) * packet.time_base)),
                )
            if packet.stream.index != self.stream.index:
                continue
            if packet.pts is not None:
                self.last_packet_s = max(self.last_packet_s, begin_s)
            num_bytes += packet.size + 1
            if num_bytes > 2 * self.size + SPARE_PACKET_BYTES:
                raise DataError(f"{self.source.shown}: its index names the same data again and again")
            yield packet
        if not self.counted:
            self._check_end(end_s + step_s, (self.container.duration or 0) / 1e6, "found")
        elif num_bytes < LEAST_SOUND * self.size:
            noun = NOUNS[self.stream.type]
            raise DataError(f"{self.source.shown}: only {num_bytes} of {self.size} bytes are {noun}: damaged")

    def _check_end(self, end_s: float, declared_s: float, verb: str) -> None:
        """Raise DataError if what was read ends well before the declared end."""
        if end_s < declared_s * (1 - SPARE_SHARE) - SPARE_S:
            read = f"{verb} {end_s:.4g} of {declared_s:.4g} s"
            raise DataError(f"{self.source.shown}: {read}: truncated or damaged")


def _check_sizes(source: Source, file: BinaryIO, size: int, reader: str) -> None:
    """Raise DataError if a file is shorter than it declares, or counts more samples than it has bytes."""
    # FFmpeg reads truncated files without an error, and allocates memory for every counted sample.
    end = 0  # MPEG streams declare no size
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if reader == "avi":
        declared = int.from_bytes(head[4:8], "little")
        end = 0 if declared in STREAMED_SIZES else declared + 7  # + 8, but some files omit one byte of padding
    elif reader == "matroska":
        length, at = _ebml_size(head, 4)
        if head[at + length : at + length + 4] == b"\x18\x53\x80\x67":  # the segment, which is the rest of the file
            length, at = _ebml_size(head, at + length + 4)
            end = at + length
    elif reader == "mov":
        end = _end_of_boxes(source, file, size)
    elif reader == "ogg":
        end = end_of_ogg(file, size)
    elif reader == "flv":
        _check_last_tag(source, file, size)
    elif reader == "asf" and (at := head.find(ASF_FILE)) >= 0:
        is_live = head[at + 88 : at + 89] in (b"\1", b"\3")  # a broadcast declares no size
        end = 0 if is_live else int.from_bytes(head[at + 40 : at + 48], "little")
    if end > size:
        raise DataError(f"{source.shown}: declared {end} bytes, found {size}: truncated")


def after_tags(file: BinaryIO) -> int:
    """Return the offset of what follows the ID3 tags and zeros at the start of a file."""
    at = 0
    for _ in range(MAX_TAGS):
        file.seek(at)
        head = file.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        # The size is in four bytes of 7 bits.
        at += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(at)
    while block := file.read(1 << 16):
        rest = block.lstrip(b"\0")
        at += len(block) - len(rest)
        if rest:
            break
    return at


def end_of_ogg(file: BinaryIO, size: int) -> int:
    """Return the end of the last page of an Ogg file as the page declares it, 0 without a page."""
    if (page := last_page(file, size)) is None:
        return 0
    at, head = page
    return at + 27 + head[26] + sum(head[27 : 27 + head[26]])


def last_page(file: BinaryIO, size: int) -> tuple[int, bytes] | None:
    """Return the offset and the header of the last page of an Ogg file."""
    begin = max(0, size - MAX_PAGE_BYTES)
    file.seek(begin)
    data = file.read(MAX_PAGE_BYTES)
    at = data.rfind(b"OggS\0", 0, max(0, len(data) - 22))
    return (begin + at, data[at : at + 27 + 255]) if at >= 0 else None


def _check_last_tag(source: Source, file: BinaryIO, size: int) -> None:
    """Raise DataError if the last tag of an FLV is cut: behind each tag stands its length."""
    file.seek(max(0, size - 4))
    length = int.from_bytes(file.read(4), "big")
    file.seek(max(0, size - 4 - length))
    tag = file.read(4)
    if length and (length != 11 + int.from_bytes(tag[1:], "big") or tag[0] & 0x1F not in (8, 9, 18)):
        raise DataError(f"{source.shown}: its last tag is cut: truncated")


def _end_of_boxes(source: Source, file: BinaryIO, size: int) -> int:
    """Return the end of the last box of media or index. Raises DataError for a count of samples above `size`."""
    end, names = 0, set()
    for count, (name, at, box_end) in enumerate(_boxes(file, 0, size)):
        if count == MAX_BOXES:
            raise DataError(f"{source.shown}: more than {MAX_BOXES} boxes")
        names.add(name)
        if name in (b"mdat", b"moov", b"moof"):
            end = max(end, box_end)
        elif name in (b"stsz", b"trun"):
            file.seek(at + 4)
            fields = struct.unpack(">2I", file.read(8).ljust(8, b"\0"))
            samples = fields[1] * max(1, fields[0]) if name == b"stsz" else fields[0]
            if samples > size:
                raise DataError(f"{source.shown}: declared {samples} bytes of samples, found {size}")
    if end <= size and not names & {b"moov", b"moof"}:
        raise DataError(f"{source.shown}: no index (moov): its recording or copy was not finished")
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
