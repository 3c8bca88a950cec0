"""Sound: what is decoded is what was recorded, hostile headers cost nothing, features mean what they say."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from perceiver_cli.errors import AbsentError, DataError, LimitError, UsageError
from perceiver_cli.preprocess.audio import MODALITY as AUDIO, AudioSpec
from perceiver_cli.preprocess.base import ByteArray
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import decode, detect

RATE = 16_000
LIMITS = Limits()
TIME = np.arange(RATE) / RATE
SINE = (0.5 * np.sin(2 * np.pi * 440 * TIME)).astype(np.float32)


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = "PCM_16", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def load(data: bytes, limits: Limits = LIMITS, **spec: object) -> np.ndarray:
    return AUDIO.load(Source("x.wav", data), AudioSpec.model_validate({"rate_hz": RATE, **spec}), limits)


def prepare(raw: np.ndarray, seed: int | None = None, **spec: object) -> np.ndarray:
    rng = None if seed is None else np.random.default_rng(seed)
    made = AUDIO.prepare(raw, AudioSpec.model_validate(spec), rng)
    assert isinstance(made, ByteArray)
    assert made.positions is None
    assert made.values.dtype == np.float32
    return made.values


def refused(data: bytes, limits: Limits = LIMITS, **spec: object) -> DataError:
    """Return the DataError that `data` meets, which is one line, quick and takes next to no memory."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(DataError) as caught:
            load(data, limits, **spec)
        assert time.perf_counter() - start < 0.5
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("'x.wav': ")
    return caught.value


# ---------------------------------------------------------------- decoding

FORMATS = [
    # Format, subtype, largest error. Lossy ones are judged by correlation instead (None).
    ("WAV", "PCM_16", 1e-4),
    ("WAV", "PCM_24", 1e-6),
    ("WAV", "PCM_32", 1e-7),
    ("WAV", "PCM_U8", 1e-2),
    ("WAV", "FLOAT", 0.0),
    ("WAV", "DOUBLE", 0.0),
    ("WAV", "ULAW", 2e-2),
    ("WAV", "ALAW", 2e-2),
    ("WAVEX", "PCM_16", 1e-4),
    ("RF64", "PCM_16", 1e-4),
    ("FLAC", "PCM_16", 1e-4),
    ("FLAC", "PCM_24", 1e-6),
    ("AIFF", "PCM_16", 1e-4),
    ("AU", "PCM_16", 1e-4),
    ("CAF", "PCM_16", 1e-4),
    ("OGG", "VORBIS", None),
    ("OGG", "OPUS", None),
    ("MP3", "MPEG_LAYER_III", None),
]


@pytest.mark.parametrize(("kind", "subtype", "error"), FORMATS)
def test_every_format_decodes_to_what_was_written(kind: str, subtype: str, error: float | None) -> None:
    data = encoded(SINE, kind, subtype)
    assert detect(Source("no-name", data)) == "audio"
    found = load(data)
    assert found.dtype == np.float32
    assert found.shape == SINE.shape
    if error is None:
        assert np.corrcoef(found[400:-400], SINE[400:-400])[0, 1] > 0.99
    else:
        assert np.abs(found - SINE).max() <= error


def test_the_same_from_a_file_as_from_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "ü\udcff.wav"
    path.write_bytes(encoded(SINE))
    spec = AudioSpec(rate_hz=RATE)
    assert np.array_equal(AUDIO.load(Source(str(path)), spec, LIMITS), load(path.read_bytes()))


def test_integers_scale_to_full_scale_one() -> None:
    data = encoded(np.array([-32768, -16384, 0, 16384, 32767], np.int16))
    assert load(data).tolist() == [-1.0, -0.5, 0.0, 0.5, 32767 / 32768]


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_resampling_keeps_frequency_amplitude_and_duration(rate: int) -> None:
    found = load(encoded(SINE, subtype="FLOAT"), rate_hz=rate)
    assert abs(len(found) - rate) <= 1
    middle = found[len(found) // 4 : len(found) // 4 + rate // 2]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 18))
    assert abs(spectrum.argmax() * rate / (1 << 18) - 440) < 0.5
    assert abs(middle.std() * np.sqrt(2) - 0.5) < 0.005
    assert np.array_equal(found, load(encoded(SINE, subtype="FLOAT"), rate_hz=rate))


def test_channels_are_chosen_or_averaged() -> None:
    data = encoded(np.stack([SINE, -0.5 * SINE, 0 * SINE], 1), subtype="FLOAT")
    assert np.array_equal(load(data, channel=1), -0.5 * SINE)
    assert np.allclose(load(data, channel="mix"), SINE / 6, atol=1e-7)
    assert "no channel 3, found 3 channel" in str(refused(data, channel=3))


def test_sound_longer_than_a_block_is_whole() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (200_001, 2)).astype(np.float32)
    found = load(encoded(noise, subtype="FLOAT"))
    assert np.allclose(found, noise.mean(1), atol=1e-7)


def test_silence_is_fine_and_nothing_is_not() -> None:
    assert not load(encoded(0 * SINE)).any()
    assert "no samples" in str(refused(encoded(SINE[:0])))
    with pytest.raises(UsageError, match="rate_hz"):
        load(encoded(SINE), rate_hz="auto")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"RIFF\0\0\0\0WAVEfmt ", True),
        (b"RIFF\0\0\0\0WEBPVP8 ", False),
        (b"FORM\0\0\0\0AIFC", True),
        (b"FORM\0\0\0\0ILBM", False),
        (b"ID3\x04", True),
        (b"\xff\xfb\x90\x64", True),
        (b"\xff\xf3\x40\xc4", True),
        (b"\xff\xfb\xf0\x64", False),  # no such bitrate
        (b"\xff\xeb\x90\x64", False),  # no such version
        (b"\xff\xfev\0", False),  # UTF-16
        (b"\xff\xd8\xff\xe0", False),  # JPEG
        (b"", False),
    ],
)
def test_sniff(head: bytes, expected: bool) -> None:
    assert AUDIO.sniff(head, "a.wav") is expected


# ---------------------------------------------------------------- spans and windows

NOISE = (0.1 * np.random.default_rng(0).normal(size=100_001)).astype(np.float32)  # 6.25 s
LONG = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


@pytest.mark.parametrize("rate", [RATE, 44_100, 8_000])
@pytest.mark.parametrize(("kind", "subtype"), LONG)
def test_spans_and_windows_are_parts_of_the_whole(
    kind: str, subtype: str, rate: int, capfd: pytest.CaptureFixture
) -> None:
    source = Source("x", encoded(NOISE, kind, subtype))
    spec = AudioSpec(rate_hz=rate)
    whole = AUDIO.load(source, spec, LIMITS)
    assert abs(AUDIO.duration_s(source, LIMITS) - len(whole) / rate) < 0.001
    for start, length in ((0.0, 1.0), (0.5, 1.28), (2.3456, 0.1), (5.5, 9.0)):
        part = AUDIO.load(source, spec, LIMITS, (start, length))
        expected = whole[round(start * rate) :][: round(length * rate)]
        assert part.shape == expected.shape
        assert np.abs(part - expected).max() < 1e-6
    windows = list(AUDIO.windows(source, spec, LIMITS, 2.0, 1.5))
    assert [round(start, 2) for start, _ in windows] == [0.0, 1.5, 3.0, round(len(whole) / rate - 2, 2)]
    for start, window in windows:
        assert np.abs(window - whole[round(start * rate) :][: 2 * rate]).max() < 1e-6
    assert capfd.readouterr().err == ""


def test_a_file_without_a_length_is_counted() -> None:
    assert AUDIO.duration_s(Source("x", flac_with_total(0)), LIMITS) == pytest.approx(0.1)
    assert np.array_equal(
        load(flac_with_total(0))[800:],
        AUDIO.load(Source("x", flac_with_total(0)), AudioSpec(rate_hz=RATE), LIMITS, (0.05, 9.0)),
    )
    with pytest.raises(LimitError, match="audio_seconds"):
        AUDIO.duration_s(Source("x", WAV), Limits(audio_seconds=0.05))


def test_a_short_file_is_one_window_and_an_empty_one_none() -> None:
    ((start, window),) = AUDIO.windows(Source("x", WAV), AudioSpec(rate_hz=RATE), LIMITS, 5.0, 1.0)
    assert start == 0
    assert np.array_equal(window, load(WAV))
    with pytest.raises(DataError, match="no samples"):
        list(AUDIO.windows(Source("x", encoded(SINE[:0])), AudioSpec(rate_hz=RATE), LIMITS, 1.0, 1.0))
    with pytest.raises(DataError, match="no samples at 3 s"):
        AUDIO.load(Source("x", WAV), AudioSpec(rate_hz=RATE), LIMITS, (3.0, 1.0))
    with pytest.raises(DataError, match=r"found 0.1 of 0.3125 s of sound"):
        list(AUDIO.windows(Source("x", flac_with_total(5000)), AudioSpec(rate_hz=RATE), LIMITS, 0.05, 0.05))


def test_windows_of_a_long_file_take_no_more_memory_than_one() -> None:
    source = Source("x", encoded(np.zeros((RATE * 600, 1), np.int16), "FLAC", None))
    tracemalloc.start()
    try:
        count = sum(1 for _ in AUDIO.windows(source, AudioSpec(rate_hz=RATE), Limits(decoded_bytes=1), 2.0, 1.0))
        assert count == 599
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # of 38 MB
    finally:
        tracemalloc.stop()


def test_a_clip_begins_where_it_is_asked_to() -> None:
    ramp = np.arange(1000, dtype=np.float32)
    spec = AudioSpec(rate_hz=1000, clip_s=0.1, patch=(10,))

    def clip(samples: np.ndarray, start_s: float, **changes: object) -> list[float]:
        changed = spec.model_copy(update=changes)
        made = AUDIO.prepare(samples, changed, np.random.default_rng(0), start_s).values.ravel().tolist()
        assert made == AUDIO.prepare(samples, changed, None, start_s).values.ravel().tolist()
        return made

    assert clip(ramp, 0.25) == list(range(250, 350))
    assert clip(ramp, 9.0) == list(range(900, 1000))
    assert clip(ramp[:60], 0.02) == [*range(20, 60), *range(60), 0][:100]
    assert clip(ramp[:60], 0.02, short="pad") == [*range(20, 60), *[0] * 60]
    assert clip(ramp[:60], 0.5, short="pad") == [0] * 100


# ---------------------------------------------------------------- the sound of videos


def video(
    kind: str, codec: str, samples: np.ndarray = NOISE[:48_000], delay_s: float = 0.0, pictures: str = "mpeg4"
) -> bytes:
    """Return a video with sound of 48 kHz that begins `delay_s` after the picture."""
    path = io.BytesIO()
    with av.open(path, "w", format=kind) as file:
        if pictures:
            picture = file.add_stream(pictures, rate=25)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = file.add_stream(codec, rate=48_000, layout="stereo")
        if pictures:
            for _ in range(25):
                file.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
            file.mux(picture.encode(None))
        context = sound.codec_context
        cut = av.AudioResampler(format=context.format.name, rate=48_000, frame_size=context.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(np.stack([samples, samples]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, round(delay_s * 48_000)
        for part in [*cut.resample(frame), *cut.resample(None)]:
            file.mux(sound.encode(part))
        file.mux(sound.encode(None))
    return path.getvalue()


VIDEOS = [
    # Container, codec, how far samples may be from the original (None: judged by correlation).
    ("mov", "pcm_s16le", 1e-4),
    ("matroska", "flac", 1e-4),
    ("avi", "pcm_s16le", 1e-4),
    ("mp4", "aac", None),
    ("matroska", "libopus", None),
    ("mpeg", "mp2", None),
    ("mpegts", "aac", None),
    ("ipod", "aac", None),
]


@pytest.mark.parametrize(("kind", "codec", "error"), VIDEOS)
def test_sound_of_videos_is_what_was_written(kind: str, codec: str, error: float | None) -> None:
    pictures = {"ipod": "", "mpeg": "mpeg1video"}.get(kind, "mpeg4")
    tone = (0.3 * np.sin(np.linspace(0, 600, 48_000) ** 1.5)).astype(np.float32)  # a chirp: in place nowhere but once
    source = Source("x", video(kind, codec, tone, pictures=pictures))
    assert detect(source) == ("audio" if kind == "ipod" else "video")
    spec = AudioSpec(rate_hz=48_000)
    found = decode(source, spec, LIMITS)
    assert found.dtype == np.float32
    assert abs(len(found) - 48_000) < 2000
    assert abs(AUDIO.duration_s(source, LIMITS) - 1) < 0.05
    if error is not None:
        assert np.abs(found[:48_000] - tone).max() < error
    else:  # MPEG streams do not tell of the silence that a codec begins with
        late = {"mpeg": 481, "mpegts": 1024}.get(kind, 0)
        assert np.corrcoef(found[late + 2000 : late + 40_000], tone[2000:40_000])[0, 1] > 0.98
    windows = list(AUDIO.windows(source, spec, LIMITS, 0.4, 0.3))
    assert all(np.array_equal(window, found[round(t * 48_000) :][: len(window)]) for t, window in windows)
    part = AUDIO.load(source, spec, LIMITS, (0.5, 0.2))
    assert len(part) == 9600
    near = max(np.corrcoef(part, found[24_000 + k :][:9600])[0, 1] for k in range(-48, 49))  # MKV: whole milliseconds
    assert near > 0.999


def test_sound_keeps_its_place_beside_the_picture() -> None:
    found = AUDIO.load(Source("x", video("mov", "pcm_s16le", delay_s=0.3)), AudioSpec(rate_hz=48_000), LIMITS)
    assert not found[:14_400].any()
    assert np.abs(found[14_400:] - NOISE[:48_000]).max() < 1e-4
    part = AUDIO.load(
        Source("x", video("mov", "pcm_s16le", delay_s=0.3)), AudioSpec(rate_hz=48_000), LIMITS, (0.2, 0.2)
    )
    assert np.array_equal(part, found[9600:19_200])


def test_channels_rates_and_limits_of_videos() -> None:
    source = Source("x", video("mov", "pcm_s16le"))
    assert np.array_equal(
        AUDIO.load(source, AudioSpec(rate_hz=48_000, channel=1), LIMITS), AUDIO.load(source, AudioSpec(), LIMITS)
    )
    assert AUDIO.resolve(AudioSpec(rate_hz="auto", max_auto_rate_hz=96_000), [source], LIMITS).rate_hz == 48_000
    assert len(AUDIO.load(source, AudioSpec(rate_hz=16_000), LIMITS)) == 16_000
    cases: list[tuple[dict[str, object], Limits, str]] = [
        ({"channel": 2}, LIMITS, "no channel 2, found 2"),
        ({}, Limits(audio_seconds=0.5), "--limit audio_seconds="),
        ({}, Limits(decoded_bytes=1000), "--limit decoded_bytes="),
        ({}, Limits(audio_channels=1), "--limit audio_channels=2"),
    ]
    for spec, limits, message in cases:
        with pytest.raises(DataError, match=message):
            AUDIO.load(source, AudioSpec.model_validate({"rate_hz": 48_000, **spec}), limits)


def test_a_video_without_sound_says_so() -> None:
    path = io.BytesIO()
    with av.open(path, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        file.mux(stream.encode(None))
    calls: list[Callable[[Source], object]] = [
        lambda source: AUDIO.load(source, AudioSpec(), LIMITS),
        lambda source: AUDIO.duration_s(source, LIMITS),
        lambda source: list(AUDIO.windows(source, AudioSpec(), LIMITS, 1, 1)),
    ]
    for call in calls:
        with pytest.raises(AbsentError, match="no sound in it"):
            call(Source("x", path.getvalue()))


# ---------------------------------------------------------------- rate "auto"


def at_rate(rate: int, samples: int = 100) -> Source:
    return Source(f"{rate}", encoded(SINE[:samples], rate=rate))


BAD = Source("bad", b"RIFF\0\0\0\0WAVEnothing")


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ([8_000] * 4, 8_000),
        (
            [8_000] * 21 + [16_000] * 20 + [22_050] * 20 + [44_100] * 20 + [48_000] * 19,
            16_000,
        ),  # 8 kHz is the commonest
        ([8_000] * 18 + [44_100] * 2, 8_000),  # a tenth loses
        ([8_000] * 17 + [44_100] * 3, 16_000),
        ([8_000] * 17 + [11_025] * 3, 11_025),
    ],
)
def test_auto_rate_cuts_a_tenth_of_the_files_at_most(rates: list[int], chosen: int) -> None:
    spec = AudioSpec(rate_hz="auto", max_auto_rate_hz=16_000)
    assert AUDIO.resolve(spec, [*map(at_rate, rates), BAD], LIMITS).rate_hz == chosen


def test_auto_rate_without_a_choice() -> None:
    assert AUDIO.resolve(AudioSpec(rate_hz=11_025), [at_rate(8_000)], LIMITS).rate_hz == 11_025
    with pytest.raises(DataError, match="bad"):
        AUDIO.resolve(AudioSpec(rate_hz="auto"), [BAD], LIMITS)


def test_words_say_what_is_read_and_what_files_are() -> None:
    spec = AudioSpec(features="mel", rate_hz=16_000, clip_s=0.01, patch=(1, 1))
    assert AUDIO.in_words(spec) == "0.01 s at 16 kHz, 64 mel bands"
    assert AUDIO.in_words(AudioSpec(channel=1)) == "1.28 s at 48 kHz, raw samples, channel 1"
    sources = [at_rate(8_000), at_rate(11_025), at_rate(16_000), at_rate(44_100, 4_410), BAD]
    assert AUDIO.survey(spec, sources, LIMITS) == [
        "50 % of 4 files are 8 to 11.025 kHz",
        "25 % are 44.1 kHz",
        "they last 0.00625 s to 0.1 s, 50 % are longer than the clip",
    ]
    assert AUDIO.survey(spec, [at_rate(16_000)], LIMITS) == ["they last 0.00625 s"]
    assert AUDIO.survey(spec, [BAD], LIMITS) == []


# ---------------------------------------------------------------- layout and clips


def test_paper_raw_audio_is_480_by_128() -> None:
    spec = AudioSpec()
    layout = AUDIO.layout(spec)
    assert (layout.grid, layout.channels, layout.dims, layout.max_resolution) == ((480,), 128, 1, (480.0,))
    ramp = np.arange(61_440, dtype=np.float32)
    values = AUDIO.prepare(ramp, spec, None).values
    assert values.shape == (480, 128)
    assert np.array_equal(values.ravel(), ramp)


def test_mel_layout_counts_whole_frames() -> None:
    spec = AudioSpec(features="mel", rate_hz=8_000, clip_s=2.0, patch=(2, 8), num_mels=64)
    layout = AUDIO.layout(spec)
    assert (layout.grid, layout.channels, layout.dims) == ((99, 8), 16, 2)  # 1 + (16000 - 200) // 80 = 198 frames
    assert AUDIO.prepare(SINE, spec, None).values.shape == (99, 8, 16)


@pytest.mark.parametrize(
    "spec",
    [
        {"clip_s": 0.001},  # shorter than a patch
        {"features": "mel", "patch": (1, 1), "clip_s": 0.02},  # than a window
        {"features": "mel", "patch": (1000, 1)},
        {"features": "mel", "patch": (1, 1), "rate_hz": 1000, "min_hz": 600.0},
        {"max_resolution": (10.0, 10.0)},
        {"rate_hz": "auto"},
    ],
)
def test_layouts_that_cannot_be(spec: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        AUDIO.layout(AudioSpec.model_validate(spec))


def test_window_is_central_or_random() -> None:
    ramp = np.arange(1000, dtype=np.float32)
    shape = {"rate_hz": 1000, "clip_s": 0.1, "patch": (10,)}
    assert prepare(ramp, **shape).ravel().tolist() == list(range(450, 550))
    starts = {float(prepare(ramp, seed, **shape)[0, 0]) for seed in range(50)}
    assert len(starts) > 40
    assert min(starts) >= 0
    assert max(starts) <= 900
    last = prepare(ramp[:101], 0, **shape).ravel()
    assert np.array_equal(np.diff(last), np.ones(99))


def test_short_sound_is_repeated_or_padded() -> None:
    short = np.arange(1, 31, dtype=np.float32)
    shape = {"rate_hz": 1000, "clip_s": 0.1, "patch": (10,)}
    assert prepare(short, **shape).ravel().tolist() == (list(range(1, 31)) * 4)[:100]
    padded = prepare(short, short="pad", **shape).ravel()
    assert padded.tolist() == [*range(1, 31), *[0] * 70]
    looped = prepare(short, 3, **shape).ravel()
    assert set(looped.tolist()) == set(range(1, 31))
    assert len({float(prepare(short, seed, **shape)[0, 0]) for seed in range(50)}) > 20
    placed = [prepare(short, seed, short="pad", **shape).ravel() for seed in range(20)]
    assert all(clip.sum() == short.sum() for clip in placed)
    assert len({int(clip.argmax()) for clip in placed}) > 10


def test_gain_is_uniform_in_decibels_and_only_in_training() -> None:
    one = np.ones(100, np.float32)
    shape = {"rate_hz": 1000, "clip_s": 0.1, "patch": (100,), "gain_db": 20.0}
    assert prepare(one, **shape).max() == 1
    gains = np.array([20 * np.log10(prepare(one, seed, **shape)[0, 0]) for seed in range(400)])
    assert np.abs(gains).max() <= 20.0001
    assert abs(gains.mean()) < 4 * 40 / np.sqrt(12 * 400)
    assert abs(gains.std() - 40 / np.sqrt(12)) < 1.5


# ---------------------------------------------------------------- mel

MEL = {"features": "mel", "rate_hz": RATE, "clip_s": 0.5, "patch": (1, 1), "num_mels": 40}


def centres_hz(mels: int = 40, low: float = 20.0, high: float = RATE / 2) -> np.ndarray:
    edges = np.linspace(*(2595 * np.log10(1 + np.array([low, high]) / 700)), mels + 2)
    return 700 * (10 ** (edges[1:-1] / 2595) - 1)


@pytest.mark.parametrize("hz", [150, 440, 1000, 3000, 7000])
def test_a_sine_peaks_in_its_own_band(hz: float) -> None:
    values = prepare(np.sin(2 * np.pi * hz * TIME).astype(np.float32), **MEL)[:, :, 0]
    expected = np.abs(np.log(centres_hz() / hz)).argmin()
    assert (np.abs(values.argmax(1) - expected) <= 1).all()


def test_mel_is_standardised_and_independent_of_level() -> None:
    noise = (0.3 * np.random.default_rng(0).normal(size=RATE)).astype(np.float32)
    values = prepare(noise, **MEL)
    assert abs(values.mean()) < 1e-5
    assert abs(values.std() - 1) < 1e-5
    assert np.abs(prepare(0.1 * noise, **MEL) - values).max() < 1e-3
    assert not prepare(0 * noise, **MEL).any()
    assert np.isfinite(prepare(noise * np.float32(1e10), **MEL)).all()


def test_every_band_sees_white_noise_alike() -> None:
    # 128 bands at 8 kHz lie closer than the bins of the transform: a filter without a bin would stand out.
    from perceiver_cli.preprocess.mel import mel_filters

    taper, filters = mel_filters(8_000, 200, 128, 20.0)
    assert len(filters) == 128
    assert max(abs(weights.sum() - 1) for _, weights in filters) < 0.35
    assert all(first >= 0 and first + len(weights) <= 129 for first, weights in filters)
    sine = np.sin(2 * np.pi * 1000 * np.arange(200) / 8_000)
    assert abs((np.abs(np.fft.rfft(sine * taper, 256)) ** 2).max() - 1) < 0.01  # full scale is power 1


def test_specaugment_masks_to_the_mean_within_its_share() -> None:
    masks = {"time_masks": 2, "time_mask_share": 0.25, "frequency_masks": 1, "frequency_mask_share": 0.25}
    noise = np.random.default_rng(0).normal(size=RATE // 2).astype(np.float32)
    plain = prepare(noise, **MEL)[:, :, 0]
    assert np.array_equal(prepare(noise, **MEL, **masks)[:, :, 0], plain)  # not in evaluation
    frames, bands = [], []
    for seed in range(100):
        values = prepare(noise, seed, **MEL, **masks)[:, :, 0]
        masked = values != plain
        assert not values[masked].any()
        frames.append(int(masked.all(1).sum()))
        bands.append(int(masked.all(0).sum()))
    assert max(frames) <= 2 * int(0.25 * plain.shape[0])
    assert max(bands) == int(0.25 * plain.shape[1])
    assert min(bands) == 0
    assert np.array_equal(prepare(noise, 5, **MEL, **masks), prepare(noise, 5, **MEL, **masks))
    assert not np.array_equal(prepare(noise, 5, **MEL, **masks), prepare(noise, 6, **MEL, **masks))


# ---------------------------------------------------------------- hostile and odd files

WAV = encoded(SINE[:1600])
FLAC = encoded(SINE[:1600], "FLAC", None)


def with_sizes(data: bytes, data_bytes: int, riff_bytes: int | None = None) -> bytes:
    riff = data[4:8] if riff_bytes is None else struct.pack("<I", riff_bytes)
    return data[:4] + riff + data[8:40] + struct.pack("<I", data_bytes) + data[44:]


def flac_with_total(total: int) -> bytes:
    data = bytearray(FLAC)
    data[21] = data[21] & 0xF0 | total >> 32
    data[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize("riff", [None, 0, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_streamed_wav_decodes_fully(size: int, riff: int | None) -> None:
    assert np.array_equal(load(with_sizes(WAV, size, riff)), load(WAV))


def test_an_empty_data_chunk_before_another_is_empty() -> None:
    note = b"LIST" + struct.pack("<I", 20) + b"INFOISFT" + struct.pack("<I", 8) + b"written\0"
    assert "no samples" in str(refused(with_sizes(WAV, 0, 64)[:44] + note))
    assert len(load(WAV + note)) == 1600


@pytest.mark.parametrize("size", [3201, 5000, 0xFFFFFFF0])
def test_wav_that_claims_more_than_it_holds(size: int) -> None:
    assert f"declared {size} bytes of sound, found 3200" in str(refused(with_sizes(WAV, size)))


@pytest.mark.parametrize("kind", ["WAV", "RF64", "FLAC", "AIFF", "AU", "CAF", "MP3"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(SINE, kind, None)
    refused(data[: len(data) * 2 // 3])


def test_rf64_with_a_false_length() -> None:
    data = bytearray(encoded(SINE[:1600], "RF64", None))
    at = data.index(b"ds64") + 16
    data[at : at + 8] = struct.pack("<Q", 10**12)
    assert "declared 1000000000000 bytes" in str(refused(bytes(data)))


def test_flac_with_a_false_length_is_refused_by_the_limit() -> None:
    error = refused(flac_with_total(2**36 - 1))
    assert isinstance(error, LimitError)
    assert "--limit audio_seconds=4294968 " in str(error)
    assert "found 0.1 of 0.3125 s of sound" in str(refused(flac_with_total(5000)))


def test_flac_of_unknown_length_decodes_up_to_the_limit() -> None:
    assert np.array_equal(load(flac_with_total(0)), load(FLAC))
    assert "audio_seconds" in str(refused(flac_with_total(0), Limits(audio_seconds=0.05)))


def test_limits_are_checked_before_decoding() -> None:
    long = encoded(np.zeros(RATE * 60, np.int16), "FLAC", None)
    assert "--limit audio_seconds=60 " in str(refused(long, Limits(audio_seconds=59.5)))
    assert "decoded_bytes" in str(refused(long, Limits(decoded_bytes=1 << 20)))
    assert "decoded_bytes" in str(refused(long, Limits(decoded_bytes=8 << 20), rate_hz=192_000))  # once resampled
    assert "file_bytes" in str(refused(long, Limits(file_bytes=100)))
    wide = encoded(np.zeros((10, 65), np.int16))
    assert "--limit audio_channels=65 " in str(refused(wide))
    assert len(load(wide, Limits(audio_channels=65))) == 10


@pytest.mark.parametrize("rate", [999, 768_001, 2**31 - 1])
def test_rates_that_no_recorder_has(rate: int) -> None:
    assert "sample rate" in str(refused(WAV[:24] + struct.pack("<I", rate) + WAV[28:]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_not_finite(bad: float, channels: int) -> None:
    samples = np.zeros((1000, channels), np.float32)
    samples[500] = bad
    refused(encoded(samples, subtype="FLOAT"))
    refused(encoded(samples, subtype="FLOAT"), rate_hz=8_000)


def test_mp3_that_declares_no_length_is_read_as_it_is() -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    soundfile.write(file, noise, RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5)
    data = file.getvalue()
    stripped = data[data.index(data[:2], 4) :]  # without the first frame, which holds the Xing header
    assert b"Info" not in stripped
    assert b"Xing" not in stripped
    assert len(load(stripped)) >= RATE


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
def test_mutants_give_an_array_or_a_data_error(kind: str, subtype: str | None, capfd: pytest.CaptureFixture) -> None:
    data = encoded(SINE[:4000], kind, subtype)
    rng = np.random.default_rng(1)
    good, messages = 0, []
    for trial in range(50):
        mutant = bytearray(data)
        region = 200 if trial % 2 else len(mutant)  # headers are small, and matter most
        for at in rng.integers(0, region, rng.integers(1, 5)):
            mutant[at] = rng.integers(256)
        if trial % 5 == 0:
            del mutant[rng.integers(len(mutant)) :]
        try:
            found = load(bytes(mutant))
        except DataError as error:
            messages.append(str(error))
        else:
            good += 1
            assert found.ndim == 1
            assert found.size > 0
            assert np.isfinite(found).all()
            assert np.isfinite(prepare(found, 0, **MEL)).all()
    assert good > 5 or kind in ("FLAC", "OGG")  # these have checksums
    assert messages
    assert not any("\n" in message for message in messages)
    assert "Traceback" not in capfd.readouterr().err
