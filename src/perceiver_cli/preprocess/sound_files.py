"""Sound files: the claims of a file checked, then its samples read in blocks by libsndfile, or by PyAV from a video."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess import container, sound_claims
from perceiver_cli.preprocess.base import Array, check_contract
from perceiver_cli.preprocess.live_sound import Live
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

Samples = NDArray[np.float32]
Channel = int | Literal["mix"]  # one channel, counted from 0, or the mean of all

BLOCK_FRAMES = 65_536
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2^63 - 1 frames if a stream declares no length
# Full scale is 1; floats that hold 32-bit integers reach 2^31. Above this limit, power would overflow float32.
MAX_AMPLITUDE = 1e10
SETTLING_S = 0.2  # decoded and dropped before a span, for decoders whose output depends on earlier samples
JITTER_S = 0.05  # the largest ignored difference between a container's times and its count of samples
# The signature of each format, by its name in messages. A new format of libsndfile is one entry here.
FORMATS = {
    "WAV": rb"(?:RIFF|RIFX|RF64)....WAVE",
    "FLAC": rb"fLaC",
    "OGG": rb"OggS",
    "MP3": rb"ID3|" + container.MPEG_SOUND + rb"|\xff[\xe3\xf3\xfb][\0-\x0b].",  # the last: of a free bit rate
    "AIFF": rb"FORM....AIF[FC]",
    "AU": rb"\.snd",
    "CAF": rb"caff",
    "W64": rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0",
    "NIST SPHERE": rb"NIST_1A\r?\n",
}
LOSSY = ("OGG", "MP3")
# FFmpeg's readers, by the first bytes of a file with an encoding that libsndfile does not know.
SECOND = {b"RIFF": "wav", b"FORM": "aiff", b".snd": "au", b"caff": "caf", b"riff": "w64", b"OggS": "ogg"}
MP3_PADDING = 3 * 1152  # samples: the frames of an MP3 hold a little more than its sound
READ_AHEAD = 1 << 17  # bytes that may follow the end of a sound: tags


class Sound(NamedTuple):
    """An open sound file.

    samples: the declared number of samples per channel, or None.
    read(first, stop): yields checked blocks (n,) float32 of one channel, or of the mean of all.
    channels: those of the file.
    """

    rate_hz: int
    samples: int | None
    read: Callable[[int, float], Iterator[Samples]]
    channels: int


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


def is_sound(head: bytes) -> bool:
    """Return whether a file begins as one of FORMATS."""
    return format_of(head) is not None


def format_of(head: bytes) -> str | None:
    """Return the name in FORMATS of a file that begins with `head`, or None."""
    return next((name for name, signature in FORMATS.items() if re.match(signature, head, re.DOTALL)), None)


def is_lossless(head: bytes) -> bool:
    """Return whether a file begins as one of FORMATS that keep every sample as it was measured."""
    return format_of(head) not in (None, *LOSSY)


def read_channels(source: Source, file: BinaryIO, limits: Limits) -> tuple[int, NDArray[np.float64]]:
    """Return the rate and all channels (samples, channels) of a lossless file; full scale is 1.

    Raises DataError for a file that declares more than it holds, LimitError for one that is too large.
    """
    import soundfile

    with soundfile.SoundFile(_Reader(sound_claims.checked(source, file))) as sound:
        declared, blocks, total = int(sound.frames), [np.empty((0, sound.channels))], 0
        while len(block := sound.read(BLOCK_FRAMES, "float64", always_2d=True)):
            total += len(block)
            source.check_decoded(total * sound.channels, 8, limits)
            blocks.append(block)
    if declared < UNKNOWN_FRAMES and total != declared:
        raise DataError(f"{source.shown}: found {total} of {declared} samples: truncated or damaged")
    return sound.samplerate, np.concatenate(blocks)


@contextmanager
def open_sound(source: Source, channel: Channel, limits: Limits) -> Iterator[Sound]:
    """Yield the sound of a file, its rate, channels and length checked; no sample is decoded yet."""
    if isinstance(source.data, Live):
        with as_data_errors(source, "sound"):
            rate_hz, channels, blocks = source.data.heard(source)
            _checked_header(source, rate_hz, channels, channel, limits)
            yield Sound(
                rate_hz, None, lambda first, stop: (_checked(source, block, channel) for block in blocks), channels
            )
        return
    with ExitStack() as stack:
        head = source.head()
        reader, is_joined = container.format_of(head, "" if is_sound(head) else source.name), False
        if reader is None:
            file = stack.enter_context(source.open(limits))
            stack.enter_context(as_data_errors(source, "sound"))
            sound = _by_libsndfile(source, file, limits)
            if isinstance(sound, str):
                reader, is_joined = sound, sound == "ogg"
        if reader is not None:
            track = stack.enter_context(container.open_track(source, limits, "audio", reader, is_joined))
            codec = track.stream.codec_context
            rate_hz = _checked_header(source, codec.sample_rate, codec.layout.nb_channels, channel, limits)
            duration_s = track.duration_s
            source.check_limit(duration_s, "seconds", "audio_seconds", limits)
            read = partial(_read_track, source, track, rate_hz, channel, limits)
            yield Sound(rate_hz, round(duration_s * rate_hz), read, codec.layout.nb_channels)
            return
        sound = stack.enter_context(sound)
        # soundfile would seek after every block: slow, and an error if a FLAC declares no length.
        sound.seekable = lambda: False
        rate_hz = _checked_header(source, sound.samplerate, sound.channels, channel, limits)
        declared = int(sound.frames) if sound.frames < UNKNOWN_FRAMES else None
        source.check_limit((declared or 0) / rate_hz, "seconds", "audio_seconds", limits)
        read = partial(_read_file, source, sound, file, declared, channel, limits)
        yield Sound(rate_hz, declared, read, sound.channels)


def _by_libsndfile(source: Source, file: BinaryIO, limits: Limits) -> Any:
    """Return a file open in soundfile, or the name of FFmpeg's reader if libsndfile would not read all of it.

    Raises DataError for a file that declares more than it holds.
    """
    import soundfile

    head = file.read(4)
    if head[:3] == b"ID3" and (reader := _tagged_reader(file)) is not None:
        return reader
    if head == b"OggS" and sound_claims.is_chained(file):
        return "ogg"
    length = sound_claims.mp3_length(source, file) if _is_mp3(head) else "declared"
    if length == "joined" and container.is_installed():
        return "mp3"
    try:
        sound = soundfile.SoundFile(_Reader(sound_claims.checked(source, file)))
    except soundfile.LibsndfileError:
        if (reader := SECOND.get(head)) is None or not container.is_installed():
            raise
        return reader
    reader = SECOND.get(head) if sound.subtype == "MPEG_LAYER_III" else None  # its length would be a guess
    if length == "guessed" and container.is_installed():
        with container.open_track(source, limits, "audio", "mp3") as track:
            is_known = track.stream.codec_context.sample_rate == sound.samplerate  # FFmpeg reads no free bit rate
            is_wrong = is_known and abs(track.duration_s * sound.samplerate - sound.frames) > MP3_PADDING
        reader = "mp3" if is_wrong else None
    if reader is not None:
        sound.close()
    return reader or sound


def _tagged_reader(file: BinaryIO) -> str | None:
    """Return FFmpeg's reader for what follows ID3 tags, or None if libsndfile reads that."""
    file.seek(container.after_tags(file))
    reader = container.format_of(file.read(HEAD_BYTES))
    return reader if reader in container.SOUND_READERS else None


def _is_mp3(head: bytes) -> bool:
    return re.match(FORMATS["MP3"], head, re.DOTALL) is not None


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
    source: Source, sound: Any, file: BinaryIO, declared: int | None, channel: Channel, limits: Limits,
    first: int, stop: float,
) -> Iterator[Samples]:  # fmt: skip
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
    if at < stop:
        _check_end(source, sound, file, declared, at, stop)


def _check_end(source: Source, sound: Any, file: BinaryIO, declared: int | None, at: int, stop: float) -> None:
    """Raise DataError if a file ended before the length that it declares, or libsndfile before the file."""
    rate_hz, end = sound.samplerate, file.tell()
    left = file.seek(0, io.SEEK_END) - end
    if sound.format == "MP3" and sound_claims.mp3_length(source, file) != "declared":
        if left > READ_AHEAD and not container.is_installed():
            reason = f"read {at / rate_hz:.4g} s, with {left} bytes left: it declares no length"
            raise DataError(f"{source.shown}: {reason}", "pip install 'perceiver-cli[video]', which reads it")
    elif declared is not None and at < min(stop, declared):
        read = f"{at / rate_hz:.4g} of {declared / rate_hz:.4g} s"
        raise DataError(f"{source.shown}: found {read} of sound: truncated or damaged")


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
