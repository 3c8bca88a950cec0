"""One function for each parser: it takes any bytes, and raises for anything but a sound value or a PerceiverError."""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from perceiver_cli.config import load_config
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.inputs import Pipe, examples_of
from perceiver_cli.data.listing import listed
from perceiver_cli.data.manifest import read_manifest
from perceiver_cli.data.splits import read_split
from perceiver_cli.errors import PerceiverError
from perceiver_cli.model.checkpoint import read_info, read_table
from perceiver_cli.preprocess import container, modality
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.records.byte_arrays import stored_rows
from perceiver_cli.records.format import Facts, Header, Stored
from perceiver_cli.records.npy import npy_bytes, parse_npy
from perceiver_cli.records.shards import open_shards
from perceiver_cli.records.stream import BLOCK, SEAL_AT, Writer, pack
from perceiver_cli.run_folder import METRICS_FILE, read_log

Target = Callable[[bytes], object]
LIMITS = Limits(file_bytes=1 << 22, decoded_bytes=1 << 24, vertices=100_000, faces=200_000, audio_seconds=60.0)
IMAGE = ImageSpec(size=(4, 4), color="grey", mean=(0.5,), std=(0.25,), bands=2)
AUDIO = AudioSpec(rate_hz=1000, clip_s=0.02, patch=(4,))
RECORDS = Header({"image": IMAGE, "audio": AUDIO}, ("cat", "dog"))
TARGETS: dict[str, Target] = {}
CORPUS = Path(__file__).parent / "corpus"


def target(function: Target) -> Target:
    """Add a function to TARGETS: the same, but a PerceiverError is an answer."""
    name = getattr(function, "__name__")  # noqa: B009  # a Callable has none to mypy

    @functools.wraps(function)
    def run(data: bytes) -> None:
        with suppress(PerceiverError):
            function(data)

    TARGETS[name] = run
    return run


@functools.cache
def place() -> Path:
    """Return an empty folder of this process, in memory where there is such a place."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    kept = tempfile.TemporaryDirectory(dir=folder)
    place.kept = kept  # type: ignore[attr-defined]  # until the process ends
    return Path(kept.name)


@contextmanager
def file_of(data: bytes, name: str) -> Iterator[Path]:
    """Yield the path of a file with these bytes."""
    path = place() / name
    path.write_bytes(data)
    yield path
    path.unlink(missing_ok=True)


def check(array: np.ndarray) -> None:
    assert array.size
    assert np.isfinite(array).all()


def load(data: bytes, name: str, spec: InputSpec, limits: Limits = LIMITS) -> None:
    check(modality(spec.modality).load(Source(name, data), spec, limits))


def load_points(data: bytes, suffix: str) -> None:
    load(data, f"x.{suffix}", PointsSpec(pool_points=16))


@target
def records(data: bytes) -> None:
    for example in examples_of(Pipe("-", io.BytesIO(data)), RECORDS.inputs, LIMITS):
        for stored in example.sources.values():
            with suppress(PerceiverError):
                if isinstance(stored, Stored):  # bytes of other files come as they are
                    check(stored.array())


def unsealed(data: bytes) -> bytes:
    """Return a tar with the right checksums in its headers, and without seals: else few mutants get past them."""
    mended = bytearray(data)
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        if data[at + 257 : at + 262] == b"ustar":
            mended[at + SEAL_AT : at + BLOCK] = bytes(BLOCK - SEAL_AT)
            mended[at + 148 : at + 156] = b" " * 8
            mended[at + 148 : at + 156] = b"%06o\0 " % sum(mended[at : at + BLOCK])
    return bytes(mended)


@target
def records_unsealed(data: bytes) -> None:
    TARGETS["records"](unsealed(data))


@functools.cache
def tar(sealed: bool) -> Path:
    """Return a tar of two records, whose size and time an index names."""
    path, out = place() / f"{sealed}.tar", io.BytesIO()
    writer = Writer(out.write, RECORDS)
    for number in range(2):
        arrays = {"image": npy_bytes(np.zeros((4, 4, 1), np.uint8))}
        writer.packed(pack(Facts(f"{number}.png", f"{number}.png", labels=("cat",)), arrays, number, RECORDS))
    writer.close()
    path.write_bytes(out.getvalue() if sealed else unsealed(out.getvalue()))
    os.utime(path, ns=(1, 1))
    return path


@target
def index(data: bytes) -> None:
    """The first byte chooses the tar: with or without digests."""
    path = tar(bool(data and data[0] % 2))
    with file_of(data[1:], f"{path.name}.index"):
        shards = open_shards([str(path)])
        for row in range(len(shards)):
            shards.id(row)
            shards.label_indices(row)
            for stored in shards.stored(row, "x", list(shards.header.inputs)).values():
                with suppress(PerceiverError):
                    check(stored.array())


@target
def ply(data: bytes) -> None:
    load_points(data, "ply")


@target
def stl(data: bytes) -> None:
    load_points(data, "stl")


@target
def off(data: bytes) -> None:
    load_points(data, "off")


@target
def obj(data: bytes) -> None:
    load_points(data, "obj")


@target
def xyz(data: bytes) -> None:
    load_points(data, "xyz")


@target
def npy_points(data: bytes) -> None:
    load_points(data, "npy")


@target
def table(data: bytes) -> None:
    """Texts and arrays that the user names, with every column."""
    with suppress(PerceiverError):
        load(data, "x.txt", PointsSpec(pool_points=16, columns=("intensity", "4")))
    load_points(data, "npy")


@target
def pcd(data: bytes) -> None:
    for columns in ((), ("intensity",), ("red", "green", "blue")):
        with suppress(PerceiverError):
            load(data, "x.pcd", PointsSpec(pool_points=16, columns=columns))


@target
def las(data: bytes) -> None:
    """LAS and LAZ; without the extra a line says so."""
    load(data, "x.las", PointsSpec(pool_points=16, columns=("intensity",)))


@target
def raw(data: bytes) -> None:
    """KITTI's and nuScenes' floats."""
    with suppress(PerceiverError):
        load_points(data, "bin")
    load(data, "x.pcd.bin", PointsSpec(pool_points=16, columns=("ring",)))


@target
def gltf(data: bytes) -> None:
    """The JSON of a GLB, with 64 bytes of binary data."""
    text = data + b" " * (-len(data) % 4)
    binary = struct.pack("<9f", *range(9)).ljust(64, b"\0")
    size = 12 + 8 + len(text) + 8 + len(binary)
    head = struct.pack("<4sII", b"glTF", 2, size)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    load_points(head + chunks, "glb")


@target
def glb(data: bytes) -> None:
    load_points(data, "glb")


@target
def riff(data: bytes) -> None:
    load(data, "x.wav", AudioSpec(rate_hz=1000))


@target
def boxes(data: bytes) -> None:
    """The check of an MP4 before FFmpeg reads it."""
    with container.open_track(Source("x.mp4", data), LIMITS, "video"):
        pass


@target
def ebml(data: bytes) -> None:
    """The check of a Matroska file, or an AVI, before FFmpeg reads it."""
    with container.open_track(Source("x.mkv", data), LIMITS, "audio"):
        pass


@target
def sounds(data: bytes) -> None:
    """What a sound file claims: chunks, pages, the length of an MP3; then what reads it."""
    load(data, "x.mp3", AUDIO)


@target
def films(data: bytes) -> None:
    """The check of other containers before FFmpeg reads them; the suffix allows a stream that begins anywhere."""
    with container.open_track(Source("x.ts", data), LIMITS, "video"):
        pass


@target
def tiffs(data: bytes) -> None:
    """The tags of a TIFF: what is read wrong, is raw or has pixels without data."""
    load(data, "x.tif", IMAGE)


@target
def detection(data: bytes) -> None:
    """The signatures of all formats, read or not; the first byte chooses a suffix."""
    suffixes = (".mp3", ".ts", ".aac", ".dng", ".txt")
    detected(Source(f"x{suffixes[data[0] % 5] if data else ''}", data[1:]))


@target
def npy(data: bytes) -> None:
    parse_npy(data, "x")


@target
def rows(data: bytes) -> None:
    """A byte array in .npy or .safetensors."""
    check(stored_rows(Source("x", data), "image", IMAGE, LIMITS).prepared().values)


@target
def manifest(data: bytes) -> None:
    """The first byte chooses the format."""
    suffixes = (".csv", ".tsv", ".jsonl", ".txt")
    with file_of(data[1:], f"m{suffixes[data[0] % 4] if data else '.csv'}") as path:
        for row in read_manifest(path, labels="needed" if data and data[0] < 128 else "ignored").rows:
            json.dumps([row.path, row.split, row.labels], ensure_ascii=False).encode("utf-8", "surrogateescape")


def read_container(data: bytes, name: str) -> None:
    """Read every file of a container as training and prediction do; each member is in one group of the account."""
    with file_of(data, name) as path:
        for labels in ("needed", "ignored"):
            with suppress(PerceiverError):
                listing = listed(path, labels)  # type: ignore[arg-type]
                for row in listing.rows:
                    with suppress(PerceiverError):
                        row.looked_at(listing.folder).source.read(LIMITS)
        account = scan(path).accounted()
        assert account.total == account.found


@target
def archives(data: bytes) -> None:
    """A tar, perhaps compressed, or a zip; the checksums of a tar's headers are mended."""
    read_container(unsealed(data), "x.tar")


@target
def tables(data: bytes) -> None:
    """The first byte chooses Parquet or Arrow."""
    read_container(data[1:], "x.parquet" if data and data[0] % 2 else "x.arrow")


@target
def split(data: bytes) -> None:
    with file_of(data, "split.jsonl") as path:
        found = read_split(path)
        assert len(found.keys) == len(found.held) > 0


@target
def log(data: bytes) -> None:
    with file_of(data, METRICS_FILE) as path:
        read_log(path.parent)


@target
def safetensors(data: bytes) -> None:
    with file_of(data, "model.safetensors") as path:
        with suppress(PerceiverError):
            read_table(path)
        read_info(path)


@target
def config(data: bytes) -> None:
    with file_of(data, "config.toml") as path:
        load_config(path)
