"""Sound files: what they declare, checked, and their samples."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError, LimitError
from perceiver_cli.files import show_text
from perceiver_cli.preprocess import container
from perceiver_cli.preprocess.base import Array, check_contract
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

Samples = NDArray[np.float32]
Channel = int | Literal["mix"]  # one channel, counted from 0, or the mean of all

BLOCK_FRAMES = 65_536
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
UNKNOWN_FRAMES = 1 << 62  # libsndfile gives 2^63 - 1 where a stream declares no length
# Full scale is 1; floats that hold 32-bit integers reach 2^31. Beyond this, power would overflow float32.
MAX_AMPLITUDE = 1e10
# Sizes in a sound that was written to a pipe: unset, or the most there can be (0x7FFFF000: SoX).
STREAMED_SIZES = (0, 0x7FFFF000, 0xFFFFFFFF)
MAX_CHUNKS = 10_000
WAVE_MAGIC = (b"RIFF", b"RIFX", b"RF64")
SETTLING_S = 0.2  # before a place in the middle of a file, for decoders that take from what came before
JITTER_S = 0.05  # by which times in a container may be off the count of samples


@dataclass(frozen=True)
class Sound:
    """An open sound: its rate, how many samples a channel it declares (None: it does not), and the way to read it.

    read(first, stop): yields blocks (n,) float32 of one channel or the mean of all, checked as `_checked` says.
    """

    rate_hz: int
    samples: int | None
    read: Callable[[int, float], Iterator[Samples]]


# ---------------------------------------------------------------- reading


def is_mpeg_frame(head: bytes) -> bool:
    """Return whether `head` begins with a frame header of MPEG audio, layer II or III.

    The sync alone is 11 bits and matches a UTF-16 text (0xFF 0xFE, which would be layer I).
    """
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer in (1, 2) and bitrate not in (0, 15) and rate != 3


class _Reader:
    """A file that never raises: libsndfile calls it from C, where an exception could only be printed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):  # a damaged header asks for a place that cannot be
            return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            return self.file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        except (OSError, ValueError):  # a failing disk: the sound ends here, and is found short
            return 0


@contextmanager
def _sound_file(source: Source, file: BinaryIO) -> Iterator[Any]:
    """Yield the soundfile.SoundFile over `file`. Whatever libsndfile raises inside becomes a DataError."""
    import soundfile

    try:
        with soundfile.SoundFile(_Reader(_checked_size(source, file))) as sound:
            # Else soundfile seeks after every block: slow, and an error where a FLAC declares no length.
            sound.seekable = lambda: False
            yield sound
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "error_string", None) or f"{type(error).__name__} {error}"
        raise DataError(f"{source.shown}: cannot decode the sound: {show_text(str(reason))}") from error


def _checked_size(source: Source, file: BinaryIO) -> BinaryIO:
    """Return `file`, rewound, unless its header says more or less of the size of the sound than the truth.

    Of WAV, AIFF and AU, libsndfile reads what there is where more was declared, without a word. It reads nothing of
    a WAV that was streamed with size 0: for that, a copy that declares the maximum comes back instead.

    Raises:
        DataError: the file declares more bytes of sound than it holds.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = file.read(24)
    file.seek(0)
    magic, at, long_size = header[:4], 12, 0
    if magic == b".snd" and len(header) == 24:
        at, declared = struct.unpack_from(">2I", header, 4)
        _check_sound_bytes(source, declared, size - at)
    order = "<" if magic in (b"RIFF", b"RF64") else ">"
    for _ in range(MAX_CHUNKS if magic in (*WAVE_MAGIC, b"FORM") else 0):
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
        if name == b"ds64" and magic == b"RF64" and len(header) == 24:  # 64-bit sizes of the file and its sound
            long_size = int.from_bytes(header[16:24], "little")
        at += declared + (declared & 1)
    file.seek(0)
    return file


def _check_sound_bytes(source: Source, declared: int, found: int) -> None:
    if declared > found and declared not in STREAMED_SIZES:
        raise DataError(f"{source.shown}: declared {declared} bytes of sound, found {max(0, found)}")


def _is_chunk(data: bytes, room: int, order: str) -> bool:
    """Return whether a RIFF chunk begins here, rather than sound: a printable name, and a size that fits."""
    if len(data) < 8 or not all(0x20 <= byte < 0x7F for byte in data[:4]):
        return False
    return bool(struct.unpack_from(f"{order}I", data, 4)[0] <= room - 8)


@contextmanager
def opened(source: Source, channel: Channel, limits: Limits) -> Iterator[Sound]:
    """Yield the sound of a file, its rate, channels and length within the limits; nothing is decoded yet."""
    if container.format_of(source.head()) is not None:
        with container.opened(source, limits, "audio") as track:
            codec = track.stream.codec_context
            rate_hz = _checked_header(source, codec.sample_rate, codec.layout.nb_channels, channel, limits)
            _check_seconds(source, track.duration_s, limits)
            read = partial(_read_track, source, track, rate_hz, channel, limits)
            yield Sound(rate_hz, round(track.duration_s * rate_hz), read)
        return
    with source.open(limits) as file, _sound_file(source, file) as sound:
        rate_hz = _checked_header(source, sound.samplerate, sound.channels, channel, limits)
        declared = int(sound.frames) if sound.frames < UNKNOWN_FRAMES else None
        _check_seconds(source, (declared or 0) / rate_hz, limits)
        yield Sound(rate_hz, declared, partial(_read_file, source, sound, declared, channel, limits))


def _checked_header(source: Source, rate_hz: int, channels: int, channel: Channel, limits: Limits) -> int:
    """Return the rate of a sound whose rate and channels are such that it can be read."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise DataError(f"{source.shown}: sample rate {rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if channels > limits.audio_channels:
        raise LimitError(source.shown, channels, "channels", "audio_channels", limits.audio_channels)
    if channel != "mix" and channel >= channels:
        raise DataError(f"{source.shown}: no channel {channel}, found {channels} channel(s) counted from 0")
    return rate_hz


def _check_seconds(source: Source, seconds: float, limits: Limits) -> None:
    if seconds > limits.audio_seconds:
        raise LimitError(source.shown, seconds, "seconds", "audio_seconds", limits.audio_seconds)


def _checked(source: Source, samples: Array, channel: Channel) -> Samples:
    """Return one channel of (n, channels), or the mean of all, as (n,): a copy, finite and of a sane amplitude."""
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
    """Yield blocks of the samples from `first` on and before `stop`, at the file's own rate, by libsndfile."""
    at = 0
    if declared is not None and sound.format != "MP3":  # of which libmpg123 writes to stderr what it misses there
        at = min(max(0, first - round(SETTLING_S * sound.samplerate)), declared)
    if at:
        sound.seek(at)
    buffer = np.empty((min(BLOCK_FRAMES, max(1, BLOCK_FRAMES if declared is None else declared)), sound.channels), "f4")
    while at < stop and len(samples := sound.read(out=buffer[: int(min(len(buffer), stop - at))])):
        _check_seconds(source, (at + len(samples)) / sound.samplerate, limits)  # again, where none are declared
        if at + len(samples) > first:
            yield _checked(source, samples[max(0, first - at) :], channel)
        at += len(samples)
    if declared is not None and at < min(stop, declared) and _declares_length(source, sound, limits):
        raise DataError(f"{source.shown}: declared {declared} frames of sound, found {at}")


def _read_track(
    source: Source, track: container.Track, rate_hz: int, channel: Channel, limits: Limits, first: int, stop: float
) -> Iterator[Samples]:
    """Yield blocks of the samples from `first` on and before `stop`, at the stream's own rate, by PyAV.

    Samples lie where their times say, so that they stay with the pictures: what is missing is silence.
    """
    import av

    resampler = av.AudioResampler(format="fltp", rate=rate_hz)  # only the format changes
    at, following = first, None  # the next sample to give, and the next that is expected
    for time_s, frame in track.frames(first / rate_hz - SETTLING_S):
        place = round(time_s * rate_hz)
        if following is not None and abs(place - following) <= JITTER_S * rate_hz:
            place = following
        for part in resampler.resample(frame):
            samples = part.to_ndarray().T
            following = place + len(samples)
            _check_seconds(source, following / rate_hz, limits)
            while at < min(place, stop):
                silence = np.zeros(int(min(place, stop, at + BLOCK_FRAMES)) - at, np.float32)
                yield silence
                at += len(silence)
            samples = samples[max(0, at - place) : int(max(0, min(len(samples), stop - place)))]
            if len(samples):
                yield _checked(source, samples, channel)
                at += len(samples)
            place = following
        if at >= stop:
            return


def resampled(blocks: Iterator[Samples], found_hz: int, rate_hz: int) -> Iterator[Samples]:
    """Yield blocks at another rate, which together are what resampling them at once gives."""
    if found_hz == rate_hz:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(found_hz, rate_hz, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _declares_length(source: Source, sound: Any, limits: Limits) -> bool:
    """Return whether the frame count is the file's own: in an MP3 without a Xing header it is an estimate.

    libsndfile then reads as far as the estimate, which is good for a constant bitrate.
    """
    if sound.format != "MP3":
        return True
    with source.open(limits) as file:
        head = file.read(10)
        tag = 0
        if head[:3] == b"ID3" and len(head) == 10:  # its size is four times 7 bits
            tag = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        file.seek(tag)
        frame = file.read(256)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))
