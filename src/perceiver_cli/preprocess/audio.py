"""Sound: decoded to mono at one rate, then raw samples in segments or a log-mel spectrogram (paper 4.2).

What a file declares is compared with its size and the limits before anything is decoded, and with what was
decoded after. libsndfile decodes, PyAV where the sound is in a container of video (`container`), soxr resamples; they
are imported when the first file is read.
"""

from __future__ import annotations

import io
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from perceiver_cli.config import AudioSpec, Limits
from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import container
from perceiver_cli.preprocess.base import (
    Array,
    ByteArray,
    Layout,
    Source,
    Span,
    TimedModality,
    check_contract,
    check_decoded,
    cut_windows,
    patchify,
    position_options,
)

__all__ = ["MODALITY", "AudioModality"]

Samples = NDArray[np.float32]

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
RESAMPLING_MARGIN = 4096  # samples of the lower rate, several times what soxr's filter spans
POWER_FLOOR = 1e-10  # of a full-scale sine: -100 dB, below the noise of 16-bit sound
MIN_STD = 1e-4  # of log power; a flatter spectrogram is silence


@dataclass(frozen=True)
class Sound:
    """An open sound: its rate, how many samples a channel it declares (None: it does not), and the way to read it.

    read(first, stop): yields blocks (n,) float32 of one channel or the mean of all, checked as `_checked` says.
    """

    rate_hz: int
    samples: int | None
    read: Callable[[int, float], Iterator[Samples]]


class AudioModality(TimedModality[AudioSpec]):
    """Sound files of every kind that libsndfile reads and that have a signature of their own; the sound of videos."""

    name = "audio"
    formats = "WAV, FLAC, OGG, MP3, AIFF, AU, CAF, and the sound of MP4, M4A, MOV, MKV, WebM, AVI, MPEG"

    decides = ("rate_hz", "channel")

    def sniff(self, head: bytes, name: str) -> bool:
        """Return whether `head` has the signature of a sound file, or of a container that may have sound in it."""
        if head[:4] in WAVE_MAGIC and head[8:12] == b"WAVE":
            return True
        if head[:4] == b"FORM":
            return head[8:12] in (b"AIFF", b"AIFC")
        if head[:4] in (b"fLaC", b"OggS", b".snd", b"caff") or head[:3] == b"ID3" or _is_mpeg_frame(head):
            return True
        return container.format_of(head) is not None

    def clip_s(self, spec: AudioSpec) -> float:
        """Return the length of a clip in seconds."""
        return spec.clip_s

    def steps_hz(self, spec: AudioSpec) -> float:
        """Return the sample rate."""
        return _rate(spec)

    def duration_s(self, source: Source, limits: Limits) -> float:
        """Return the length in seconds that a file declares; one that declares none is decoded to count.

        Raises:
            AbsentError: no sound in the file. DataError: unreadable. LimitError: longer than allowed.
        """
        with _opened(source, AudioSpec(), limits) as sound:
            if sound.samples is not None:
                return sound.samples / sound.rate_hz
            return sum(map(len, sound.read(0, math.inf))) / sound.rate_hz

    def load(self, source: Source, spec: AudioSpec, limits: Limits, span: Span | None = None) -> Samples:
        """Return one channel, or the mean of all, as (samples,) float32 at `spec.rate_hz`; full scale is 1.

        A span is the same samples as in the whole, to rounding; in MKV to a millisecond, the tick of its times.

        Raises:
            UsageError: the rate is still "auto".
            AbsentError: a video without sound.
            DataError: not decodable, shorter than declared, no such channel, no samples, not finite.
            LimitError: more seconds, channels or bytes than allowed, known before they are decoded.
        """
        rate_hz = _rate(spec)
        with _opened(source, spec, limits) as sound:
            # Resampling sees a little more at both ends; it begins where samples of both rates coincide.
            common = math.gcd(sound.rate_hz, rate_hz)
            step = sound.rate_hz // common
            first, stop, begin, end = 0, math.inf, 0, math.inf
            if span is not None:
                first = max(0, round(span[0] * rate_hz))
                stop = first + max(1, round(span[1] * rate_hz))
                margin = 0 if sound.rate_hz == rate_hz else RESAMPLING_MARGIN * max(1.0, sound.rate_hz / rate_hz)
                begin = max(0, math.floor(first * sound.rate_hz / rate_hz - margin)) // step * step
                end = math.ceil(stop * sound.rate_hz / rate_hz + margin)
            growth = max(1.0, rate_hz / sound.rate_hz)
            check_decoded(source, min(end - begin, sound.samples or 0) * growth, 4, limits)
            blocks, total = [], 0
            for block in sound.read(begin, end):
                total += len(block)
                check_decoded(source, total * growth, 4, limits)  # again, for a stream that declares nothing
                blocks.append(block)
        what = "samples" if span is None else f"samples at {span[0]:g} s"
        samples = check_contract(source, np.concatenate(blocks) if blocks else np.empty(0, np.float32), what)
        if sound.rate_hz != rate_hz:
            import soxr

            samples = check_contract(source, soxr.resample(samples, sound.rate_hz, rate_hz, "HQ"), "samples")
        if span is None:
            return samples
        offset = begin // step * (rate_hz // common)
        return check_contract(source, samples[first - offset : int(stop) - offset], what)

    def windows(
        self, source: Source, spec: AudioSpec, limits: Limits, window_s: float, hop_s: float
    ) -> Iterator[tuple[float, Samples]]:
        """Yield (start in seconds, (samples,) float32) of overlapping windows; see `TimedModality.windows`."""
        found = False
        with _opened(source, spec, limits) as sound:
            blocks = _resampled(sound.read(0, math.inf), sound.rate_hz, _rate(spec))
            for window in cut_windows(blocks, _rate(spec), window_s, hop_s):
                found = True
                yield window
        if not found:
            raise DataError(f"{source.shown}: no samples in the file")

    def resolve(self, spec: AudioSpec, sources: Sequence[Source], limits: Limits) -> AudioSpec:
        """Return `spec` with a rate: the commonest of `sources` by their headers, at most `max_auto_rate_hz`.

        Without sources it is `max_auto_rate_hz`.

        Raises:
            DataError: none of the sources can be read.
        """
        if spec.rate_hz != "auto":
            return spec
        if not sources:
            return spec.model_copy(update={"rate_hz": spec.max_auto_rate_hz})
        rates: Counter[int] = Counter()
        failure = DataError("no sound files to take the sample rate from", "set inputs.audio.rate_hz")
        for source in sources:
            try:
                with _opened(source, AudioSpec(), limits) as sound:
                    rates[sound.rate_hz] += 1
            except DataError as error:
                failure = error
        if not rates:
            raise failure
        commonest = max(rates, key=lambda rate: (rates[rate], rate))  # no dependence on the order of files
        return spec.model_copy(update={"rate_hz": min(commonest, spec.max_auto_rate_hz)})

    def loaded(self, spec: AudioSpec) -> tuple[str, tuple[int | None, ...]]:
        """Return float32, (samples,)."""
        return "float32", (None,)

    def layout(self, spec: AudioSpec) -> Layout:
        """Return (n / patch,) inputs of raw sound, or (frames, mels) / patch of a spectrogram; n samples a clip.

        Paper 4.2: 1.28 s at 48 kHz are 61,440 samples, in segments of 128 a byte array of 480 x 128.

        Raises:
            UsageError: a clip shorter than a window or a patch, or a max_resolution of the wrong length.
        """
        shape = (_num_samples(spec),) if spec.features == "raw" else _mel_shape(spec)
        grid = tuple(side // patch for side, patch in zip(shape, spec.patch, strict=True))
        if 0 in grid:
            raise UsageError(f"inputs.audio.patch {list(spec.patch)} is larger than the clip's {list(shape)}")
        resolution = spec.max_resolution or tuple(float(side) for side in grid)
        if len(resolution) != len(grid):
            raise UsageError(
                f"inputs.audio.max_resolution has {len(resolution)} number(s), expected {len(grid)} for {spec.features}"
            )
        return Layout(grid, math.prod(spec.patch), len(grid), spec.bands, resolution, **position_options(spec))

    def prepare(
        self, raw: Array, spec: AudioSpec, rng: np.random.Generator | None, start_s: float | None = None
    ) -> ByteArray:
        """Return one clip of `raw` (samples,): (M, patch) raw samples or (*grid, values of a patch) log-mel.

        It begins at `start_s`; unset, without `rng` it is the middle of the sound. With `rng`: random place, gain, and
        SpecAugment (mel).
        """
        clip = _clip(raw, spec, rng, start_s)
        if rng is not None and spec.gain_db:
            clip = clip * np.float32(10 ** (rng.uniform(-spec.gain_db, spec.gain_db) / 20))
        if spec.features == "raw":
            return ByteArray(patchify(clip[:, None], spec.patch))
        features = _log_mel(clip, spec)
        if rng is not None:
            _mask(features, 0, spec.time_masks, spec.time_mask_share, rng)
            _mask(features, 1, spec.frequency_masks, spec.frequency_mask_share, rng)
        return ByteArray(patchify(features[:, :, None], spec.patch))


MODALITY = AudioModality()


# ---------------------------------------------------------------- reading


def _is_mpeg_frame(head: bytes) -> bool:
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
        raise DataError(f"{source.shown}: cannot decode the sound: {show_path(str(reason))[1:-1]}") from error


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
def _opened(source: Source, spec: AudioSpec, limits: Limits) -> Iterator[Sound]:
    """Yield the sound of a file, its rate, channels and length within the limits; nothing is decoded yet."""
    if container.format_of(source.head()) is not None:
        with container.opened(source, limits, "audio") as track:
            codec = track.stream.codec_context
            rate_hz = _checked_header(source, codec.sample_rate, codec.layout.nb_channels, spec, limits)
            _check_seconds(source, track.duration_s, limits)
            read = partial(_read_track, source, track, rate_hz, spec, limits)
            yield Sound(rate_hz, round(track.duration_s * rate_hz), read)
        return
    with source.open(limits) as file, _sound_file(source, file) as sound:
        rate_hz = _checked_header(source, sound.samplerate, sound.channels, spec, limits)
        declared = int(sound.frames) if sound.frames < UNKNOWN_FRAMES else None
        _check_seconds(source, (declared or 0) / rate_hz, limits)
        yield Sound(rate_hz, declared, partial(_read_file, source, sound, declared, spec, limits))


def _checked_header(source: Source, rate_hz: int, channels: int, spec: AudioSpec, limits: Limits) -> int:
    """Return the rate of a sound whose rate and channels are such that it can be read."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise DataError(f"{source.shown}: sample rate {rate_hz} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if channels > limits.audio_channels:
        raise LimitError(source.shown, channels, "channels", "audio_channels", limits.audio_channels)
    if spec.channel != "mix" and spec.channel >= channels:
        raise DataError(f"{source.shown}: no channel {spec.channel}, found {channels} channel(s) counted from 0")
    return rate_hz


def _check_seconds(source: Source, seconds: float, limits: Limits) -> None:
    if seconds > limits.audio_seconds:
        raise LimitError(source.shown, seconds, "seconds", "audio_seconds", limits.audio_seconds)


def _checked(source: Source, samples: Array, spec: AudioSpec) -> Samples:
    """Return one channel of (n, channels), or the mean of all, as (n,): a copy, finite and of a sane amplitude."""
    if spec.channel != "mix" or samples.shape[1] == 1:
        block: Samples = samples[:, 0 if spec.channel == "mix" else spec.channel].copy()
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            block = samples.mean(axis=1)
    check_contract(source, block, "samples")
    if np.abs(block).max() > MAX_AMPLITUDE:
        raise DataError(f"{source.shown}: samples above {MAX_AMPLITUDE:g}, expected full scale to be 1")
    return block


def _read_file(
    source: Source, sound: Any, declared: int | None, spec: AudioSpec, limits: Limits, first: int, stop: float
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
            yield _checked(source, samples[max(0, first - at) :], spec)
        at += len(samples)
    if declared is not None and at < min(stop, declared) and _declares_length(source, sound, limits):
        raise DataError(f"{source.shown}: declared {declared} frames of sound, found {at}")


def _read_track(
    source: Source, track: container.Track, rate_hz: int, spec: AudioSpec, limits: Limits, first: int, stop: float
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
                yield _checked(source, samples, spec)
                at += len(samples)
            place = following
        if at >= stop:
            return


def _resampled(blocks: Iterator[Samples], found_hz: int, rate_hz: int) -> Iterator[Samples]:
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


# ---------------------------------------------------------------- features


def _rate(spec: AudioSpec) -> int:
    if spec.rate_hz == "auto":
        raise UsageError("inputs.audio.rate_hz is still 'auto', expected a number by now", "set it in hertz")
    return spec.rate_hz


def _num_samples(spec: AudioSpec) -> int:
    return math.floor(spec.clip_s * _rate(spec) + 0.5)


def _window_and_hop(spec: AudioSpec) -> tuple[int, int]:
    rate = _rate(spec)
    return max(1, math.floor(spec.window_s * rate + 0.5)), max(1, math.floor(spec.hop_s * rate + 0.5))


def _mel_shape(spec: AudioSpec) -> tuple[int, int]:
    """Return (frames, mels) of a clip. Frames lie wholly inside it: nothing is padded."""
    samples, (window, hop) = _num_samples(spec), _window_and_hop(spec)
    if samples < window:
        raise UsageError(f"inputs.audio.clip_s is {samples} samples, shorter than one window of {window}")
    if spec.min_hz >= _rate(spec) / 2:
        raise UsageError(f"inputs.audio.min_hz {spec.min_hz:g} is not below half of rate_hz {spec.rate_hz}")
    return 1 + (samples - window) // hop, spec.num_mels


def _clip(raw: Array, spec: AudioSpec, rng: np.random.Generator | None, start_s: float | None) -> Samples:
    """Return (samples,) of `raw` from a given, random or central place on; a shorter sound is repeated or padded."""
    samples = _num_samples(spec)
    spare = raw.size - samples
    given = None if start_s is None else round(start_s * _rate(spec))
    if spare >= 0:
        start = int(rng.integers(spare + 1)) if rng is not None else spare // 2
        start = start if given is None else min(given, spare)
        return raw[start : start + samples]
    if spec.short == "loop":
        phase = int(rng.integers(raw.size)) if rng is not None else 0
        return raw.take(np.arange(samples) + (phase if given is None else given), mode="wrap")
    start = int(rng.integers(1 - spare)) if rng is not None else 0
    clip = np.zeros(samples, np.float32)
    if given is None:
        clip[start : start + raw.size] = raw
    else:
        clip[: max(0, raw.size - given)] = raw[given:]
    return clip


def _log_mel(clip: Samples, spec: AudioSpec) -> Samples:
    """Return the log-mel spectrogram (frames, mels) of `clip`, with zero mean and unit variance over the clip.

    A factor on the samples is a constant added to log power. Level says more of the microphone than of the sound,
    and the mean takes it out, the variance the loudness range; silence gives zeros.
    """
    window, hop = _window_and_hop(spec)
    taper, filters = _filters(_rate(spec), window, spec.num_mels, spec.min_hz)
    frames = sliding_window_view(clip, window)[::hop] * taper
    spectrum = np.fft.rfft(frames, n=_fft_size(window), axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
    # Band by band: one product with the whole filterbank is mostly zeros, and BLAS would start threads for it, which
    # get in each other's way (8 ms for 0.3) where several processes prepare data.
    mel = [power[:, first : first + len(weights)] @ weights for first, weights in filters]
    features: Samples = np.log(np.stack(mel, axis=1) + np.float32(POWER_FLOOR))
    features -= features.mean()
    std = features.std()
    return features / std if std > MIN_STD else np.zeros_like(features)


def _fft_size(window: int) -> int:
    return 1 << max(1, (window - 1).bit_length())


@lru_cache(maxsize=8)
def _filters(rate_hz: int, window: int, num_mels: int, min_hz: float) -> tuple[Samples, list[tuple[int, Samples]]]:
    """Return the periodic Hann window (window,), and the HTK mel filterbank of equal area (Slaney).

    Each filter is its first bin of the power spectrum and its weights from there. The window is scaled so that a
    full-scale sine has power 1. Where mels lie closer than the bins of the Fourier transform, a triangle is widened
    to one bin either way: none is empty.
    """
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window) if window > 1 else np.ones(1)
    taper /= taper.sum() / 2
    bin_hz = rate_hz / _fft_size(window)
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (min_hz, rate_hz / 2))
    edges = 700 * (10 ** (np.linspace(low, high, num_mels + 2) / 2595) - 1)
    hz = np.arange(_fft_size(window) // 2 + 1) * bin_hz
    filters = []
    for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        left, right = min(left, centre - bin_hz), max(right, centre + bin_hz)
        triangle = np.minimum((hz - left) / (centre - left), (right - hz) / (right - centre)).clip(0)
        inside = np.flatnonzero(triangle)
        weights = triangle[inside[0] : inside[-1] + 1] * (2 * bin_hz / (right - left))
        filters.append((int(inside[0]), weights.astype(np.float32)))
    return taper.astype(np.float32), filters


def _mask(features: Samples, axis: int, count: int, share: float, rng: np.random.Generator) -> None:
    """Set `count` random bands along `axis` to 0, the mean; widths uniform up to `share` (SpecAugment, paper 4.2)."""
    length = features.shape[axis]
    for _ in range(count):
        width = int(rng.integers(int(share * length) + 1))
        start = int(rng.integers(length - width + 1))
        features[(slice(None),) * axis + (slice(start, start + width),)] = 0.0
