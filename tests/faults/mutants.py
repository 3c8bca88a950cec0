"""Mutants of every format that the program reads: each gives a sound value or one error of the program.

They are read in forked children, whose memory and time are limited: a signal, a hang or 2 GiB is a failed trial.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from perceiver_cli.errors import DataError, PerceiverError
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.preprocess.video import VideoSpec
from tests.faults.table import Place, Verdict, row

HANG_S = 30
MEMORY = 2 << 30  # more than before a mutant is read
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1]
WORDS = [
    b"-1",
    b"nan",
    b"1e999",
    b"99999999999999999999",
    b"\0",
    b"\n",
    b'"',
    b"{",
    b"[" * 2000,
    b"\xff\xfe",
    b"\\ud800",
]


def mutant(data: bytes, rng: Random) -> bytes:
    """Return data with one to four changes: flips, numbers, words, cuts, copies and zeros."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(7)
        length = rng.choice([1, 2, 4, 8, 16, 64, 512])
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
            number = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
            changed[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
        elif kind == 2:
            changed[at:at] = rng.choice(WORDS)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            changed[at : at + length] = bytes(min(length, max(0, len(changed) - at)))
        else:
            del changed[rng.choice([at, len(changed)]) :]
    return bytes(changed)


def judged(trials: Sequence[tuple[str, Callable[[], object]]]) -> Iterator[Verdict]:
    """Yield the verdict of each trial: "" if it ends, or raises an error of the program."""
    done = 0
    while done < len(trials):
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            _judge(trials[done:], writable)
        os.close(writable)
        with os.fdopen(readable, encoding="utf-8") as lines:
            for line in lines:
                yield line[:-1] and f"{trials[done][0]}: {line[:-1]}"
                done += 1
        _, status = os.waitpid(child, 0)
        if status:
            yield f"{trials[done][0]}: status {os.waitstatus_to_exitcode(status)} ({-signal.SIGALRM}: a hang)"
            done += 1


def _judge(trials: Sequence[tuple[str, Callable[[], object]]], writable: int) -> None:
    """Write a line for each trial, empty if it passed. Does not return."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries write to it
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for _, trial in trials:
        signal.alarm(HANG_S)
        fault = ""
        try:
            trial()
        except PerceiverError as error:
            fault = "" if error.exit_code > 1 else repr(error)
        except BaseException as error:
            fault = repr(error)
        os.write(writable, fault.encode("unicode_escape")[:400] + b"\n")
    os._exit(0)


def media() -> dict[str, tuple[bytes, InputSpec]]:
    """Return a small file of each format of pictures, films and sounds, by its name."""
    import pillow_heif
    from PIL import Image

    rng = np.random.default_rng(0)
    pillow_heif.register_heif_opener()
    files: dict[str, tuple[bytes, InputSpec]] = {}
    pixels = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    wide = Image.fromarray(rng.normal(size=(24, 32)).astype(np.float32))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "AVIF", "HEIF", "JPEG2000"):
        out = io.BytesIO()
        pixels.save(out, kind)
        files[f"x.{kind.lower()}"] = out.getvalue(), ImageSpec(size=(16, 16))
    out = io.BytesIO()
    wide.save(out, "TIFF", tiffinfo={42113: "-9999"})
    files["float.tiff"] = out.getvalue(), ImageSpec(size=(16, 16))
    short = VideoSpec(size=(16, 16), num_frames=2, patch=(1, 4, 4))
    for form, codec in FILMS:
        files[f"film.{form}"] = film(rng, form, codec), short
    for kind in ("GIF", "AVIF"):
        out = io.BytesIO()
        frames = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
        frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100)
        files[f"film.{kind.lower()}"] = out.getvalue(), short
    for name, data in sounds(rng).items():
        files[name] = data, AudioSpec(rate_hz=8000)
    return files


FILMS = (
    ("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mjpeg"), ("asf", "wmv2"), ("flv", "flv"), ("ogg", "libvpx"),
    ("mpegts", "mpeg2video"), ("m2ts", "mpeg2video"), ("mpeg", "mpeg1video"), ("mpeg1video", "mpeg1video"),
    ("mxf", "mpeg2video"), ("dv", "dvvideo"),
)  # fmt: skip
SOUNDS = (
    ("adts", "aac", 8000), ("amr", "libopencore_amrnb", 8000), ("wv", "wavpack", 8000), ("asf", "wmav2", 22_050),
    ("ipod", "aac", 8000), ("ogg", "flac", 8000), ("wav", "g722", 16_000), ("wav", "libmp3lame", 8000),
    ("caf", "alac", 8000), ("webm", "libopus", 48_000),
)  # fmt: skip


def film(rng: np.random.Generator, form: str, codec: str) -> bytes:
    """Return a film of a few frames of noise as FFmpeg writes it."""
    import av

    out = io.BytesIO()
    height, width = (576, 720) if form == "dv" else (32, 32)
    options = {"mpegts_m2ts_mode": "1"} if form == "m2ts" else {}
    with av.open(out, "w", format={"m2ts": "mpegts"}.get(form, form), options=options) as container:
        track = container.add_stream(codec, rate=8 if form in ("mp4", "matroska", "avi") else 25)
        track.width, track.height, track.pix_fmt = width, height, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(1 if form == "dv" else 4):
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(track.encode(None))
    return out.getvalue()


def sounds(rng: np.random.Generator) -> dict[str, bytes]:
    """Return sounds of half a second that libsndfile does not read, or reads after a look at what they claim."""
    import av
    import soundfile

    noise = (0.1 * rng.normal(size=4000)).astype(np.float32)
    files = {}
    for form, codec, rate in SOUNDS:
        out = io.BytesIO()
        with av.open(out, "w", format=form) as container:
            track = container.add_stream(codec, rate=rate, layout="mono")
            track.bit_rate = 32_000
            size = track.codec_context.frame_size or 1024
            resampler = av.AudioResampler(format=track.format.name, layout="mono", rate=rate, frame_size=size)
            frame = av.AudioFrame.from_ndarray(noise[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            for each in resampler.resample(frame) + resampler.resample(None):
                container.mux(track.encode(each))
            container.mux(track.encode(None))
        files[f"{codec}.{form}"] = out.getvalue()
    for kind, subtype in (("MP3", None), ("OGG", "VORBIS"), ("NIST", "PCM_16"), ("W64", "PCM_16"), ("FLAC", None)):
        out = io.BytesIO()
        soundfile.write(out, noise, 8000, format=kind, subtype=subtype)
        files[f"x.{kind.lower()}"] = out.getvalue()
    mp3 = files["x.mp3"]
    files["bare.mp3"] = mp3[mp3.index(mp3[:2], 4) :]  # without the header of its length
    files["zeros.mp3"] = bytes(100) + mp3
    files["two.ogg"] = files["x.ogg"] + files["x.ogg"]
    return files


def manifests(folder: Path) -> dict[str, bytes]:
    """Return a listing of each kind, by its name, of two pictures that lie in the folder."""
    from PIL import Image

    names = ["a.png", "b.png"]
    for name in names:
        Image.new("L", (8, 8)).save(folder / name)
    text = "path,label\n" + "".join(f"{name},x{name}\n" for name in names)
    lines = "".join(f'{{"path": "{name}", "label": "x{name}"}}\n' for name in names)
    return {"m.csv": text.encode(), "wide.csv": text.encode("utf-16"), "m.jsonl": lines.encode()}


@row("mutants of every format that is read", 20_000, 600)
def formats(place: Place) -> Iterator[Verdict]:
    """Pictures, films and sounds here, meshes, arrays, records and text by the targets of tests/fuzz."""
    from tests.fuzz.targets import CORPUS, TARGETS, load

    seeds: list[tuple[str, bytes, Callable[[bytes], object]]] = []
    for name, (data, spec) in media().items():
        seeds.append((name, data, partial(load, name=name, spec=spec, limits=Limits())))
    for name, target in TARGETS.items():
        seeds += [(f"{name}/{path.name}", path.read_bytes(), target) for path in sorted((CORPUS / name).glob("seed*"))]
    from perceiver_cli.data.inputs import brought, examples_of

    for name, data in manifests(place.folder).items():

        def read_listing(changed: bytes, path: Path = place.folder / name) -> None:
            path.write_bytes(changed)
            for example in examples_of(str(path), {"image": ImageSpec(size=(8, 8))}, Limits()):
                with suppress(DataError):  # also for a row without a path
                    assert brought(example, ["image"])

        seeds.append((name, data, read_listing))
    trials = []
    for number in range(place.count):
        name, data, read = seeds[number % len(seeds)]
        changed = mutant(data, place.random)
        trials.append((f"{name} {changed[:60]!r}", partial(read, changed)))
    yield from judged(trials)


@row("a model is loaded while a training replaces it", 3000, 100)
def loads(place: Place) -> Iterator[Verdict]:
    """The step in the header is also the value of a weight: both are of one file."""
    from dataclasses import replace

    from perceiver_cli.model.checkpoint import load_model, save_model
    from tests.faults.flips import model

    path = model(place.folder)
    perceiver, info = load_model(path)
    weights = perceiver.state_dict()

    def save(step: int) -> None:
        weights["head.bias"][0] = step
        save_model(path, weights, replace(info, step=step))

    save(1)
    writer = os.fork()
    if writer == 0:
        step = 1
        while os.getppid() != 1:
            save(step := step + 1)
            time.sleep(0.005)  # else the disk is busy, and loads wait
        os._exit(0)
    seen = set()
    try:
        for _ in range(place.count):
            try:
                loaded, header = load_model(path)
            except Exception as error:
                yield repr(error)
                continue
            seen.add(header.step)
            same = loaded.state_dict()["head.bias"][0].item() == header.step
            yield "" if same else f"the header of step {header.step} with other weights"
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert len(seen) > place.count // 20, f"the model was replaced {len(seen)} times only"


@row("two preprocess into the same shards", 20, 2)
def concurrent(place: Place) -> Iterator[Verdict]:
    """One or both fail, and the shards hold the data of the one that did not."""
    from perceiver_cli.records.shards import open_shards
    from tests.faults.flips import pictures

    data = pictures(place.folder)
    for trial in range(place.count):
        out = place.folder / f"out{trial}"
        command = ("preprocess", "-o", str(out / "x-%03d.tar"), "--shard-size", "20k")
        both = [place.start(*command, str(data / name)) for name in "ab"]
        ends = [process.communicate(timeout=60)[1].decode() for process in both]
        statuses = [process.returncode for process in both]
        shards = open_shards(sorted(map(str, out.glob("*.tar"))))
        ids = sorted(shards.given_id(row) for row in range(len(shards)))
        won = [name for name, status in zip("ab", statuses, strict=True) if status == 0]
        if len(won) != 1 or set(statuses) - {0, 2, 5}:
            yield f"statuses {statuses}: {ends}"
        elif ids != sorted(path.name for path in (data / won[0]).iterdir()):
            yield f"{won[0]} ended with 0, and the shards hold {ids}"
        else:
            yield ""


@row("records through pipes that break", 40, 4)
def pipes(place: Place) -> Iterator[Verdict]:
    """In turn, a stream is cut before `predict -` has all of it, and nobody reads on what `preprocess` writes."""
    from tests.faults.flips import model, pictures, shard

    path = model(place.folder)
    stream = shard(place.folder, path).read_bytes()
    data = pictures(place.folder)
    end = stream.rindex(b"__perceiver__/end")
    for trial in range(place.count):
        if trial % 2:
            with place.start("preprocess", str(data), "-m", str(path)) as writer:
                assert writer.stdout is not None
                writer.stdout.read(place.random.randrange(1, 10_000))
                writer.stdout.close()
                writer.wait()
                said = writer.stderr.read() if writer.stderr is not None else b""
            # What is left may have fitted into the pipe.
            quiet = not said or said.startswith(b"prepared")
            yield "" if writer.returncode in (0, -signal.SIGPIPE) and quiet else f"{writer.returncode}: {said[-300:]!r}"
            continue
        cut = stream[: place.random.randrange(600, end)]
        with place.start("predict", "-", "-m", str(path), "--device", "cpu", stdin=-1) as reader:
            out, said = reader.communicate(cut)
        lines: list[Any] = out.splitlines()
        whole = max(0, cut.count(b".image.npy\0") - 1)
        ok = reader.returncode == 7 and b"cut short after" in said and whole <= len(lines) <= whole + 1
        yield (
            ""
            if ok
            else f"cut at {len(cut)}: status {reader.returncode}, {len(lines)} of {whole} lines, {said[-300:]!r}"
        )
