"""Sound: decoded to mono at one rate, then raw samples in segments or a log-mel spectrogram (paper 4.2).

The claims of a file are compared with its size and the limits before decoding, and with the decoded samples afterwards.
libsndfile decodes sound files (`sound_files`), PyAV the sound of videos (`container`), and soxr resamples. They are
imported with the first file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, model_validator

from perceiver_cli.errors import PerceiverError, UsageError, counted
from perceiver_cli.preprocess import container, register
from perceiver_cli.preprocess.base import (
    Array,
    ByteArray,
    Layout,
    Rng,
    Span,
    TimedModality,
    TrainingSet,
    check_contract,
    lengths_in_words,
    patchify,
    share_in_words,
    stem_in_words,
    strength_of,
    varied_in_words,
)
from perceiver_cli.preprocess.mel import fft_size, mel_filters
from perceiver_cli.preprocess.sound_files import FORMATS, Samples, is_sound, open_sound
from perceiver_cli.preprocess.source import Source, probed
from perceiver_cli.preprocess.spec import Auto, Fraction, InputSpec, Limits, Positive, Size


class AudioSpec(InputSpec):
    """Sound as raw samples in segments, or as a log-mel spectrogram (paper 4.2)."""

    newer = ("start", "max_auto_clip_s", "floor_db", "stem", "stem_channels", "speed", "equalizer_db", "noise")
    modality: Literal["audio"] = "audio"
    features: Literal["raw", "mel"] = "raw"  # raw samples, or a log-mel spectrogram
    # "auto": the lowest rate that keeps all of nine in ten training files, at most max_auto_rate_hz.
    rate_hz: Annotated[int, Field(ge=1000, le=768_000)] | Literal["auto"] = 48_000
    max_auto_rate_hz: int = 16_000  # see rate_hz
    # Seconds of a clip. "auto": the length of nine tenths of the training files, at most max_auto_clip_s.
    clip_s: Annotated[float, Field(gt=0, le=3600)] | Auto = 1.28
    max_auto_clip_s: Positive = 2.0  # see clip_s
    # One channel by its number, from 0, or "mix": the mean of all.
    channel: Annotated[int, Field(ge=0, le=63)] | Literal["mix"] = "mix"
    short: Literal["loop", "pad"] = "loop"  # how a file shorter than the clip is filled up
    # Where a clip begins: anywhere in training and in the middle in evaluation, or with the first audible sample
    # (onset). "auto": onset if most training files are loud at their beginning and then die away, as drums do.
    start: Literal["random", "onset", "auto"] = "random"
    eval_windows: Size = 1  # clips of each file in evaluation, spread evenly over it; their scores are averaged
    patch: tuple[Size, ...] = (128,)
    # Mel mode only.
    num_mels: Annotated[int, Field(ge=4, le=1024)] = 64  # number of mel bands; presets with mel features set their own
    window_s: Positive = 0.025  # seconds of a window of the spectrogram
    hop_s: Positive = 0.010  # seconds between windows
    min_hz: Annotated[float, Field(ge=0)] = 20.0  # lowest frequency of the filters
    # How many dB below the loudest power of a clip silence begins; unset: 100 dB below full scale.
    floor_db: Annotated[float, Field(gt=0, le=200)] | None = None
    # Learned layers before positions are attached: none (the paper), or three small convolutions over the spectrogram
    # (mel mode), whose stride is the patch.
    stem: Literal["none", "conv"] = "none"
    stem_channels: Size = 64  # channels after the stem
    # Training: a random window, changes of the sound, SpecAugment (mel mode). "auto": by the number of training
    # files and, for the speed, the names of the classes.
    speed: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.0  # largest change of speed, and so of pitch, as a share
    equalizer_db: Annotated[float, Field(ge=0, le=60)] | Auto = 0.0  # random slope and bend of the spectrum (mel mode)
    noise: Fraction | Auto = 0.0  # largest amplitude of white noise, as a share of the clip's own
    gain_db: Annotated[float, Field(ge=0, le=60)] = 0.0  # largest change of level
    time_masks: Annotated[int, Field(ge=0, le=100)] = 0  # number of masks over time
    time_mask_share: Fraction = 0.1  # largest share of the clip that a mask hides
    frequency_masks: Annotated[int, Field(ge=0, le=100)] = 0  # number of masks over frequency
    frequency_mask_share: Fraction = 0.1  # largest share of the mels that a mask hides

    @model_validator(mode="after")
    def _check(self) -> Self:
        axes = 1 if self.features == "raw" else 2
        if len(self.patch) != axes:
            raise ValueError(f"patch of {self.features} audio has {axes} side(s), found {list(self.patch)}")
        return self


RESAMPLING_MARGIN = 4096  # samples of the lower rate, several times the span of soxr's filter
POWER_FLOOR = 1e-10  # power relative to a full-scale sine: -100 dB, below the noise of 16-bit sound
MIN_STD = 1e-4  # standard deviation of log power; a flatter spectrogram is silence
MOST_CUT = 0.1  # share of the files that may lose high frequencies at the "auto" rate
CLIP_PROBES = 24  # sounds decoded to settle the length and the beginning of a clip
SHORTEST_CLIP_S = 0.4
ONE_SHOT, ONE_SHOT_SHARE = 4.0, 0.7  # clips of a sound that are looked at; share of energy in the first quarter
AUDIBLE_DB = 40.0  # below the loudest sample, from which on a sound counts as heard
ONSET_MARGIN_S = 0.01  # kept before the first audible sample
SKETCH_TIMES, SKETCH_BANDS, SKETCH_WINDOW = 48, 12, 512
VARIATIONS = ("speed", "equalizer_db", "noise")
# Names of classes that a change of speed would change: notes, numbers of hertz or beats.
PITCH = re.compile(r"^[A-Ga-g](?:#|b|is|es|s)?-?\d?$|pitch|note|chord|tempo|speed|\d\s*(?:hz|bpm)", re.IGNORECASE)
SILENT_PEAK = 1e-3  # amplitude relative to full scale, about the mean: -60 dB; a quieter sound is a fault


class AudioModality(TimedModality[AudioSpec]):
    """Sound files that libsndfile reads and that have a signature; the sound of videos."""

    name = "audio"
    steps = "samples"
    precedence = 3
    formats = f"{', '.join(FORMATS)}, AAC, AMR, WavPack, and the sound of videos"
    suffixes = frozenset({
        ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf",
        ".w64", ".rf64", ".m4a", ".m4b", ".aac", ".sph", ".wma", ".mka", ".weba", ".amr", ".wv", ".mp2", ".spx",
    })  # fmt: skip
    decides = ("rate_hz", "channel")
    surveyed = 256
    paper_preset = "audioset-audio"
    can_mix = True
    preparation = (
        "decode to float32 in -1..1, one channel, at rate_hz; the middle clip_s seconds, or those from the first "
        "audible sample on (start), a shorter sound repeated or zero-padded (short); raw samples, or a log-mel "
        "spectrogram of zero mean and unit variance; cut into patches"
    )

    def sniff(self, head: bytes, name: str) -> bool:
        return is_sound(head) or container.format_of(head, name) is not None

    def clip_s(self, spec: AudioSpec) -> float:
        return _clip_s(spec)

    def span_s(self, spec: AudioSpec) -> float:
        return _clip_s(spec) * (1 + strength_of(spec.speed))

    def first_s(self, raw: Array, spec: AudioSpec) -> float:
        if spec.start == "onset" and (loud := _audible(raw)).size:
            return max(0.0, int(loud[0]) / _rate(spec) - ONSET_MARGIN_S)
        return super().first_s(raw, spec)

    def steps_hz(self, spec: AudioSpec) -> float:
        return _rate(spec)

    def duration_s(self, source: Source, limits: Limits, spec: AudioSpec | None = None) -> float:
        """Return the length in seconds that a file declares; without a declaration its samples are counted."""
        with open_sound(source, "mix", limits) as sound:
            samples = sum(map(len, sound.read(0, math.inf))) if sound.samples is None else sound.samples
            return samples / sound.rate_hz

    def load(self, source: Source, spec: AudioSpec, limits: Limits, span: Span | None = None) -> Samples:
        """Return one channel, or the mean of all, as (samples,) float32 at `spec.rate_hz`; full scale is 1.

        A span has the same samples as the whole file, up to rounding; in MKV up to 1 ms, the resolution of its times.
        """
        rate_hz = _rate(spec)
        with open_sound(source, spec.channel, limits) as sound:
            begin, end, first, stop = _cut(span, sound.rate_hz, rate_hz)
            growth = max(1.0, rate_hz / sound.rate_hz)
            source.check_decoded(min(end - begin, sound.samples or 0) * growth, 4, limits)
            blocks, total = [], 0
            for block in sound.read(begin, end):
                total += len(block)
                source.check_decoded(total * growth, 4, limits)  # again: a stream may declare no length
                blocks.append(block)
        samples = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
        if samples.size and sound.rate_hz != rate_hz:
            import soxr

            samples = soxr.resample(samples, sound.rate_hz, rate_hz, "HQ")
        noun = "samples" if span is None else f"samples at {span[0]:g} s"
        return check_contract(source, samples[first : int(min(stop, samples.size))], noun)

    def blocks(self, source: Source, spec: AudioSpec, limits: Limits, window_s: float) -> Iterator[Samples]:
        with open_sound(source, spec.channel, limits) as sound:
            if sound.rate_hz == _rate(spec):
                yield from sound.read(0, math.inf)
                return
            import soxr

            stream = soxr.ResampleStream(sound.rate_hz, _rate(spec), 1, dtype="float32", quality="HQ")
            for block in sound.read(0, math.inf):
                yield stream.resample_chunk(block)
            yield stream.resample_chunk(np.empty(0, np.float32), last=True)

    def resolve(self, spec: AudioSpec, sources: Sequence[Source], limits: Limits) -> AudioSpec:
        """Return `spec` with a rate chosen from the headers of `sources`, and with a clip that fits their sound.

        The rate is the lowest rate of `sources` that at most MOST_CUT of them exceed: a lower one would lose high
        frequencies, a higher one would only add empty bands. It is at most `max_auto_rate_hz`, and equals it without
        sources. Raises DataError if no source can be read.
        """
        spec = self._with_rate(spec, sources, limits)
        if "auto" in (spec.clip_s, spec.start):
            spec = self._with_clip(spec, sources, limits)
        return spec.filled(dict.fromkeys(VARIATIONS, 0.0))

    def _with_clip(self, spec: AudioSpec, sources: Sequence[Source], limits: Limits) -> AudioSpec:
        """Return `spec` with the length and the start of a clip, chosen from the sound of a few sources."""
        longest = spec.max_auto_clip_s
        known = spec.model_copy(update={"clip_s": longest})
        read = partial(self.load, spec=known, limits=limits, span=(0.0, ONE_SHOT * longest))
        sounds = list(probed(sources[:CLIP_PROBES], read, "inputs.audio.clip_s")) if sources else []
        lengths = [audible_samples(sound) / _rate(spec) for sound in sounds] or [longest]
        fits = math.ceil(10 * float(np.quantile(lengths, 0.9))) / 10
        dying = sum(is_one_shot(sound) for sound in sounds)
        chosen: dict[str, Any] = {"clip_s": min(longest, max(SHORTEST_CLIP_S, fits))}
        chosen["start"] = "onset" if 2 * dying > len(sounds) else "random"
        return spec.filled(chosen)

    def adapt(self, spec: AudioSpec, training_set: TrainingSet) -> AudioSpec:
        """Return `spec` with its "auto" variations: strong ones for few sounds, which are heard hundreds of times."""
        small = training_set.is_small
        has_pitch = any(PITCH.search(name) for name in training_set.classes)
        chosen = {
            "speed": 0.2 if small and not has_pitch else 0.0,
            "equalizer_db": 6.0 if small else 0.0,
            "noise": 0.02 if small else 0.0,
        }
        return spec.filled(chosen)

    def _with_rate(self, spec: AudioSpec, sources: Sequence[Source], limits: Limits) -> AudioSpec:
        if spec.rate_hz != "auto":
            return spec

        def rate_of(source: Source) -> int:
            with open_sound(source, "mix", limits) as sound:
                return min(sound.rate_hz, spec.max_auto_rate_hz)

        rates = sorted(probed(sources, rate_of, "inputs.audio.rate_hz") if sources else [spec.max_auto_rate_hz])
        return spec.model_copy(update={"rate_hz": rates[math.ceil((1 - MOST_CUT) * len(rates)) - 1]})

    def in_words(self, spec: AudioSpec) -> str:
        features = "raw samples" if spec.features == "raw" else f"{spec.num_mels} mel bands"
        features += "" if spec.channel == "mix" else f", channel {spec.channel}"
        features += stem_in_words(spec.stem)
        start = " from the first audible sample on" if spec.start == "onset" else ""
        changes = {"speed": spec.speed, "equaliser": spec.equalizer_db, "noise": spec.noise, "level": spec.gain_db}
        changes |= {"masks": spec.time_masks + spec.frequency_masks}
        varied = varied_in_words(name for name, strength in changes.items() if strength)
        return f"{_clip_s(spec):g} s{start} at {_khz(_rate(spec))} kHz, {features}{varied}"

    def declared(self, source: Source, limits: Limits) -> dict[str, Any]:
        with open_sound(source, "mix", limits) as sound:
            seconds = None if sound.samples is None else round(sound.samples / sound.rate_hz, 3)
            return {"rate_hz": sound.rate_hz, "seconds": seconds}

    def survey(self, spec: AudioSpec, sources: Sequence[Source], limits: Limits) -> list[str]:
        """Return the shares of files with a lower and with a higher rate than the model's, and the lengths of files."""
        rates, seconds = [], []
        for source in sources:
            with suppress(PerceiverError), open_sound(source, "mix", limits) as sound:
                rates.append(sound.rate_hz)
                if sound.samples is not None:
                    seconds.append(sound.samples / sound.rate_hz)
        facts, counted_files = [], f" of {counted(len(rates), 'file')}"
        for others in ([r for r in rates if r < _rate(spec)], [r for r in rates if r > _rate(spec)]):
            if others:
                ends = dict.fromkeys((_khz(min(others)), _khz(max(others))))
                facts.append(f"{share_in_words(len(others), len(rates))}{counted_files} are {' to '.join(ends)} kHz")
                counted_files = ""
        return facts + lengths_in_words(seconds, _clip_s(spec))

    def loaded(self, spec: AudioSpec) -> tuple[str, tuple[int | None, ...]]:
        return "float32", (None,)

    def layout(self, spec: AudioSpec) -> Layout:
        """Return a grid of (samples // patch,) for raw sound, or of (frames, mels) // patch for a spectrogram.

        Paper 4.2: 1.28 s at 48 kHz are 61,440 samples; in segments of 128 they are a byte array of 480 x 128.
        """
        shape = (_num_samples(spec, _clip_s(spec)),) if spec.features == "raw" else _mel_shape(spec)
        if spec.stem == "conv" and spec.features == "mel":
            return Layout.of_conv_stem(spec, shape, 1)
        grid = tuple(side // patch for side, patch in zip(shape, spec.patch, strict=True))
        if 0 in grid:
            raise UsageError(f"inputs.audio.patch {list(spec.patch)} is larger than the clip, {list(shape)}")
        return Layout.of_grid(spec, grid, math.prod(spec.patch))

    def prepare(self, raw: Array, spec: AudioSpec, rng: Rng | None, start_s: float | None = None) -> ByteArray:
        """Return one clip of `raw` (samples,): (M, patch) raw samples or (*grid, values of a patch) log-mel."""
        speed = strength_of(spec.speed)
        factor = float(rng.uniform(1 - speed, 1 + speed)) if rng is not None and speed else 1.0
        clip = _clip(raw, spec, rng, start_s, factor)
        if rng is not None and (noise := strength_of(spec.noise)):
            level = rng.uniform(0, noise) * float(np.sqrt(np.mean(np.square(clip))))
            clip = clip + rng.normal(0, level, clip.size).astype(np.float32)
        if rng is not None and spec.gain_db:
            clip = clip * np.float32(10 ** (rng.uniform(-spec.gain_db, spec.gain_db) / 20))
        if spec.features == "raw":
            return ByteArray(patchify(clip[:, None], spec.patch))
        features = _log_mel(clip, spec, rng)
        if rng is not None:
            _mask(features, 0, spec.time_masks, spec.time_mask_share, rng)
            _mask(features, 1, spec.frequency_masks, spec.frequency_mask_share, rng)
        return ByteArray(patchify(features[:, :, None], (1, 1) if spec.stem == "conv" else spec.patch))

    def sketch(self, raw: Array, spec: AudioSpec) -> Array | None:
        """Return the log power of the audible part by time and frequency, less its mean: the level must not matter."""
        loud = _audible(raw)
        if not loud.size:
            return None
        sound = raw[loud[0] : loud[-1] + 1]
        window = max(SKETCH_WINDOW, sound.size // SKETCH_TIMES)
        places = np.linspace(0, max(0, sound.size - window), SKETCH_TIMES).astype(int)
        frames = np.stack([np.resize(sound[at : at + window], window)[:SKETCH_WINDOW] for at in places])
        power = np.square(np.abs(np.fft.rfft(frames, axis=1)))[:, 1:]
        bands = np.add.reduceat(power, np.geomspace(1, power.shape[1], SKETCH_BANDS, dtype=int) - 1, axis=1)
        level = np.log(bands + bands.max() * 1e-6)
        return np.asarray(level - level.mean(), np.float32).reshape(-1)

    def viewed(self, spec: AudioSpec) -> AudioSpec:
        """Return `spec` without variations: another view is another clip."""
        calm = {"gain_db": 0.0, "time_masks": 0, "frequency_masks": 0, "speed": 0.0, "equalizer_db": 0.0, "noise": 0.0}
        return spec.model_copy(update=calm)

    def starts_itself(self, spec: AudioSpec) -> bool:
        return spec.start == "onset"

    def num_views(self, spec: AudioSpec) -> int:
        return spec.eval_windows

    def fault(self, raw: Array) -> str | None:
        """Return "silent" if the sound stays below `SILENT_PEAK`, or None."""
        return "silent" if np.abs(raw - raw.mean()).max() < SILENT_PEAK else None


MODALITY = AudioModality()
register(MODALITY)


def _cut(span: Span | None, file_hz: int, rate_hz: int) -> tuple[int, float, int, float]:
    """Return (begin, end, first, stop) of a span in seconds, or of the whole file.

    begin, end: the samples to decode, at the file's rate, with a margin at both ends for the resampling filter.
    first, stop: the samples of the span, at the target rate, counted from `begin`.
    """
    if span is None:
        return 0, math.inf, 0, math.inf
    common = math.gcd(file_hz, rate_hz)
    step = file_hz // common  # the samples of both rates coincide at every step-th sample of the file
    first = max(0, round(span[0] * rate_hz))
    stop = first + max(1, round(span[1] * rate_hz))
    margin = 0 if file_hz == rate_hz else RESAMPLING_MARGIN * max(1.0, file_hz / rate_hz)
    begin = max(0, math.floor(first * file_hz / rate_hz - margin)) // step * step
    end = math.ceil(stop * file_hz / rate_hz + margin)
    offset = begin // step * (rate_hz // common)
    return begin, end, first - offset, stop - offset


def _khz(rate_hz: int) -> str:
    return f"{rate_hz / 1000:g}"


def _rate(spec: AudioSpec) -> int:
    return spec.known("rate_hz", spec.rate_hz, "hertz")


def _clip_s(spec: AudioSpec) -> float:
    return spec.known("clip_s", spec.clip_s, "seconds")


def audible_samples(sound: Samples) -> int:
    """Return the number of samples from the first to the last that is within AUDIBLE_DB of the loudest."""
    loud = _audible(sound)
    return int(loud[-1] - loud[0] + 1) if loud.size else 0


def _audible(sound: Samples) -> Array:
    level = np.abs(sound)
    return np.flatnonzero(level > level.max(initial=0.0) * np.float32(10 ** (-AUDIBLE_DB / 20)))


def is_one_shot(sound: Samples) -> bool:
    """Return whether a sound has most of its energy in its first quarter, as a drum or a plucked string."""
    loud = _audible(sound)
    if not loud.size:
        return False
    energy = np.square(sound[loud[0] : loud[-1] + 1], dtype=np.float64)
    return bool(energy[: max(1, energy.size // 4)].sum() > ONE_SHOT_SHARE * energy.sum())


def _of_length(sound: Samples, samples: int) -> Samples:
    """Return a sound played faster or slower, by linear interpolation: good enough for training."""
    if sound.size == samples:
        return sound
    places = np.linspace(0, sound.size - 1, samples)
    played: Samples = np.interp(places, np.arange(sound.size), sound).astype(np.float32)
    return played


def _num_samples(spec: AudioSpec, seconds: float) -> int:
    return math.floor(seconds * _rate(spec) + 0.5)


def _window_and_hop(spec: AudioSpec) -> tuple[int, int]:
    return max(1, _num_samples(spec, spec.window_s)), max(1, _num_samples(spec, spec.hop_s))


def _mel_shape(spec: AudioSpec) -> tuple[int, int]:
    """Return (frames, mels) of a clip. Frames lie wholly inside the clip, without padding."""
    samples, (window, hop) = _num_samples(spec, _clip_s(spec)), _window_and_hop(spec)
    if samples < window:
        raise UsageError(f"inputs.audio.clip_s is {samples} samples, shorter than one window of {window}")
    if spec.min_hz >= _rate(spec) / 2:
        raise UsageError(f"inputs.audio.min_hz {spec.min_hz:g} is not below half of rate_hz {spec.rate_hz}")
    return 1 + (samples - window) // hop, spec.num_mels


def _clip(raw: Array, spec: AudioSpec, rng: Rng | None, start_s: float | None, factor: float = 1.0) -> Samples:
    """Return the clip (samples,) of `raw` at `start_s`, or at a random or central place; short sound is filled up.

    The clip is played `factor` times as fast as `raw`. `start_s` counts in `raw`, as for the frames of a video.
    """
    whole = _num_samples(spec, _clip_s(spec))
    samples = max(1, round(whole * factor))
    if spec.start == "onset" and start_s is None and (loud := _audible(raw)).size:
        early = ONSET_MARGIN_S if rng is None else rng.uniform(0, 4 * ONSET_MARGIN_S)
        raw = raw[max(0, int(loud[0]) - round(early * _rate(spec))) :]
        start_s = 0.0
    spare = raw.size - samples
    at = None if start_s is None else round(start_s * _rate(spec))
    places = raw.size if spare < 0 and spec.short == "loop" else abs(spare) + 1
    drawn = int(rng.integers(places)) if rng is not None else max(0, spare // 2)
    if spare >= 0:
        start = drawn if at is None else min(at, spare)
        return _of_length(raw[start : start + samples], whole)
    if spec.short == "loop":
        return _of_length(raw.take(np.arange(samples) + (drawn if at is None else at), mode="wrap"), whole)
    kept, before = raw[at or 0 :], drawn if at is None else 0
    return _of_length(np.pad(kept, (before, samples - before - kept.size)), whole)


def _log_mel(clip: Samples, spec: AudioSpec, rng: Rng | None) -> Samples:
    """Return the log-mel spectrogram (frames, mels), standardised: the level depends on the microphone.

    With `rng`, through a random equaliser: a slope and a bend over all mels, up to +- equalizer_db each.
    """
    window, hop = _window_and_hop(spec)
    taper, filters = mel_filters(_rate(spec), window, spec.num_mels, spec.min_hz)
    frames = sliding_window_view(clip, window)[::hop] * taper
    spectrum = np.fft.rfft(frames, n=fft_size(window), axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32, copy=False)
    # One product for each band: the matrix of all filters is mostly zeros, and BLAS would start threads for it that
    # slow down other processes (8 ms instead of 0.3 ms).
    mel = [power[:, first : first + len(weights)] @ weights for first, weights in filters]
    power = np.stack(mel, axis=1)
    floor = POWER_FLOOR if spec.floor_db is None else max(POWER_FLOOR, power.max() * 10 ** (-spec.floor_db / 10))
    features: Samples = np.log(power + np.float32(floor))
    if rng is not None and (strength := strength_of(spec.equalizer_db)):
        place = np.linspace(-1, 1, spec.num_mels)
        slope, bend = rng.uniform(-strength, strength, 2) * (math.log(10) / 10)  # of power, in nepers
        features += (slope * place + bend * (place**2 - 1 / 3)).astype(np.float32)
    features -= features.mean()
    std = features.std()
    return features / std if std > MIN_STD else np.zeros_like(features)


def _mask(features: Samples, axis: int, count: int, share: float, rng: Rng) -> None:
    """Set `count` random bands along `axis` to 0, the mean, in place (SpecAugment, paper 4.2).

    share: the largest width of a band as a share of the axis; widths are uniform.
    """
    length = features.shape[axis]
    for _ in range(count):
        width = int(rng.integers(int(share * length) + 1))
        start = int(rng.integers(length - width + 1))
        features[(slice(None),) * axis + (slice(start, start + width),)] = 0.0
