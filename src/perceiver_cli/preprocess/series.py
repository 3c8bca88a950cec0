"""Several channels over time: sensors of motion, ECG and EEG, vibration, any log of numbers.

An input is a patch of neighbouring samples of all channels: the samples themselves, the logarithm of the power spectrum
of a longer window around them, and for each channel the share of samples that are there. Each channel is scaled by its
mean and std in training. A missing sample counts as the mean; a patch without samples is hidden from attention.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, model_validator

from perceiver_cli.errors import DataError, PerceiverError, UsageError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import register
from perceiver_cli.preprocess.base import (
    Array,
    ByteArray,
    Layout,
    Rng,
    Span,
    TimedModality,
    TrainingSet,
    lengths_in_words,
    share_in_words,
    strength_of,
    varied_in_words,
)
from perceiver_cli.preprocess.recordings import Recording, is_named_recording, is_recording, read_recording
from perceiver_cli.preprocess.resampling import SAME_RATE, at_rate
from perceiver_cli.preprocess.series_summary import CONSTANT, Summary, channels_of
from perceiver_cli.preprocess.sound_files import is_lossless
from perceiver_cli.preprocess.source import Source, probed
from perceiver_cli.preprocess.spec import Auto, InputSpec, Limits, Positive, Size
from perceiver_cli.preprocess.time_columns import Floats


class SeriesSpec(InputSpec):
    """Channels over time: samples in patches, with the spectrum around each."""

    modality: Literal["series"] = "series"
    # Columns that are read, by name, or "1", "2", ... in files without names. "auto": columns of numbers that half of
    # the training files have, and that change within a file.
    channels: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=4096)] | Auto = "auto"
    mean: tuple[float, ...] | Auto = "auto"  # mean of each channel; "auto": that of the training files
    std: tuple[Positive, ...] | Auto = "auto"  # standard deviation of each channel; "auto": as mean
    # Scale by mean and std of the training files, or by those of each clip, if sensors differ in strength.
    scale: Literal["training", "clip"] = "training"
    # Column of times, numbers or dates. "auto": one called time, timestamp or the like; "none": each row is a step.
    time: str = "auto"
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"  # unit of numbers; "auto": by name and size, else s
    file_rate_hz: Positive | None = None  # samples a second of files without times; unset: rate_hz
    # Samples a second of the model; files of another rate are resampled. "auto": the median of the training files that
    # have times, else file_rate_hz, else 1.
    rate_hz: Positive | Auto = "auto"
    # Seconds of a clip. "auto": the length of nine tenths of the training files, at most max_auto_steps samples.
    clip_s: Positive | Auto = "auto"
    max_auto_steps: Size = 2048  # see clip_s
    short: Literal["pad", "loop"] = "pad"  # how a file shorter than the clip is filled up: as missing, or repeated
    eval_windows: Size = 1  # clips of each file in evaluation, spread evenly over it; their scores are averaged
    patch: tuple[Size, ...] | Auto = "auto"  # type: ignore[assignment]  # samples of an input. "auto": as many as make 64 inputs at most
    features: Literal["raw", "spectrum", "both"] = "both"  # samples, the spectrum around them, or both
    # Samples around an input whose spectrum is taken. "auto": an eighth of the clip, 16 to 256.
    window: Annotated[int, Field(ge=4, le=1 << 16)] | Auto = "auto"
    # Training: variations. "auto": by the number of training files.
    gain: Annotated[float, Field(ge=0, lt=1)] | Auto = 0.0  # largest change of strength of all channels, as a share
    noise: Annotated[float, Field(ge=0)] | Auto = 0.0  # largest std of white noise, relative to the channel's
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of inputs that are hidden

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patch != "auto" and len(self.patch) != 1:
            raise ValueError(f"patch has {len(self.patch)} numbers, expected one: time has one axis")
        if (fault := _uneven(self)) is not None:
            raise ValueError(fault)
        return self


def _uneven(spec: SeriesSpec) -> str | None:
    """Return what is wrong if channels, means and deviations differ in number, else None."""
    counts = {key: len(value) for key in ("channels", "mean", "std") if (value := getattr(spec, key)) != "auto"}
    each = ", ".join(f"{count} of {key}" for key, count in counts.items())
    return f"{each}, expected one for each channel" if len({*counts.values()}) > 1 else None


FARTHEST = 1000.0  # standard deviations from the mean, to which values are clipped
AUTO_INPUTS = 64
WINDOWS = (16, 256)  # the smallest and largest "auto" window
FLOOR = 1e-3  # added to power; white noise of std 1 has power 1
LOG_SCALE = 3.0  # logarithms of power are divided by it, so that most are within -2 and 2
MAX_STEPS = 1 << 24  # samples of a clip
SKETCH = 48  # places of a sketch
SMALL_GAIN, SMALL_NOISE = 0.2, 0.1  # "auto" for few training files
MADE_UP = 3  # channels if no data says how many there are
LEAST_STD = 1e-6  # a channel of a clip with a smaller std counts as constant


class SeriesModality(TimedModality[SeriesSpec]):
    """Tables, arrays and Parquet files of numbers over time."""

    name = "series"
    is_common_word = True
    steps = "samples"
    reads_spans = False
    precedence = 7
    formats = "CSV, TSV, NPY, Parquet, Arrow, WAV and FLAC of numbers over time, if they are asked for"
    suffixes = frozenset({".csv", ".tsv", ".npy", ".parquet", ".arrow", ".feather", ".wav", ".flac"})
    decides = ("channels", "mean", "std", "time", "time_unit", "file_rate_hz", "rate_hz")
    surveyed = 32
    preparation = (
        "channels by name, at rate_hz, less mean, divided by std; the middle clip_s seconds, a shorter file padded as "
        "missing or repeated (short); for each patch and channel the samples, then the logarithm of the power spectrum "
        "around them, then for each channel the share of samples that are there (perceiver_cli/preprocess/series.py)"
    )

    def sniff(self, head: bytes, name: str) -> bool:
        return False  # a table could be anything: it is read if the user asks, or if nothing else is there

    def may_read(self, head: bytes, name: str) -> bool:
        return is_recording(head)

    def takes_folders(self, head: bytes, name: str) -> bool:
        return is_named_recording(head)

    def is_table(self, head: bytes, name: str) -> bool:
        return not is_lossless(head)

    def clip_s(self, spec: SeriesSpec) -> float:
        return _steps(spec) / _rate(spec)

    def steps_hz(self, spec: SeriesSpec) -> float:
        return _rate(spec)

    def has_samples(self, window: Array) -> bool:
        return bool(window[..., 1].any())

    def first_s(self, raw: Array, spec: SeriesSpec) -> float:
        """Return the start in seconds of the clip of evaluation: the middle one, or the nearest with samples."""
        spare = len(raw) - _steps(spec)
        return _with_samples(raw, spare // 2, _steps(spec)) / _rate(spec) if spare > 0 else 0.0

    def duration_s(self, source: Source, limits: Limits, spec: SeriesSpec | None = None) -> float:
        """Return the length in seconds of the array of `load`, which is kept for it."""
        if spec is None:
            raise UsageError("the length of a series depends on its options, expected inputs.series")
        return len(self.load(source, spec, limits)) / _rate(spec)

    def load(self, source: Source, spec: SeriesSpec, limits: Limits, span: Span | None = None) -> Array:
        """Return (samples, channels, 2) float32 at `spec.rate_hz`: the value in stds from the mean, and 1.

        A missing sample is 0 and 0. A channel that the file lacks is missing, which is noted. Raises DataError if no
        channel has a value.
        """
        key = (source.name, source.state(), spec, limits)
        if self._last is None or source.state() is None or self._last[0] != key:
            notes = list[str]()
            values = self._loaded(Source(source.name, source.data, notes=notes), spec, limits)
            self._last = (key, values, notes)
        _, values, notes = self._last
        for note in notes:
            source.note(note)
        if span is None:
            return values
        first = max(0, round(span[0] * _rate(spec)))
        return values[first : first + max(1, round(span[1] * _rate(spec)))]

    # The last file: callers ask for its length, then for its values.
    _last: tuple[object, Array, list[str]] | None = None

    def _loaded(self, source: Source, spec: SeriesSpec, limits: Limits) -> Array:
        if "auto" in (spec.channels, spec.mean, spec.std):
            raise UsageError("inputs.series.channels is still 'auto', expected names", "name them, with mean and std")
        recording = read_recording(source, limits, spec.time, spec.time_unit)
        values, own_hz = _chosen(source, recording, spec), spec.file_rate_hz or _rate(spec)
        values = at_rate(source, values, recording.times, own_hz, _rate(spec), limits)
        there = np.isfinite(values)
        if not there.any():
            raise DataError(f"{source.shown}: no channel has a value", f"expected some of {_named(spec)}")
        scaled = (values - np.array(spec.mean)) / np.array(spec.std)
        scaled = np.where(there, np.clip(scaled, -FARTHEST, FARTHEST), 0.0)
        return np.stack([scaled, there], axis=-1).astype(np.float32)

    def blocks(self, source: Source, spec: SeriesSpec, limits: Limits, window_s: float) -> Iterator[Array]:
        yield self.load(source, spec, limits)

    def loaded(self, spec: SeriesSpec) -> tuple[str, tuple[int | None, ...]]:
        return "float32", (None, len(spec.channels), 2)

    def resolve(self, spec: SeriesSpec, sources: Sequence[Source], limits: Limits) -> SeriesSpec:
        """Return `spec` with channels, their statistics, a rate, and lengths of clip, patch and window.

        Without sources channels of `max_auto_steps` samples are made up. Raises DataError if no source is readable.
        """
        needed = "auto" in (spec.channels, spec.mean, spec.std, spec.rate_hz, spec.clip_s)

        def summary(source: Source) -> Summary:
            return Summary.of(read_recording(source, limits, spec.time, spec.time_unit))

        each = list(probed(sources, summary, "inputs.series.channels")) if sources and needed else []
        if spec.rate_hz == "auto":
            rates = [one.rate_hz for one in each if one.rate_hz is not None]
            rate = float(np.median(rates)) if rates else spec.file_rate_hz or 1.0
            spec = spec.model_copy(update={"rate_hz": float(f"{rate:.4g}")})
        if spec.channels == "auto":
            names = channels_of(each) if each else tuple(f"channel {place}" for place in range(1, MADE_UP + 1))
            spec = spec.model_copy(update={"channels": names})
        if (fault := _uneven(spec)) is not None:
            raise UsageError(f"inputs.series has {fault}", f"the channels are {_named(spec)}")
        spec = _with_statistics(spec, each)
        if spec.clip_s == "auto":
            lengths = [one.length_s(spec.file_rate_hz or _rate(spec)) for one in each]
            longest = spec.max_auto_steps / _rate(spec)
            fits = float(np.quantile(lengths, 0.9, method="lower")) if lengths else longest
            spec = spec.model_copy(update={"clip_s": min(longest, max(fits, 1 / _rate(spec)))})
        steps = _steps(spec)
        chosen: dict[str, Any] = {"patch": (_power_of_2(steps / AUTO_INPUTS),), "gain": 0.0, "noise": 0.0}
        chosen["window"] = min(WINDOWS[1], max(WINDOWS[0], _power_of_2(steps / 8)))
        return spec.filled(chosen)

    def adapt(self, spec: SeriesSpec, training_set: TrainingSet) -> SeriesSpec:
        """Return `spec` with its "auto" variations: strong ones for few files."""
        chosen = {"gain": SMALL_GAIN, "noise": SMALL_NOISE} if training_set.is_small else {"gain": 0.0, "noise": 0.0}
        return spec.filled(chosen)

    def in_words(self, spec: SeriesSpec) -> str:
        steps, rate = _steps(spec), _rate(spec)
        length = counted(steps, "sample") if rate == 1 else f"{steps / rate:.4g} s at {rate:g} Hz"
        around = f", spectrum of {spec.window}" if spec.features != "raw" else ""
        changes = {"strength": spec.gain, "noise": spec.noise, "hidden patches": spec.drop}
        varied = varied_in_words(name for name, strength in changes.items() if strength)
        named = f" ({_named(spec)})" if len(spec.channels) < MADE_UP * 4 else ""
        return f"{counted(len(spec.channels), 'channel')}{named}, {length}, patches of {_patch(spec)}{around}{varied}"

    def survey(self, spec: SeriesSpec, sources: Sequence[Source], limits: Limits) -> list[str]:
        """Return the shares of files of other rates and of missing samples, the columns not read, and the lengths."""
        each = list[Summary]()
        for source in sources:
            with suppress(PerceiverError):
                each.append(Summary.of(read_recording(source, limits, spec.time, spec.time_unit)))
        rates = [one.rate_hz for one in each if one.rate_hz is not None]
        others = Counter(name for one in each if one.is_named for name in one.names if name not in spec.channels)
        total = sum(one.num_samples * len(one.names) for one in each)
        missing = total - sum(int(one.statistics[:, 0].sum()) for one in each)
        facts = []
        if other := [rate for rate in rates if abs(rate - _rate(spec)) > SAME_RATE * _rate(spec)]:
            ends = dict.fromkeys((f"{min(other):.4g}", f"{max(other):.4g}"))
            facts.append(
                f"{share_in_words(len(other), len(each))} of {counted(len(each), 'file')} are {' to '.join(ends)} Hz"
            )
        if others:
            facts.append(f"not read: {', '.join(show_path(name) for name, _ in others.most_common(5))}")
        if missing:
            facts.append(f"{share_in_words(missing, total)} of the values are missing")
        lengths = [one.length_s(spec.file_rate_hz or _rate(spec)) for one in each]
        return facts + (lengths_in_words(lengths, self.clip_s(spec)) if rates else [])

    def layout(self, spec: SeriesSpec) -> Layout:
        """Return a grid of one input per patch: samples and spectrum by channel, then the share of samples of each."""
        patch, channels = _patch(spec), len(spec.channels)
        if spec.channels in ("auto", ()):
            raise UsageError("inputs.series.channels is empty or still 'auto', expected names")
        each = (patch if spec.features != "spectrum" else 0) + (_window(spec) // 2 if spec.features != "raw" else 0)
        count = -(-_steps(spec) // patch)
        return Layout.of_grid(spec, (count,), channels * each + channels, presence=channels, groups=channels)

    def prepare(self, raw: Array, spec: SeriesSpec, rng: Rng | None, start_s: float | None = None) -> ByteArray:
        """Return (inputs, values) of one clip of `raw` (samples, channels, 2); see `layout`."""
        clip = _clip(raw, spec, rng, start_s)
        values, there = clip[..., 0], clip[..., 1] != 0  # (T, channels)
        if spec.scale == "clip":
            values = _standardised(values, there)
        gain, noise = map(strength_of, (spec.gain, spec.noise))
        if rng is not None and gain:
            values = values * np.float32(rng.uniform(1 - gain, 1 + gain))
        if rng is not None and noise:
            added = rng.normal(0, rng.uniform(0, noise), values.shape).astype(np.float32)
            values = np.where(there, values + added, 0)
        patch, count = _patch(spec), -(-len(clip) // _patch(spec))
        spare = ((0, count * patch - len(clip)), (0, 0))
        whole = np.pad(values, spare)
        present = np.pad(there, spare).reshape(count, patch, -1).mean(axis=1, dtype=np.float32)  # (inputs, channels)
        parts = [whole.reshape(count, patch, -1)] if spec.features != "spectrum" else []
        parts += [_spectra(whole, patch, _window(spec))] if spec.features != "raw" else []
        features = np.concatenate(parts, axis=1).transpose(0, 2, 1) * (present > 0)[..., None]  # (inputs, channels, n)
        if rng is not None and spec.drop:
            hidden = rng.random(count) < spec.drop
            if len(shown := np.flatnonzero(present.any(axis=1))):  # not one in a gap, which shows nothing
                hidden[rng.choice(shown)] = False
            present, features = present * ~hidden[:, None], features * ~hidden[:, None, None]
        return ByteArray(np.hstack([features.reshape(count, -1), present]).astype(np.float32))

    def viewed(self, spec: SeriesSpec) -> SeriesSpec:
        """Return `spec` without variations: another view is another clip."""
        return spec.model_copy(update={"gain": 0.0, "noise": 0.0, "drop": 0.0})

    def num_views(self, spec: SeriesSpec) -> int:
        return spec.eval_windows

    def sketch(self, raw: Array, spec: SeriesSpec) -> Array | None:
        """Return each channel at a few places, without its mean, or None if nothing changes."""
        places = np.linspace(0, len(raw) - 1, SKETCH)
        steps = np.arange(len(raw))
        lines = np.stack([np.interp(places, steps, raw[:, place, 0]) for place in range(raw.shape[1])])
        lines = lines - lines.mean(axis=1, keepdims=True)
        return np.asarray(lines, np.float32).reshape(-1) if np.abs(lines).max() > 0 else None

    def fault(self, raw: Array) -> str | None:
        """Return "constant" if no channel changes, or None."""
        values = np.where(raw[..., 1] != 0, raw[..., 0], np.nan)
        values = values[:, np.isfinite(values).any(axis=0)]
        return "constant" if (np.nanmin(values, axis=0) == np.nanmax(values, axis=0)).all() else None


MODALITY = SeriesModality()
register(MODALITY)


def _with_statistics(spec: SeriesSpec, each: Sequence[Summary]) -> SeriesSpec:
    """Return `spec` with mean and deviation of each channel, over all values of the recordings."""
    if "auto" not in (spec.mean, spec.std):
        return spec
    sums = np.zeros((len(spec.channels), 3))  # of counts, values, squares about the first mean
    first = np.zeros(len(spec.channels))
    for one in each:
        for channel, place in enumerate(_places(one.names, spec.channels, is_named=one.is_named) or ()):
            if place is not None and (count := one.statistics[place, 0]):
                mean, variance = one.statistics[place, 1:]
                first[channel] = first[channel] if sums[channel, 0] else mean
                off = mean - first[channel]
                sums[channel] += count, count * off, count * (variance + off**2)
    counts = sums[:, 0].clip(min=1)
    mean = first + sums[:, 1] / counts
    std = np.sqrt(np.maximum(0, sums[:, 2] / counts - np.square(sums[:, 1] / counts)))
    std = np.where(std > CONSTANT * np.abs(mean), std, 1.0)
    neat = {"mean": [float(f"{m:.9g}") for m in mean], "std": [float(f"{s:.6g}") for s in std]}
    return spec.filled({key: tuple(numbers) for key, numbers in neat.items()})


def _places(names: Sequence[str], channels: Sequence[str], *, is_named: bool) -> list[int | None] | None:
    """Return the column of each channel, None for one that is not there; None if a file has none of the channels.

    Channels are found by name, or by place where files or channels have no names.
    """
    known = {name: place for place, name in reversed([*enumerate(names)])}
    if not known.keys().isdisjoint(channels):
        return [known.get(channel) for channel in channels]
    unnamed = not is_named or all(channel.isdigit() for channel in channels)
    return [*range(len(names))] if unnamed and len(names) == len(channels) else None


def _chosen(source: Source, recording: Recording, spec: SeriesSpec) -> Floats:
    """Return the values of the channels (T, channels). Raises DataError if the recording has none of them."""
    places = _places(recording.names, spec.channels, is_named=recording.is_named)
    if places is None:
        found = ", ".join(map(show_path, recording.names[:10]))
        shown = f"columns {found}" if recording.is_named else counted(len(recording.names), "column")
        raise DataError(
            f"{source.shown}: none of the model's channels, found {shown}", f"expected some of {_named(spec)}"
        )
    lacking = [channel for channel, place in zip(spec.channels, places, strict=True) if place is None]
    if lacking:
        source.note(f"no column {', '.join(map(show_path, lacking[:5]))}: counted as missing")
    values = np.full((len(recording.values), len(places)), np.nan)
    for channel, place in enumerate(places):
        if place is not None:
            values[:, channel] = recording.values[:, place]
    return values


# ---------------------------------------------------------------- options


def _rate(spec: SeriesSpec) -> float:
    return spec.known("rate_hz", spec.rate_hz, "hertz")


def _steps(spec: SeriesSpec) -> int:
    """Return the samples of a clip."""
    samples = spec.known("clip_s", spec.clip_s, "seconds") * _rate(spec)
    steps = max(1, round(min(samples, 2.0 * MAX_STEPS)))
    if steps > MAX_STEPS:
        raise UsageError(f"inputs.series.clip_s is {samples:.0f} samples, expected {MAX_STEPS} at most")
    return steps


def _patch(spec: SeriesSpec) -> int:
    return spec.known("patch", spec.patch, "samples")[0]


def _window(spec: SeriesSpec) -> int:
    return spec.known("window", spec.window, "samples")


def _power_of_2(number: float) -> int:
    """Return the smallest power of 2 that is at least a number."""
    return 1 << max(0, math.ceil(math.log2(max(1.0, number))))


def _named(spec: SeriesSpec) -> str:
    return ", ".join(show_path(name) for name in spec.channels[:5]) + (", ..." if len(spec.channels) > 5 else "")


# ---------------------------------------------------------------- inputs


def _clip(raw: Array, spec: SeriesSpec, rng: Rng | None, start_s: float | None) -> Array:
    """Return the clip of `raw` at `start_s`, or at a random or central place; a shorter file is filled up."""
    steps = _steps(spec)
    spare = len(raw) - steps
    if spare >= 0:
        drawn = spare // 2 if rng is None else int(rng.integers(spare + 1))
        start = _with_samples(raw, drawn if start_s is None else min(round(start_s * _rate(spec)), spare), steps)
        return raw[start : start + steps]
    if spec.short == "loop":
        start = 0 if rng is None or start_s is not None else int(rng.integers(len(raw)))
        return raw.take(np.arange(steps) + start, axis=0, mode="wrap")
    return np.pad(raw, ((0, -spare), (0, 0), (0, 0)))


def _with_samples(raw: Array, start: int, steps: int) -> int:
    """Return the start nearest to `start` of a clip with samples: a clip inside a gap would show nothing."""
    places = np.flatnonzero(raw[..., 1].any(axis=1))
    before, after = places[places < start + steps], places[places >= start + steps]
    if not places.size or (before.size and before[-1] >= start):
        return start
    if not after.size or (before.size and start - before[-1] <= after[0] - (start + steps)):
        return max(0, int(before[-1]) - steps + 1)
    return min(int(after[0]), len(raw) - steps)


def _standardised(values: Array, there: Array) -> Array:
    """Return each channel at mean 0 and deviation 1 over the samples that are there; one that does not change is 0."""
    count = there.sum(axis=0).clip(min=1)
    values = np.where(there, values - (values * there).sum(axis=0) / count, 0)
    std = np.sqrt(np.square(values).sum(axis=0) / count)
    return np.asarray(values / np.where(std > LEAST_STD, std, np.inf), np.float32)


def _spectra(values: Array, patch: int, window: int) -> Array:
    """Return (inputs, window // 2, channels): the logarithm of power around each patch, 0 for noise of std 1."""
    count, first = len(values) // patch, (patch - window) // 2
    padded = np.pad(values, ((max(0, -first), window), (0, 0)))
    frames = sliding_window_view(padded, window, axis=0)[max(0, first) :: patch][:count]  # (inputs, channels, window)
    taper = np.hanning(window + 1)[:-1].astype(np.float32)
    spectrum = np.fft.rfft(frames * taper, axis=-1)[..., 1:]
    power = (spectrum.real**2 + spectrum.imag**2) / np.square(taper).sum()
    return np.asarray(np.log(power + FLOOR).transpose(0, 2, 1) / LOG_SCALE)
