"""Sound files: the claims of a file checked, then its samples read in blocks by libsndfile, or by PyAV from a video."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess import container
from perceiver_cli.preprocess.base import Array, check_contract
from perceiver_cli.preprocess.source import Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

Samples = NDArray[np.float32]
Channel = int | Literal["mix"]  # one channel, counted from 0, or the mean of all

BLOCK_FRAMES = 65_536
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2^63 - 1 frames if a stream declares no length
# Full scale is 1; floats that hold 32-bit integers reach 2^31. Above this limit, power would overflow float32.
MAX_AMPLITUDE = 1e10
MAX_CHUNKS = 10_000
SETTLING_S = 0.2  # decoded and dropped before a span, for decoders whose output depends on earlier samples
JITTER_S = 0.05  # the largest ignored difference between a container's times and its count of samples
# MPEG audio, layer II or III: the bits of the sync, and no reserved version, layer, bitrate or rate. The sync alone, 11
# bits, would match UTF-16 text (0xFF 0xFE, which is layer I).
_MPEG_RATES = re.escape(bytes(byte for byte in range(256) if byte >> 4 not in (0, 15) and byte >> 2 & 3 != 3))
# The signature of each format, by its name in messages. A new format of libsndfile is one entry here.
FORMATS = {
    "WAV": rb"(?:RIFF|RIFX|RF64)....WAVE",
    "FLAC": rb"fLaC",
    "OGG": rb"OggS",
    "MP3": rb"ID3|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][" + _MPEG_RATES + rb"].",
    "AIFF": rb"FORM....AIF[FC]",
    "AU": rb"\.snd",
    "CAF": rb"caff",
}


class Sound(NamedTuple):
    """An open sound file.

    samples: the declared number of samples per channel, or None.
    read(first, stop): yields checked blocks (n,) float32 of one channel, or of the mean of all.
    """

    rate_hz: int
    samples: int | None
    read: Callable[[int, float], Iterator[Samples]]


class _Reader:
    """A file object whose methods never raise: libsndfile calls them from C, which can only print an exception."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        with suppress(OSError, ValueError, OverflowError):  # a damaged header names an impossible offset
            self.file.seek(offset, whence)
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        with suppress(OSError, ValueError):  # a failing disk: the sound ends here, shorter than declared
            return self.file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        return 0


def _checked_size(source: Source, file: BinaryIO) -> BinaryIO:
    """Return `file`, rewound; for a WAV that was streamed with size 0, a copy that declares the largest size.

    libsndfile reads no sample of a WAV with size 0, and reads truncated WAV, AIFF and AU files without an error. Raises
    DataError for a truncated file.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = file.read(24)
    magic, at, long_size = header[:4], 12, 0
    if magic == b".snd" and len(header) == 24:
        at, declared = struct.unpack_from(">2I", header, 4)
        _check_sound_bytes(source, declared, size - at)
    order = "<" if magic in (b"RIFF", b"RF64") else ">"
    for _ in range(MAX_CHUNKS if magic in (b"RIFF", b"RIFX", b"RF64", b"FORM") else 0):
        file.seek(at)
        if len(header := file.read(24)) < 8:
            break
        at += 8
        name, declared = struct.unpack_from(f"{order}4sI", header)
        if name in (b"data", b"SSND"):
            declared = long_size if declared == 0xFFFFFFFF and long_size else declared
            _check_sound_bytes(source, declared, size - at)
            if name == b"data" and declared == 0 and at < size and not _is_chunk(header[8:], size - at, order):
                file.seek(0)
                data = bytearray(file.read())
                data[at - 4 : at] = b"\xff" * 4
                return io.BytesIO(data)
            break
        if name == b"ds64" and magic == b"RF64" and len(header) == 24:  # the 64-bit sizes of the file and of its sound
            long_size = int.from_bytes(header[16:24], "little")
        at += declared + (declared & 1)
    file.seek(0)
    return file


def _check_sound_bytes(source: Source, declared: int, available: int) -> None:
    if declared > available and declared not in container.STREAMED_SIZES:
        raise DataError(f"{source.shown}: declared {declared} bytes of sound, found {max(0, available)}")


def _is_chunk(data: bytes, room: int, order: str) -> bool:
    """Return whether `data` begins a RIFF chunk and not sound: a printable name, and a size within `room`."""
    is_name = len(data) >= 8 and all(0x20 <= byte < 0x7F for byte in data[:4])
    return is_name and bool(struct.unpack_from(f"{order}I", data, 4)[0] <= room - 8)


@contextmanager
def open_sound(source: Source, channel: Channel, limits: Limits) -> Iterator[Sound]:
    """Yield the sound of a file, its rate, channels and length checked; no sample is decoded yet."""
    if container.format_of(source.head()) is not None:
        with container.open_track(source, limits, "audio") as track:
            codec = track.stream.codec_context
            rate_hz = _checked_header(source, codec.sample_rate, codec.layout.nb_channels, channel, limits)
            source.check_limit(track.duration_s, "seconds", "audio_seconds", limits)
            read = partial(_read_track, source, track, rate_hz, channel, limits)
            yield Sound(rate_hz, round(track.duration_s * rate_hz), read)
        return
    import soundfile

    with source.open(limits) as file, as_data_errors(source, "sound"):
        reader = _Reader(_checked_size(source, file))
        with soundfile.SoundFile(reader) as sound:
            # soundfile would seek after every block: slow, and an error if a FLAC declares no length.
            sound.seekable = lambda: False
            rate_hz = _checked_header(source, sound.samplerate, sound.channels, channel, limits)
            declared = int(sound.frames) if sound.frames < UNKNOWN_FRAMES else None
            source.check_limit((declared or 0) / rate_hz, "seconds", "audio_seconds", limits)
            yield Sound(rate_hz, declared, partial(_read_file, source, sound, declared, channel, limits))


def _checked_header(source: Source, rate_hz: int, channels: int, channel: Channel, limits: Limits) -> int:
    """Return `rate_hz`. Raises DataError if rate or channels are not allowed."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise DataError(f"{source.shown}: sample rate {rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    source.check_limit(channels, "channels", "audio_channels", limits)
    if channel != "mix" and channel >= channels:
        raise DataError(f"{source.shown}: no channel {channel}, found {channels} channel(s) counted from 0")
    return rate_hz


def _checked(source: Source, samples: Array, channel: Channel) -> Samples:
    """Return a copy (n,) of one channel of (n, channels), or the mean of all. Raises DataError for absurd values."""
    if channel != "mix" or samples.shape[1] == 1:
        block: Samples = samples[:, 0 if channel == "mix" else channel].copy()
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            block = samples.mean(axis=1)
    check_contract(source, block, "samples")
    if np.abs(block).max() > MAX_AMPLITUDE:
        raise DataError(f"{source.shown}: samples above {MAX_AMPLITUDE:g}, expected full scale to be 1")
    return block


def _read_file(
    source: Source, sound: Any, declared: int | None, channel: Channel, limits: Limits, first: int, stop: float
) -> Iterator[Samples]:
    """Yield blocks of the samples first..stop - 1 at the file's own rate, by libsndfile."""
    at = 0
    if declared is not None and sound.format != "MP3":  # libmpg123 prints warnings to stderr if it seeks
        at = min(max(0, first - round(SETTLING_S * sound.samplerate)), declared)
    if at:
        sound.seek(at)
    buffer = np.empty((min(BLOCK_FRAMES, max(1, BLOCK_FRAMES if declared is None else declared)), sound.channels), "f4")
    while at < stop and len(samples := sound.read(out=buffer[: int(min(len(buffer), stop - at))])):
        end = at + len(samples)
        # Again: a stream may declare no length.
        source.check_limit(end / sound.samplerate, "seconds", "audio_seconds", limits)
        if end > first:
            yield _checked(source, samples[max(0, first - at) :], channel)
        at = end
    if declared is not None and at < min(stop, declared) and _declares_length(source, sound, limits):
        raise DataError(f"{source.shown}: declared {declared} frames of sound, found {at}")


def _read_track(
    source: Source, track: container.Track, rate_hz: int, channel: Channel, limits: Limits, first: int, stop: float
) -> Iterator[Samples]:
    """Yield blocks of the samples first..stop - 1 at the stream's own rate, by PyAV.

    The container's times place the samples, which keeps sound and pictures together; silence fills gaps.
    """
    import av

    resampler = av.AudioResampler(format="fltp", rate=rate_hz)  # only the format changes
    at, following = first, None  # the next sample to yield, and the sample after the last frame
    for time_s, frame in track.frames(first / rate_hz - SETTLING_S):
        place = round(time_s * rate_hz)
        if following is not None and abs(place - following) <= JITTER_S * rate_hz:
            place = following
        for converted in resampler.resample(frame):
            samples = converted.to_ndarray().T
            following = place + len(samples)
            source.check_limit(following / rate_hz, "seconds", "audio_seconds", limits)
            while at < min(place, stop):
                yield np.zeros(gap := int(min(place, stop, at + BLOCK_FRAMES)) - at, np.float32)
                at += gap
            samples = samples[max(0, at - place) : int(max(0, min(len(samples), stop - place)))]
            if len(samples):
                yield _checked(source, samples, channel)
                at += len(samples)
            place = following
        if at >= stop:
            return


def _declares_length(source: Source, sound: Any, limits: Limits) -> bool:
    """Return whether the file states its frame count; for an MP3 without a Xing header libsndfile estimates it."""
    if sound.format != "MP3":
        return True
    with source.open(limits) as file:
        head = file.read(10)
        tag = 0
        if head[:3] == b"ID3" and len(head) == 10:  # the size is in four bytes of 7 bits
            tag = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        file.seek(tag)
        frame = file.read(256)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))
