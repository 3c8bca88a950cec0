"""Live sound, read while it arrives: raw samples, WAV, or what FFmpeg reads without seeking. NumPy only.

Nothing is kept and the length is unknown, so live sound may go on for ever.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import AbsentError, DataError, UsageError
from perceiver_cli.preprocess import container
from perceiver_cli.preprocess.source import Source

Encoding = Literal["s16le", "s24le", "s32le", "f32le", "u8"]
Block = NDArray[np.float32]  # (samples, channels)

SOUND = "audio"  # the modality
READ_BYTES = 1 << 16  # at most at a time; less as soon as something has arrived
MAX_HEADER_BYTES = 1 << 20  # before the samples of a WAV
WIDTHS = {"u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4}  # bytes of a sample
OF_WAV = {(1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le", (3, 32): "f32le"}  # by tag and bits
EXTENSIBLE = 0xFFFE  # the tag of a WAV whose real tag begins its GUID
WAVE = rb"RIFF....WAVE"
OF_FFMPEG = {rb"OggS": "ogg", rb"fLaC": "flac", rb"ID3|\xff[\xe3\xf3\xfb]": "mp3"}  # beside its containers
WITHOUT_SEEKING = ("mpegts", "matroska", "aac", "flv")  # containers that are read from begin to end
# FFmpeg would wait for five seconds of a stream before it decodes any.
IMPATIENT = {"probesize": "32768", "analyzeduration": "0"}


class Raw(NamedTuple):
    """How samples without a header are written. Channels lie side by side."""

    rate_hz: int
    channels: int = 1
    encoding: Encoding = "s16le"

    @property
    def width(self) -> int:
        """Bytes of one sample of all channels."""
        return WIDTHS[self.encoding] * self.channels

    def decoded(self, data: bytes) -> Block:
        """Return whole samples as float32; full scale is 1."""
        values: NDArray[Any]
        if self.encoding == "f32le":
            values = np.frombuffer(data, "<f4")
        elif self.encoding == "u8":
            values = (np.frombuffer(data, "u1") - 128.0) / 128
        elif self.encoding == "s24le":
            wide = np.zeros((len(data) // 3, 4), "u1")
            wide[:, 1:] = np.frombuffer(data, "u1").reshape(-1, 3)
            values = wide.view("<i4")[:, 0] / 2**31
        else:
            kind = np.dtype(f"<i{WIDTHS[self.encoding]}")
            values = np.frombuffer(data, kind) / 2 ** (8 * kind.itemsize - 1)
        return values.reshape(-1, self.channels).astype(np.float32)

    def as_wav(self, data: bytes) -> bytes:
        """Return samples as a WAV file, without a part of one at the end."""
        data = data[: len(data) - len(data) % self.width]
        tag, bits = next(key for key, name in OF_WAV.items() if name == self.encoding)
        layout = (tag, self.channels, self.rate_hz, self.rate_hz * self.width, self.width, bits)
        size = min(len(data), 0xFFFFFFFF - 36)
        head = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *layout)
        return head + b"data" + struct.pack("<I", size) + data


class Live:
    """Live sound, in place of the bytes of a Source. It can be read once, from end to end."""

    def __init__(self, file: BinaryIO, raw: Raw | None = None, reader: str | None = None) -> None:
        self.file, self.raw, self.reader = file, raw, reader
        self.size = 0

    def open(self, count: int | None = None) -> BinaryIO:
        """Raise OSError: a stream has no beginning to return to."""
        raise io.UnsupportedOperation("live sound can be read only once")

    def state(self) -> tuple[int, int]:
        """Return a state of its own."""
        return id(self), 0

    def heard(self, source: Source) -> tuple[int, int, Iterator[Block]]:
        """Return rate, channels, and the samples as they arrive. Raises DataError."""
        if self.reader is not None:
            return self._by_ffmpeg(source, self.reader)
        raw, left = (self.raw, None) if self.raw is not None else wav_header(self.file, source)
        return raw.rate_hz, raw.channels, self._samples(raw, left)

    def _samples(self, raw: Raw, left: int | None) -> Iterator[Block]:
        rest = b""
        while left != 0 and (data := _arrived(self.file, READ_BYTES if left is None else min(READ_BYTES, left))):
            left = None if left is None else left - len(data)
            rest += data
            whole = len(rest) - len(rest) % raw.width
            if whole:
                yield raw.decoded(rest[:whole])
                rest = rest[whole:]

    def _by_ffmpeg(self, source: Source, reader: str) -> tuple[int, int, Iterator[Block]]:
        import av

        stream: Any = _Stream(self.file)
        opened = av.open(stream, format=reader, options=IMPATIENT, io_open=container.refuse_reference, buffer_size=4096)
        track = next(iter(opened.streams.audio), None)
        if track is None:
            raise AbsentError(f"{source.shown}: no sound in it")
        codec = track.codec_context
        codec.thread_type, codec.thread_count = "NONE", 1
        resampler = av.AudioResampler(format="fltp", rate=codec.sample_rate)  # only the format changes

        def blocks() -> Iterator[Block]:
            with opened:
                for frame in opened.decode(track):
                    for converted in resampler.resample(frame):
                        yield converted.to_ndarray().T

        return codec.sample_rate, codec.layout.nb_channels, blocks()


class _Stream:
    """A stream for PyAV, which asks whether it can seek by the methods that there are."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = partial(_arrived, file)


def _arrived(file: Any, count: int) -> bytes:
    """Return what has arrived, `count` bytes at most; wait for the first."""
    return getattr(file, "read1", file.read)(count)  # type: ignore[no-any-return]


def live(file: BinaryIO, head: bytes, name: str) -> Live | None:
    """Return a stream that begins with `head` as live sound, or None if it cannot be read while it arrives.

    Raises UsageError for a format that PyAV reads if it is not installed.
    """
    if re.match(WAVE, head, re.DOTALL):
        return Live(file)
    reader = next((reader for magic, reader in OF_FFMPEG.items() if re.match(magic, head)), None)
    reader = reader or container.format_of(head, name)
    if reader not in (*OF_FFMPEG.values(), *WITHOUT_SEEKING):
        return None
    if not container.is_installed():
        raise UsageError(
            "PyAV, which reads this sound while it arrives, is missing", "pip install 'perceiver-cli[video]'"
        )
    return Live(file, reader=reader)


def wav_header(file: BinaryIO, source: Source) -> tuple[Raw, int | None]:
    """Return how the samples of a WAV stream are written, and their bytes, or None if it does not say.

    Raises DataError for a damaged header, or for an encoding that can be read only from a whole file.
    """
    read, raw = 12, None
    _exactly(file, 12, source)
    while read < MAX_HEADER_BYTES:
        name, size = struct.unpack("<4sI", _exactly(file, 8, source))
        if name == b"data":
            if raw is None:
                break
            return raw, None if size in container.STREAMED_SIZES or size >= 0x7FFF0000 else size
        if size > MAX_HEADER_BYTES - read:
            break
        content = _exactly(file, size + size % 2, source)
        read += 8 + len(content)
        if name == b"fmt " and size >= 16:
            tag, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", content)
            tag = struct.unpack_from("<H", content, 24)[0] if tag == EXTENSIBLE and size >= 26 else tag
            if (encoding := OF_WAV.get((tag, bits))) is None or channels == 0:
                fault = f"{source.shown}: a WAV of encoding {tag} with {bits} bits"
                raise DataError(fault, f"expected in live sound one of {', '.join(get_args(Encoding))}")
            raw = Raw(rate_hz, channels, encoding)  # type: ignore[arg-type]
    raise DataError(f"{source.shown}: a WAV without a usable header")


def _exactly(file: BinaryIO, count: int, source: Source) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise DataError(f"{source.shown}: ends inside its header")
    return data
