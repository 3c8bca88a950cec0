"""Series: files of any writer, times made even, missing samples, inputs of the model, hostile files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.preprocess.base import TrainingSet
from perceiver_cli.preprocess.detection import File, detected, looked_at, taker
from perceiver_cli.preprocess.recordings import Recording, is_recording, read_recording
from perceiver_cli.preprocess.resampling import rate_of
from perceiver_cli.preprocess.series import MODALITY, SeriesSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

LIMITS = Limits()
NUM_ROWS = 40
STEPS = np.arange(NUM_ROWS)
WAVES = np.stack([np.sin(STEPS / 3), np.cos(STEPS / 5)], axis=1).round(3)
SPEC = SeriesSpec(
    channels=("ax", "ay"), mean=(0.0, 0.0), std=(1.0, 1.0), rate_hz=100.0, clip_s=0.4, patch=(8,), window=16
)


def lines(separator: str = ",", decimal: str = ".", period: float = 0.01) -> str:
    """Return rows of time, ax and ay as text."""
    rows = np.column_stack([STEPS * period, WAVES])
    return "\n".join(separator.join(f"{x:.3f}".replace(".", decimal) for x in row) for row in rows)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def columns(**each: object) -> bytes:
    """Return a Parquet file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(each), file)
    return file.getvalue()


NAMED = f"time,ax,ay\n{lines()}"
WRITERS = {
    "plain": NAMED,
    "windows": NAMED.replace("\n", "\r\n"),
    "old Mac": NAMED.replace("\n", "\r"),
    "marked": f"\ufeff{NAMED}",
    "spreadsheet": f"sep=;\ntime;ax;ay\n{lines(';', ',')}",
    "tabs": f"t\tax\tay\n{lines(chr(9), ',')}",
    "blanks": f"# time ax ay\n{lines(' ')}",
    "quotes": f'"time","ax","ay"\n{lines()}',
    "units": f"time,ax,ay\ns,g,g\n{lines()}",
    "facts above": f"Device: X12\nRate: 100\n\n{NAMED}",
    "empty last column": NAMED.replace("\n", ",\n") + ",",
    "index": "\n".join(f"{place},{line}" for place, line in zip(["", *STEPS], NAMED.split("\n"), strict=True)),
    "milliseconds": f"time_ms,ax,ay\n{lines(period=10)}",
    "since 1970": "timestamp,ax,ay\n"
    + "\n".join(f"{1_700_000_000_000 + 10 * n},{ax},{ay}" for n, (ax, ay) in enumerate(WAVES)),
    "dates": "when,ax,ay\n" + "\n".join(f"2024-01-01T00:00:00.{n:02d}0,{x},{y}" for n, (x, y) in enumerate(WAVES)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_recording_is_the_same_from_any_writer(name: str) -> None:
    data = WRITERS[name].encode()
    assert is_recording(data)
    recording = read_recording(Source("a.csv", data), LIMITS)
    assert recording.names == ("ax", "ay")
    assert recording.values == pytest.approx(WAVES)
    assert recording.times is not None
    assert np.diff(recording.times) == pytest.approx(0.01, rel=1e-4)


def test_arrays_and_parquet_hold_the_same() -> None:
    for values in (WAVES, WAVES.T, np.asfortranarray(WAVES), WAVES.astype(">f8")):
        recording = read_recording(Source("a.npy", npy(values)), LIMITS)
        assert (recording.names, recording.times) == (("1", "2"), None)
        assert recording.values == pytest.approx(WAVES)
    assert read_recording(Source("a.npy", npy(WAVES[:, 0])), LIMITS).values.shape == (NUM_ROWS, 1)
    when = np.datetime64("2024-01-01") + STEPS.astype("timedelta64[s]")
    table = columns(time=when, ax=WAVES[:, 0], ay=[None, *WAVES[1:, 1]], note=["x"] * NUM_ROWS)
    recording = read_recording(Source("a.parquet", table), LIMITS)
    assert recording.names == ("ax", "ay")
    assert np.isnan(recording.values[0, 1])
    assert recording.values[1:] == pytest.approx(WAVES[1:])
    assert np.diff(recording.times) == pytest.approx(1.0)  # type: ignore[arg-type]


def wav(values: np.ndarray, rate_hz: int = 100, subtype: str = "DOUBLE", form: str = "WAV") -> bytes:
    soundfile.write(file := io.BytesIO(), values, rate_hz, subtype, format=form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "DOUBLE"), ("FLAC", "PCM_24"), ("W64", "PCM_32"), ("AIFF", "FLOAT")]
)
def test_a_sound_file_holds_channels_at_its_rate(form: str, subtype: str) -> None:
    source = Source("a.wav", wav(WAVES / 2, subtype=subtype, form=form))
    recording = read_recording(source, LIMITS)
    assert (recording.names, recording.is_named) == (("1", "2"), False)
    assert recording.values == pytest.approx(WAVES / 2, abs=1e-6)
    assert recording.times is not None
    assert rate_of(recording.times) == pytest.approx(100)
    assert detected(source).kinds == ("audio",)  # unless series are asked for
    asked = detected(source, "series")
    assert (asked.kinds, asked.is_table) == (("series",), False)


def hostile() -> Iterator[tuple[str, bytes, str]]:
    yield "cut", NAMED[:-8].encode(), "row 40 has 2 cells, expected 3"
    yield "words", NAMED.replace("0.327", "0.3x7").encode(), "row 2, column 'ax' has '0.3x7', expected a number"
    yield (
        "falling",
        b"time,ax\n" + b"\n".join(b"%d,1" % n for n in (*range(20), 3)),
        "times in column 'time' go back at row 21",
    )
    yield "manifest", b"path,label\n" + b"a/001.csv,3\n" * 20, "no table of numbers over time"
    yield "text", b"the 3 bears sleep\n" * 20, "no table of numbers over time"
    yield "zeros", bytes(5000), "no table of numbers over time"
    yield "objects", npy(np.array([{}, 1], object)), "an array of objects"
    yield "complex", npy(np.ones(5, complex)), "expected numbers"
    yield "short", npy(WAVES)[:-8], "declared 640 bytes of numbers, found 632"
    lie = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 9), }"
    yield "lie", lie.ljust(127) + b"\n" + bytes(64), "declared 7199999999928 bytes"
    yield "wide", npy(np.ones((5000, 4999))), "4999 columns, expected 4096"
    yield "nothing", b"time,ax\n" + b"\n".join(b"%.2f," % (n / 100) for n in range(20)), "no channel has a value"
    yield (
        "others",
        b"time,bx\n" + b"\n".join(b"%d,1" % n for n in range(20)),
        "columns 'bx'; expected some of 'ax', 'ay'",
    )
    yield "cut sound", wav(WAVES)[:-40], "declared 640 bytes of sound, found 600"
    liar = wav(WAVES).replace(b"data\x80\x02", b"data\xff\xff")
    yield "sound that lies", liar, "declared 65535 bytes of sound, found 640"
    yield "sound without samples", wav(np.empty((0, 2))), "no samples"
    yield "no sound", b"fLaC" + bytes(99), "cannot decode"
    yield "parquet", b"PAR1" + bytes(40) + b"PAR1", "cannot decode the series"


@pytest.mark.parametrize(("data", "fault"), [each[1:] for each in hostile()], ids=[each[0] for each in hostile()])
def test_a_bad_file_is_one_line(data: bytes, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        MODALITY.load(Source("a", data), SPEC, LIMITS)


def test_limits_come_before_memory() -> None:
    with pytest.raises(LimitError, match="text_bytes"):
        MODALITY.load(Source("a", NAMED.encode()), SPEC, Limits(text_bytes=100))
    with pytest.raises(LimitError, match="decoded_bytes"):
        MODALITY.load(Source("a", npy(WAVES)), SPEC, Limits(decoded_bytes=100))
    far = b"time,ax\n" + b"\n".join(b"%.2f,1" % (n / 100) for n in range(20)) + b"\n1e17,1\n"  # ages without a sample
    with pytest.raises(LimitError, match="decoded_bytes"):
        MODALITY.load(Source("a", far), SPEC, LIMITS)
    with pytest.raises(DataError, match="1e-06 samples a second, the model reads 100"):
        MODALITY.load(Source("a", npy(WAVES)), SPEC.model_copy(update={"file_rate_hz": 1e-6}), LIMITS)


def test_missing_samples_and_gaps_are_hidden() -> None:
    rows = [line if n != 3 else line.split(",")[0] + ",nan," for n, line in enumerate(lines().split("\n"))]
    del rows[16:32]  # two patches of eight
    raw = MODALITY.load(Source("a.csv", ("time,ax,ay\n" + "\n".join(rows)).encode()), SPEC, LIMITS)
    assert raw.shape == (NUM_ROWS, 2, 2)
    assert raw[3].tolist() == [[0, 0], [0, 0]]
    assert not raw[16:32].any()
    assert raw[32:, :, 0] == pytest.approx(WAVES[32:])
    values = MODALITY.prepare(raw, SPEC, None).values
    layout = MODALITY.layout(SPEC)
    assert values.shape == layout.prepared_shape == (5, 2 * (8 + 8) + 2)
    assert values[:, -layout.presence :].tolist() == [[0.875] * 2, [1, 1], [0, 0], [0, 0], [1, 1]]
    assert not values[2:4].any()
    assert values[1, :8] == pytest.approx(WAVES[8:16, 0])  # samples of the first channel, then its spectrum
    assert values[1, 16:24] == pytest.approx(WAVES[8:16, 1])


def test_a_channel_that_a_file_lacks_is_missing_and_noted() -> None:
    source = Source("a.csv", b"ay,az\n" + b"\n".join(b"%.3f,1" % y for y in WAVES[:, 1]))
    raw = MODALITY.load(source, SPEC, LIMITS)
    assert not raw[:, 0].any()
    assert raw[:, 1, 0] == pytest.approx(WAVES[:, 1])
    assert source.notes == ["no column 'ax': counted as missing"]
    unnamed = MODALITY.load(Source("a.npy", npy(WAVES)), SPEC, LIMITS)
    assert unnamed[..., 0] == pytest.approx(WAVES)


@pytest.mark.parametrize("rate_hz", [50.0, 100.0, 250.0])
def test_other_rates_and_irregular_times_are_resampled(rate_hz: float) -> None:
    rng = np.random.default_rng(0)
    regular = np.arange(400) / 100
    irregular = np.sort(rng.uniform(0, 4, 1200))
    spec = SPEC.model_copy(update={"rate_hz": rate_hz, "channels": ("ax",), "mean": (0.0,), "std": (1.0,)})
    for times in (regular, irregular):
        text = "time,ax\n" + "\n".join(f"{t:.6f},{np.sin(2 * np.pi * t) + 9.8:.6f}" for t in times)
        raw = MODALITY.load(Source("a.csv", text.encode()), spec, LIMITS)
        assert len(raw) == pytest.approx(4 * rate_hz, abs=0.02 * rate_hz + 2)
        expected = np.sin(2 * np.pi * (times[0] + np.arange(len(raw)) / rate_hz)) + 9.8
        there = raw[:, 0, 1] != 0
        assert there.mean() > 0.9
        assert np.abs(raw[there, 0, 0] - expected[there])[5:-5].max() < 0.1


def test_training_files_settle_everything() -> None:
    files = [f"time,ax,label,ay\n{line_with(7)}", f"time,ax,label,ay\n{line_with(8)}", NAMED]
    sources = [Source(f"{n}.csv", text.encode()) for n, text in enumerate(files)]
    auto = MODALITY.adapt(SeriesSpec(gain="auto", noise="auto"), TrainingSet(3, ("a", "b")))
    spec = MODALITY.resolve(auto, sources, LIMITS)
    assert spec.channels == ("ax", "ay")  # a number of each file is no channel: it may be its class
    assert spec.mean == pytest.approx(WAVES.mean(axis=0), abs=1e-6)
    assert spec.std == pytest.approx(WAVES.std(axis=0), rel=1e-4)
    assert (spec.rate_hz, spec.clip_s, spec.patch, spec.window) == (100.0, pytest.approx(0.4), (1,), 16)
    assert (spec.gain, spec.noise) == (0.2, 0.1)
    assert "2 channels ('ax', 'ay'), 0.4 s at 100 Hz" in MODALITY.in_words(spec)
    assert MODALITY.survey(spec, sources, LIMITS) == ["not read: 'label'", "they last 0.4 s"]
    assert MODALITY.resolve(SeriesSpec(), [], LIMITS).channels == ("channel 1", "channel 2", "channel 3")
    with pytest.raises(DataError, match="no column of the series changes"):
        MODALITY.resolve(SeriesSpec(), [Source("a", npy(np.ones((50, 2))))], LIMITS)


def line_with(label: int) -> str:
    return "\n".join(f"{t},{x},{label},{y}" for t, x, y in (line.split(",") for line in lines().split("\n")))


def test_clips_are_filled_up_and_drawn() -> None:
    raw = MODALITY.load(Source("a", npy(WAVES)), SPEC, LIMITS)
    longer = SPEC.model_copy(update={"clip_s": 0.6})
    assert MODALITY.prepare(raw, longer, None).values[5:].any() == np.False_  # behind the end
    looped = longer.model_copy(update={"short": "loop"})
    assert MODALITY.prepare(raw, looped, None).values[5, :8] == pytest.approx(WAVES[:8, 0])
    shorter = SPEC.model_copy(update={"clip_s": 0.08, "features": "raw"})
    assert MODALITY.prepare(raw, shorter, None).values[0, :8] == pytest.approx(WAVES[16:24, 0])
    assert MODALITY.prepare(raw, shorter, None, 0.05).values[0, :8] == pytest.approx(WAVES[5:13, 0])
    one, same, other = (MODALITY.prepare(raw, shorter, np.random.default_rng(n)).values for n in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    own = MODALITY.prepare(raw * [[[3, 1]]], SPEC.model_copy(update={"scale": "clip"}), None).values
    assert own[:, :8].std() == pytest.approx(1, abs=0.1)
    dropped = MODALITY.prepare(raw, SPEC.model_copy(update={"drop": 0.9}), np.random.default_rng(0)).values
    assert 1 <= (dropped[:, -2:] != 0).any(axis=1).sum() < 5


def test_the_spectrum_finds_a_tone() -> None:
    tone = np.sin(2 * np.pi * STEPS / 4)[:, None]  # a quarter of the rate: the fourth of eight bins
    spec = SPEC.model_copy(update={"channels": ("1",), "mean": (0.0,), "std": (1.0,), "features": "spectrum"})
    values = MODALITY.prepare(MODALITY.load(Source("a", npy(tone)), spec, LIMITS), spec, None).values
    assert values[1:-1, :8].argmax(axis=1).tolist() == [3, 3, 3]
    noise = np.random.default_rng(0).normal(size=(4000, 1))
    wide = spec.model_copy(update={"clip_s": 40.0})
    level = MODALITY.prepare(MODALITY.load(Source("a", npy(noise)), wide, LIMITS), wide, None).values[:, :8]
    assert abs(level.mean()) < 0.3


def test_a_table_is_a_series_only_if_it_is_asked_for_or_stands_alone() -> None:
    with pytest.raises(DataError, match="tiny-points or --preset tiny-series"):
        detected(Source("a.csv", NAMED.encode()))
    assert detected(Source("a.csv", NAMED.encode()), "series").kinds == ("series",)
    many = npy(np.ones((50, 20), np.float32))  # which could be a byte array too
    assert not detected(Source("a.npy", many), "series").holds_rows
    with pytest.raises(DataError):
        detected(Source("a.csv", b"path,label\na.csv,1\nb.csv,2\n"), "series")

    def files(*texts: str) -> list[File]:
        return [looked_at(Source(f"{n}.csv", text.encode())) for n, text in enumerate(texts)]

    assert taker(files(NAMED, NAMED, "x")) == "series"
    assert taker(files(NAMED, lines())) is None  # without names
    assert taker(files("x,y,z\n" + lines())) is None  # which may be points
    assert taker([]) is None


def test_options_that_contradict_the_files() -> None:
    with pytest.raises(DataError, match="no column 'clock' for the times; its columns are 'time', 'ax', 'ay'"):
        MODALITY.load(Source("a", NAMED.encode()), SPEC.model_copy(update={"time": "clock"}), LIMITS)
    for change in (
        {"channels": "auto"},
        {"rate_hz": "auto"},
        {"clip_s": "auto"},
        {"patch": "auto"},
        {"window": "auto"},
    ):
        with pytest.raises(UsageError):
            MODALITY.layout(SPEC.model_copy(update=change))
    with pytest.raises(UsageError, match="samples, expected 16777216 at most"):
        MODALITY.layout(SPEC.model_copy(update={"clip_s": 1e300}))


def test_faults_and_sketches() -> None:
    raw = MODALITY.load(Source("a", npy(WAVES)), SPEC, LIMITS)
    assert MODALITY.fault(raw) is None
    assert MODALITY.fault(raw * 0 + 1) == "constant"
    near = MODALITY.sketch(raw + 0.001, SPEC)
    assert MODALITY.sketch(raw, SPEC) == pytest.approx(near, abs=1e-5)
    assert MODALITY.sketch(raw * 0, SPEC) is None


def test_a_clip_in_a_gap_gives_way_to_the_nearest_with_samples() -> None:
    """Training crashed on it, and prediction answered a clip without any sample."""
    spec = SPEC.model_copy(update={"channels": ("ax",), "mean": (0.0,), "std": (1.0,), "rate_hz": 1.0, "clip_s": 64.0})
    rows = [f"{n},{n % 7}" for n in (*range(100), *range(1000, 1064))]
    raw = MODALITY.load(Source("a.csv", ("time,ax\n" + "\n".join(rows)).encode()), spec, LIMITS)
    assert MODALITY.first_s(raw, spec) == 36  # samples 36 to 99; the middle would be 500
    whole = MODALITY.prepare(raw, spec, None).values
    assert whole == pytest.approx(MODALITY.prepare(raw, spec, None, 36.0).values)
    assert (whole[:, -1] == 1).all()
    assert (MODALITY.prepare(raw, spec, None, 900.0).values[:, -1] == 1).all()
    varied = spec.model_copy(update={"drop": 0.1})
    for seed in range(20):
        assert MODALITY.prepare(raw, varied, np.random.default_rng(seed)).values[:, -1].any()
    assert not MODALITY.prepare(raw[300:400], varied, np.random.default_rng(0)).values.any()  # a window in the gap


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ("a", "b"), "mean": (0.0,)}, "2 of channels, 1 of mean"),
        ({"mean": (0.0, 1.0), "std": (1.0,)}, "2 of mean, 1 of std"),
        ({"patch": (4, 4)}, "patch has 2 numbers, expected one"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeriesSpec.model_validate(options)
    with pytest.raises(UsageError, match="2 of channels, 3 of mean"):  # the files settle the channels
        MODALITY.resolve(SeriesSpec(mean=(0.0, 0.0, 0.0)), [Source("a.csv", NAMED.encode())], LIMITS)


def table(names: str, *columns: Iterable[object]) -> Recording:
    """Return the recording of a CSV, read."""
    source = Source(
        "a.csv", "\n".join([names, *(",".join(map(str, row)) for row in zip(*columns, strict=True))]).encode()
    )
    recording = read_recording(source, LIMITS)
    NOTES[:] = source.notes
    return recording


NOTES: list[str] = []  # of the last table


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        *(
            (name, 1.0)
            for name in ("time_s", "time_seconds", "time_sec", "time sec", "Time [s]", "t(s)", "sec", "times")
        ),
        *((name, 1.0) for name in ("seconds", "second", "timestamp", "ts", "elapsed_time", "Epoch")),
        *((name, 1e-3) for name in ("time_ms", "milliseconds", "millis", "timestamp (ms)", "time_msec")),
        *((name, 1e-6) for name in ("microseconds", "time_micros", "timestamp_microseconds", "t_us", "time_µs")),
        *((name, 1e-9) for name in ("nanoseconds", "time_nanos", "timestamp_ns")),
        *((name, None) for name in ("s", "ms", "timer", "team", "seconds of arc", "dated", "tau")),
    ],
)
def test_names_tell_times_and_their_units(name: str, seconds: float | None) -> None:
    """The s of _seconds was taken for the plural of time, and micros for milliseconds."""
    recording = table(f"{name},a", STEPS * 10, WAVES[:, 0])
    if seconds is None:
        assert (recording.names, recording.times) == ((name, "a"), None)
    else:
        assert recording.times == pytest.approx(STEPS * 10 * seconds)


def test_dates_and_clocks_are_joined() -> None:
    clock = [f"{9 + n // 60}:{n % 60:02d}:05" for n in STEPS]
    minutes = STEPS * 60.0
    for names, *columns in (
        ("time,a", clock),
        ("date,time,a", ["2024-03-05"] * NUM_ROWS, clock),
        ("time,date,a", clock, ["2024/03/05"] * NUM_ROWS),
        (
            "date,time,a",
            [f"2024-03-{5 + n // 20:02d}" for n in STEPS],
            [f"{(23, 0)[n // 20]}:{40 * (n < 20) + n % 20}:00" for n in STEPS],
        ),
        ("time,a", [f"{(23, 0)[n // 20]}:{40 * (n < 20) + n % 20:02d}:00.0" for n in STEPS]),  # midnight
        ("date,time_s,a", ["2024-03-05"] * NUM_ROWS, minutes),
    ):
        recording = table(names, *columns, WAVES[:, 0])
        assert (recording.names, NOTES) == (("a",), [])
        assert recording.times is not None
        assert recording.times - recording.times[0] == pytest.approx(minutes)
    daily = table("date,T", [f"2024-03-{n + 1:02d}" for n in range(30)], range(30))
    assert (daily.names, np.ptp(daily.times)) == (("T",), 29 * 86400)  # type: ignore[arg-type]


def test_times_that_cannot_be_read_are_told() -> None:
    """They were dropped without a word, and each row was a step."""
    for names, *columns in (
        ("time,a", [f"05/03/2024 10:{n:02d}" for n in STEPS]),
        ("date,time,a", ["2024-03-05"] * NUM_ROWS, [f"10:{n:02d} AM" for n in STEPS]),
    ):
        recording = table(names, *columns, WAVES[:, 0])
        assert recording.names == ("a",)
        assert recording.times is None or not np.ptp(recording.times)
        assert NOTES == ["no times are read from 'time', expected numbers, 10:00:05 or 2024-03-05T10:00:05"]
    with pytest.raises(DataError, match="no times in column 'time'; expected numbers, 10:00:05"):
        read_recording(Source("a.csv", b"time,a\n" + b"05/03/2024 10:00,1\n" * 9), LIMITS, "time")


def test_numbers_that_fall_are_no_times_if_their_name_leaves_it_open() -> None:
    falling = 20 - STEPS * 0.5
    assert table("T,a", falling, WAVES[:, 0]).names == ("T", "a")
    assert table("t,a", STEPS // 2, WAVES[:, 0]).names == ("t", "a")  # one letter: each is above the last
    assert table("minute,second,a", STEPS // 20, STEPS % 20, WAVES[:, 0]).names == ("minute", "second", "a")
    assert table("T,a", STEPS, WAVES[:, 0]).names == ("a",)
    with pytest.raises(DataError, match=r"go back at row 2; sort the rows; .* --set inputs\.series\.time=none"):
        table("time,a", falling, WAVES[:, 0])


def test_a_column_without_a_name_is_called_by_its_place() -> None:
    """It was a channel '', with which no run could be read again."""
    assert table(",a,b", STEPS * 3, WAVES[:, 0], WAVES[:, 1]).names == ("a", "b")  # an index with rows left out
    assert table("a,,b", WAVES[:, 0], WAVES[:, 1], STEPS % 3).names == ("a", "column 2", "b")
    rows = b"a,,b\n" + b"\n".join(b"%.2f,%d,3" % (n / 100, n) for n in range(20))
    assert read_recording(Source("a.csv", rows), LIMITS, "column 2").names == ("a", "b")


@pytest.mark.parametrize(("count", "form"), [(20, "%.18e"), (64, "%.6f"), (1000, "%.6f")])
def test_a_table_of_many_columns_is_known_by_a_longer_look(tmp_path: Path, count: int, form: str) -> None:
    """Its first 4096 bytes hold too few rows, or none: it was an unknown format."""
    values = np.random.default_rng(0).normal(size=(20, count))
    path = tmp_path / "a.csv"
    np.savetxt(path, values, form, ",", header=",".join(f"eeg{n}" for n in range(count)), comments="")
    assert detected(Source(str(path)), "series").kinds == ("series",)
    assert taker([File("a.csv", Source(str(path)))]) == "series"


def test_a_moment_that_is_there_twice_is_one_sample() -> None:
    """Each doubled time made the file a sample longer."""
    times = np.insert(STEPS, 20, 19)
    text = "time,ax\n" + "\n".join(f"{t},{n}" for n, t in enumerate(times))
    spec = SPEC.model_copy(update={"rate_hz": 1.0, "clip_s": 8.0})
    raw = MODALITY.load(Source("a.csv", text.encode()), spec, LIMITS)
    assert raw[:, 0, 0].tolist() == [*range(19), *range(20, NUM_ROWS + 1)]


def test_points_part_thousands_where_commas_are_decimal_points() -> None:
    rows = b"a;b\n" + b"1.234,5;2\n999,5;3\n1.234;4\n" * 5
    values = read_recording(Source("a.csv", rows), LIMITS).values
    assert values[:3].tolist() == [[1234.5, 2], [999.5, 3], [1234, 4]]


def test_words_that_begin_like_comments_are_rows() -> None:
    rows = b"state,a\n" + b"ok,1\n!low,2\n%,3\n# rest,4\n" * 5
    assert read_recording(Source("a.csv", rows), LIMITS).values[:3, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("writer", ["new_file", "new_stream"])
def test_arrow_says_its_size_before_it_is_unpacked(compression: str | None, writer: str) -> None:
    """A file of some KB grew by 166 MB before its size was looked at."""
    pyarrow = pytest.importorskip("pyarrow")
    ipc = pytest.importorskip("pyarrow.ipc")
    batch = pyarrow.record_batch({"time": np.arange(50_000.0), "ax": np.zeros(50_000), "note": ["a"] * 50_000})
    file = io.BytesIO()
    with getattr(ipc, writer)(file, batch.schema, options=ipc.IpcWriteOptions(compression=compression)) as written:
        written.write_batch(batch)
    source = Source("a.arrow", file.getvalue())
    assert read_recording(source, LIMITS).values.shape == (50_000, 1)
    with pytest.raises(LimitError, match=r"a\.arrow.*: 1,?0\d\d,?\d\d\d decoded bytes"):
        read_recording(source, Limits(decoded_bytes=900_000))
    damaged = bytearray(source.read(LIMITS))
    damaged[40:400] = bytes(360)
    with pytest.raises(DataError):
        read_recording(Source("a.arrow", bytes(damaged)), LIMITS)
