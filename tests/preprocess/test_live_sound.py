"""Sound that is heard while it arrives."""

from __future__ import annotations

import io
import random
import struct
from contextlib import suppress
from typing import get_args

import numpy as np
import pytest
import soundfile

from perceiver_cli.cli import options
from perceiver_cli.errors import PerceiverError
from perceiver_cli.preprocess import with_time
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.live_sound import Encoding, Live, Raw, live
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import tone_of

RATE_HZ = 8_000
SPEC = AudioSpec(rate_hz=RATE_HZ, clip_s=0.5)
SUBTYPES = {"u8": "PCM_U8", "s16le": "PCM_16", "s24le": "PCM_24", "s32le": "PCM_32", "f32le": "FLOAT"}


class Drip(io.RawIOBase):
    """A pipe that holds a few bytes at a time. taken: those that were read."""

    def __init__(self, data: bytes, step: int = 777) -> None:
        self.data, self.step, self.taken = data, step, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        piece = self.data[self.taken : self.taken + min(len(buffer), self.step)]
        buffer[: len(piece)] = piece
        self.taken += len(piece)
        return len(piece)


def tone(channels: int = 1, seconds: float = 2.3) -> Array:
    one = tone_of(440, seconds, np.random.default_rng(0))
    return np.stack([one] * channels, axis=1) if channels > 1 else one


def written(samples: Array, form: str = "WAV", subtype: str | None = "PCM_16", rate_hz: int = RATE_HZ) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, subtype, format=form)
    return file.getvalue()


def windows(sound: Live, spec: AudioSpec = SPEC) -> list[tuple[float, Array]]:
    source = Source("-", sound, ("audio",))
    return list(with_time("audio").windows(source, spec, Limits(), 0.5, 0.25))


def of_file(data: bytes, spec: AudioSpec = SPEC) -> list[tuple[float, Array]]:
    return list(with_time("audio").windows(Source("x.wav", data), spec, Limits(), 0.5, 0.25))


@pytest.mark.parametrize("encoding", get_args(Encoding))
@pytest.mark.parametrize("channels", [1, 2])
def test_it_is_heard_as_the_whole_file_is_read(encoding: Encoding, channels: int) -> None:
    data = written(tone(channels), subtype=SUBTYPES[encoding])
    whole = of_file(data)
    raw = Raw(RATE_HZ, channels, encoding)
    at = data.index(b"data") + 8
    for sound in (Live(io.BufferedReader(Drip(data))), Live(io.BufferedReader(Drip(data[at:])), raw)):
        heard = windows(sound)
        assert [start for start, _ in heard] == [start for start, _ in whole]
        for (_, one), (_, other) in zip(heard, whole, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-7)
    assert [start for start, _ in of_file(raw.as_wav(data[at:] + bytes(raw.width - 1)))] == [
        start for start, _ in whole
    ]


def test_another_rate_and_a_channel() -> None:
    data = written(np.stack([tone(), 0 * tone()], axis=1), rate_hz=16_000)
    spec = AudioSpec(rate_hz=RATE_HZ, clip_s=0.5, channel=0)
    heard, whole = windows(Live(io.BufferedReader(Drip(data))), spec), of_file(data, spec)
    assert len(heard) == len(whole)
    np.testing.assert_allclose(heard[0][1], whole[0][1], atol=1e-6)
    with pytest.raises(PerceiverError, match="no channel 2, found 2"):
        windows(Live(io.BytesIO(data)), AudioSpec(rate_hz=RATE_HZ, channel=2))


def test_a_window_comes_once_its_samples_are_there() -> None:
    drip = Drip(written(tone(seconds=60)))
    source = Source("-", Live(io.BufferedReader(drip, 1024)), ("audio",))
    each = with_time("audio").windows(source, SPEC, Limits(audio_seconds=1), 0.5, 0.25)  # no limit to its length
    next(each)
    assert drip.taken < 2 * RATE_HZ * 0.5 + 3000
    next(each)
    assert drip.taken < 2 * RATE_HZ * 0.75 + 3000


@pytest.mark.parametrize(("form", "subtype"), [("OGG", "VORBIS"), ("FLAC", "PCM_16"), ("MP3", None)])
def test_ffmpeg_hears_other_formats(form: str, subtype: str | None) -> None:
    drip = Drip(written(tone(seconds=20), form, subtype))
    stream = io.BufferedReader(drip, 1024)
    sound = live(stream, stream.peek(16)[:16], "-")
    assert sound is not None
    each = with_time("audio").windows(Source("-", sound, ("audio",)), SPEC, Limits(), 0.5, 0.25)
    _, first = next(each)
    assert drip.taken < len(drip.data) / 2
    assert abs(np.abs(np.fft.rfft(first)).argmax() / 0.5 - 440) < 4
    assert 20 - next(reversed(list(each)))[0] < 0.7


def test_what_is_no_sound_or_needs_its_end_is_not_heard() -> None:
    for head in (b"\x89PNG\r\n\x1a\n", b"\0\0\0\x18ftypmp42", b"RIFF\0\0\0\0AVI ", b"caff", b"", b"hello"):
        assert live(io.BytesIO(head), head, "-") is None


def test_a_header_that_lies_is_one_error() -> None:
    data = written(tone(2, 0.3))
    for damaged, message in (
        (data[:30], "ends inside its header"),
        (data.replace(b"fmt ", b"fmt_"), "without a usable header"),
        (data[:20] + struct.pack("<H", 85) + data[22:], "encoding 85 with 16 bits"),
        (data[:22] + b"\0\0" + data[24:], "encoding 1"),
        (data[:24] + struct.pack("<I", 7) + data[28:], "sample rate 7 Hz"),
        (data[:16] + b"\xff\xff\xff\xff" + data[20:], "without a usable header"),
    ):
        with pytest.raises(PerceiverError, match=message):
            windows(Live(io.BytesIO(damaged)))
    rng = random.Random(0)
    for _ in range(200):
        mutant = bytearray(data[:400])
        for _ in range(3):
            mutant[rng.randrange(60)] = rng.randrange(256)
        with suppress(PerceiverError):
            windows(Live(io.BytesIO(bytes(mutant))))


def test_the_command_knows_every_encoding() -> None:
    assert options.Encoding == Encoding
