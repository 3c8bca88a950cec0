"""Sounds beside those of test_audio.py, and sounds whose length is hard to know: all is read, or both figures told."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
import soundfile

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.audio import MODALITY as AUDIO, AudioSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import detect, lack

LIMITS = Limits()
RATE = 16_000
TIME = np.arange(RATE * 10) / RATE
# A loud half, then silence: with a variable bit rate the first frames say nothing about the rest.
SOUND = np.where(TIME < 5, 0.3 * np.random.default_rng(0).normal(size=len(TIME)).clip(-3, 3), 0).astype(np.float32)
SINE = (0.4 * np.sin(2 * np.pi * 440 * TIME[: RATE * 3])).astype(np.float32)


def written(samples: np.ndarray, kind: str, subtype: str | None = None, rate: int = RATE, **more: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype, **more)
    return file.getvalue()


def mp3(samples: np.ndarray = SOUND, mode: str = "VARIABLE") -> tuple[bytes, bytes]:
    """Return an MP3 with the header that declares its length, and without it."""
    data = written(samples, "MP3", bitrate_mode=mode, compression_level=0.5)
    return data, data[data.index(data[:2], 4) :]


def muxed(form: str, codec: str, rate: int = RATE, **options: str) -> bytes:
    """Return SINE as FFmpeg writes it."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64_000
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate, frame_size=size)
        frame = av.AudioFrame.from_ndarray(SINE[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for each in resampler.resample(frame) + resampler.resample(None):
            out.mux(stream.encode(each))
        out.mux(stream.encode(None))
    return file.getvalue()


def load(data: bytes, name: str = "x", **spec: object) -> np.ndarray:
    return AUDIO.load(Source(name, data), AudioSpec.model_validate({"rate_hz": RATE, **spec}), LIMITS)


def refused(data: bytes, name: str = "x") -> str:
    with pytest.raises(DataError) as caught:
        load(data, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, "av")


def is_all_of(found: np.ndarray, samples: np.ndarray) -> bool:
    """Return whether a lossy copy has the length of `samples` and the energy of each second of it."""
    if not 0 <= len(found) - len(samples) < 0.2 * RATE:
        return False
    seconds = (found[: len(samples)].reshape(-1, RATE), samples.reshape(-1, RATE))
    found_rms, rms = (np.sqrt((each**2).mean(1)) for each in seconds)
    return bool(np.abs(found_rms - rms).max() < 0.1)


# ---------------------------------------------------------------- the length of an MP3

TAG = b"ID3\x04\0\0\0\0\x20\0" + b"APIC\0\0\x0f\xf6\0\0" + b"\xff\xd8\xff\xe0picture".ljust(4086, b"\x41")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("no Xing header", mp3()[1]),
        ("tags", TAG + mp3()[1]),
        ("tags twice", TAG + TAG + mp3()[1]),
        ("tags at the end", mp3()[1] + b"TAG".ljust(128, b"\0")),
        ("large tags at the end", mp3()[1] + b"APETAGEX".ljust(9000, b"\x20")),
        ("zeros in front.mp3", bytes(3000) + mp3()[1]),
        ("more zeros in front.MP3", bytes(300_000) + mp3()[0]),
        ("cut from a stream.mp3", mp3()[1][100:]),
        ("header with tags", TAG + mp3()[0]),
        ("header without a count", mp3()[0].replace(b"Xing\0\0\0\x0f", b"Xing\0\0\0\x0e")),
    ],
)
def test_an_mp3_is_read_to_its_end(name: str, data: bytes) -> None:
    source = Source(name, data)
    assert detect(source) == "audio"
    found = load(data, name)
    assert is_all_of(found, SOUND)
    assert abs(AUDIO.duration_s(source, LIMITS) - len(found) / RATE) < 0.1
    part = AUDIO.load(source, AudioSpec(rate_hz=RATE), LIMITS, (3.0, 4.0))
    assert np.abs(part - found[3 * RATE : 7 * RATE]).max() < 1e-5
    windows = list(AUDIO.windows(source, AudioSpec(rate_hz=RATE), LIMITS, 2.0, 2.0))
    assert len(windows) in (5, 6)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("between", [b"", TAG])
def test_joined_mp3s_are_read_to_the_end_of_the_last(first: int, between: bytes) -> None:
    found = load(mp3()[first] + between + mp3()[0])
    assert 2 * len(SOUND) <= len(found) <= 2 * len(SOUND) + 0.5 * RATE
    assert np.sqrt((found[11 * RATE : 14 * RATE] ** 2).mean()) > 0.2


def test_an_mp3_that_declares_more_than_it_holds_is_refused() -> None:
    data = mp3()[0]
    assert f"declared {len(data)} bytes of sound, found 15000" in refused(data[:15_000])
    at = data.index(b"Xing")
    counts = (
        data[: at + 4] + b"\0\0\0\x01" + struct.pack(">I", 1000) + data[at + 12 :]
    )  # frames alone, three times too many
    assert "of 35.97 s of sound: truncated or damaged" in refused(counts)


def test_a_constant_bit_rate_is_read_by_libsndfile_with_and_without_pyav(request: pytest.FixtureRequest) -> None:
    data = mp3(mode="CONSTANT")[1]
    with_av = load(data)
    request.getfixturevalue("without_av")
    assert np.array_equal(load(data), with_av)
    assert is_all_of(with_av, SOUND)


@pytest.mark.parametrize("installed", [True, False])
def test_an_mp3_of_a_free_bit_rate_is_read_by_libsndfile(installed: bool, request: pytest.FixtureRequest) -> None:
    data = mp3(mode="CONSTANT")[1]
    length = data.index(data[:2], 4)  # without padding all frames are as long
    free = bytearray(data)
    for at in range(0, len(free) - length + 1, length):
        free[at + 2] &= 0x0F
    if not installed:
        request.getfixturevalue("without_av")
    assert detect(Source("x", bytes(free))) == "audio"
    assert np.array_equal(load(bytes(free)), load(data))


def test_without_pyav_a_sound_cut_short_says_what_it_needs(without_av: None) -> None:
    loud = np.where(np.arange(RATE * 300) < RATE, 0.3 * np.random.default_rng(0).normal(size=RATE * 300), 0)
    loud += 0.001 * np.random.default_rng(1).normal(size=len(loud))
    message = refused(mp3(loud.astype(np.float32).clip(-0.9, 0.9))[1])
    assert "it declares no length" in message
    assert "pip install 'perceiver-cli[video]'" in message
    assert is_all_of(load(mp3()[0]), SOUND)


def test_noise_named_mp3_is_no_sound() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    assert "x.mp3" in refused(noise, "x.mp3")
    assert "x.mp3" in refused(bytes(100_000), "x.mp3")


# ---------------------------------------------------------------- formats


def adts() -> bytes:
    return muxed("adts", "aac")


@pytest.mark.parametrize(
    ("name", "form", "codec", "rate"),
    [
        ("x", "adts", "aac", RATE),
        ("x", "amr", "libopencore_amrnb", 8000),
        ("x", "wv", "wavpack", RATE),
        ("x.wma", "asf", "wmav2", 44_100),
        ("x", "asf", "wmav2", 44_100),
        ("x.m4a", "mp4", "aac", RATE),  # of a brand that holds films too
        ("x.m4b", "ipod", "aac", RATE),
        ("x.mka", "matroska", "libopus", 48_000),
        ("x.weba", "webm", "libopus", 48_000),
        ("x", "flv", "aac", 44_100),
        ("x", "caf", "alac", RATE),
        ("x", "ogg", "flac", RATE),
        ("x", "ogg", "libopus", 48_000),
        ("x", "wav", "g722", RATE),
        ("x", "wav", "libmp3lame", RATE),
        ("x", "wav", "adpcm_ima_wav", RATE),
        ("x", "wav", "adpcm_ms", RATE),
        ("x", "w64", "pcm_s16le", RATE),
        ("x", "aiff", "pcm_s16le", RATE),  # AIFF-C with the byte order sowt
        ("x", "au", "pcm_mulaw", RATE),
        ("x", "mp2", "mp2", RATE),
    ],
)
def test_sounds_that_ffmpeg_writes(name: str, form: str, codec: str, rate: int) -> None:
    data = muxed(form, codec, rate)
    source = Source(name, data)
    assert detect(source) == "audio"
    found = load(data, name)
    assert abs(len(found) - len(SINE)) < 0.11 * RATE
    assert np.sqrt((found[RATE // 2 : 2 * RATE] ** 2).mean()) == pytest.approx(0.4 / np.sqrt(2), rel=0.25)
    assert np.abs(np.fft.rfft(found[: 2 * RATE])).argmax() == 880
    part = AUDIO.load(source, AudioSpec(rate_hz=RATE), LIMITS, (1.0, 0.5))
    near = [np.abs(part - found[at : at + RATE // 2]).max() for at in range(RATE - 32, RATE + 33)]
    assert min(near) < 0.05  # some containers round times to 1 ms


@pytest.mark.parametrize(
    ("kind", "subtype"), [("NIST", "PCM_16"), ("NIST", "ULAW"), ("NIST", "ALAW"), ("W64", "PCM_16")]
)
def test_sounds_that_libsndfile_reads(kind: str, subtype: str) -> None:
    data = written(SINE, kind, subtype)
    assert detect(Source("x", data)) == "audio"
    assert np.abs(load(data) - SINE).max() < 0.03
    message = refused(data[: len(data) * 2 // 3])
    assert "bytes of sound, found" in message


SPHERE = (
    "NIST_1A\n   1024\ndatabase_id -s5 TIMIT\nsample_count -i 16000\nsample_n_bytes -i 2\nchannel_count -i 1\n"
    "sample_byte_format -s2 {order}\nsample_rate -i 16000\nsample_coding -s{length} {coding}\nend_head\n"
)


def test_sphere_files_as_timit_has_them() -> None:
    samples = (SINE[:RATE] * 32767).astype(">i2")
    for order, values in (("10", samples), ("01", samples.astype("<i2"))):
        head = SPHERE.format(order=order, length=3, coding="pcm").encode().ljust(1024)
        assert np.abs(load(head + values.tobytes(), "SA1.WAV") - SINE[:RATE]).max() < 1e-3
    coding = "pcm,embedded-shorten-v2.00"
    head = SPHERE.format(order="10", length=len(coding), coding=coding).encode().ljust(1024)
    message = refused(head + bytes(10_000))
    assert "embedded-shorten" in message
    assert "sph2pipe -f wav" in message


def test_aac_after_a_tag_or_cut_from_a_stream() -> None:
    for data in (TAG + adts(), adts()[50:]):
        assert detect(Source("x.aac", data)) == "audio"
        assert abs(len(load(data, "x.aac")) - len(SINE)) < 0.15 * RATE


def test_chained_ogg_is_read_to_the_end_of_the_last() -> None:
    for subtype in ("VORBIS", "OPUS"):
        both = written(SINE, "OGG", subtype) + written(SOUND, "OGG", subtype)
        assert abs(len(load(both)) - len(SINE) - len(SOUND)) < 0.2 * RATE


def test_an_ogg_cut_inside_of_a_page_is_refused_and_one_without_its_end_is_read() -> None:
    data = written(SOUND, "OGG", "VORBIS")
    at = data.rindex(b"OggS")
    assert "truncated" in refused(data[: len(data) // 2])
    assert "truncated" in refused(data[:-1])
    assert RATE < len(load(data[:at])) < len(SOUND)  # a recording that was stopped: it declares no length


@pytest.mark.parametrize(("form", "codec"), [("flv", "aac"), ("asf", "wmav2"), ("ipod", "aac"), ("matroska", "aac")])
def test_cut_containers_are_refused(form: str, codec: str) -> None:
    data = muxed(form, codec, 44_100)
    assert "truncated" in refused(data[: len(data) // 2], "x.m4a")


def test_a_caf_of_unknown_size_is_read() -> None:
    data = written(SINE, "CAF", "PCM_16")
    at = data.index(b"data") + 4
    assert np.array_equal(load(data[:at] + b"\xff" * 8 + data[at + 8 :]), load(data))
    assert "bytes of sound, found" in refused(data[:-1000])
