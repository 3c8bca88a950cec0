"""Clouds of lidar: each format gives its points and columns, and claims cost nothing; a model learns from intensity."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.points import MODALITY as POINTS, PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import Perceive

COLOURS = ("red", "green", "blue")
RNG = np.random.default_rng(0)
XYZ = RNG.uniform(-20, 20, (300, 3)).astype(np.float32)
INTENSITY = RNG.integers(0, 200, 300).astype(np.uint16)
RGB = RNG.integers(0, 256, (300, 3)).astype(np.uint8)


def load(data: bytes, name: str, *columns: str, limits: Limits | None = None) -> np.ndarray:
    spec = PointsSpec(pool_points=500, num_points=64, columns=columns)
    return POINTS.load(Source(name, data), spec, limits or Limits())


def lzf(data: bytes) -> bytes:
    """Return data in LZF: references to bytes 1 to 16 before where three or more repeat, else runs."""
    out, at, run = bytearray(), 0, bytearray()

    def flush() -> None:
        for begin in range(0, len(run), 32):
            piece = run[begin : begin + 32]
            out.extend([len(piece) - 1, *piece])
        run.clear()

    while at < len(data):
        best = (0, 0)
        for back in range(1, min(16, at) + 1):
            length = 0
            while at + length < len(data) and length < 264 and data[at + length] == data[at + length - back]:
                length += 1
            best = max(best, (length, back))
        length, back = best
        if length < 3:
            run.append(data[at])
            at += 1
            continue
        flush()
        more = length - 2
        out.extend([more << 5, back - 1] if more < 7 else [7 << 5, more - 7, back - 1])
        at += length
    flush()
    return bytes(out)


def pcd(kind: str, xyz: np.ndarray = XYZ, intensity: np.ndarray = INTENSITY, rgb: np.ndarray = RGB) -> bytes:
    packed = (rgb.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(axis=1).astype(np.uint32)
    count = len(xyz)
    kinds = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("_", "u1", 3), ("intensity", "<u2"), ("rgb", "<f4")]
    table = np.zeros(count, kinds)
    for place, axis in enumerate("xyz"):
        table[axis] = xyz[:, place]
    table["intensity"], table["rgb"] = intensity, packed.view("<f4")
    head = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z _ intensity rgb\nSIZE 4 4 4 1 2 4\n"
        f"TYPE F F F U U F\nCOUNT 1 1 1 3 1 1\nWIDTH {count}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {count}\n"
        f"DATA {kind}\n"
    ).encode()
    if kind == "ascii":
        rows = zip(xyz.tolist(), intensity.tolist(), packed.view("<f4").tolist(), strict=True)
        return head + "".join(f"{x!r} {y!r} {z!r} 0 0 0 {i} {c!r}\n" for (x, y, z), i, c in rows).encode()
    if kind == "binary":
        return head + table.tobytes()
    plain = b"".join(np.ascontiguousarray(table[name]).tobytes() for name in table.dtype.names or ())
    body = lzf(plain)
    return head + struct.pack("<2I", len(body), len(plain)) + body


def las(*, packed: bool = False, point_format: int = 2, version: str = "1.2", shift: float = 0.0) -> bytes:
    laspy = pytest.importorskip("laspy")
    if packed:
        pytest.importorskip("lazrs")
    header = laspy.LasHeader(point_format=point_format, version=version)
    header.scales, header.offsets = [0.001] * 3, [shift] * 3
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = (XYZ[:, place].astype(np.float64) + shift for place in range(3))
    cloud.intensity = INTENSITY
    cloud.red, cloud.green, cloud.blue = (RGB[:, place].astype(np.uint16) * 257 for place in range(3))
    out = io.BytesIO()
    cloud.write(out, do_compress=packed, laz_backend=laspy.LazBackend.Lazrs if packed else None)
    return out.getvalue()


def raw(columns: int) -> bytes:
    table = np.zeros((300, columns), "<f4")
    table[:, :3], table[:, 3] = XYZ, INTENSITY / 255
    return table.tobytes()


KINDS = ("ascii", "binary", "binary_compressed")
FILES = {
    **{f"{kind}.pcd": lambda kind=kind: pcd(kind) for kind in KINDS},
    "a.las": las,
    "a.laz": lambda: las(packed=True),
    "new.las": lambda: las(point_format=7, version="1.4"),
    "new.laz": lambda: las(point_format=7, version="1.4", packed=True),
    "000001.bin": lambda: raw(4),
    "n015.pcd.bin": lambda: raw(5),
}


@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_its_points_and_columns(name: str) -> None:
    data = FILES[name]()
    assert detected(Source(name, data)).kinds == ("points",)
    points = load(data, name)
    assert points.dtype == np.float32
    assert np.abs(points - XYZ).max() < 0.002
    both = load(data, name, "intensity")
    assert np.array_equal(both[:, :3], points)
    assert np.allclose(both[:, 3], INTENSITY / (255 if name.endswith("bin") else 1))
    if name.endswith("bin"):
        with pytest.raises(DataError, match="no column red, green, blue: its columns are 'intensity'"):
            load(data, name, *COLOURS)
        return
    assert np.allclose(load(data, name, *COLOURS)[:, 3:], RGB / 255, atol=1e-6)
    assert np.array_equal(load(data, name, "blue", "intensity")[:, 4], both[:, 3])


def test_a_map_far_from_zero_keeps_its_shape() -> None:
    far = load(las(shift=5_000_000.0), "a.las")
    assert np.abs((far - far.mean(0)) - (XYZ - XYZ.mean(0))).max() < 0.002


def test_pcd_in_the_form_of_old_and_foreign_writers() -> None:
    data = pcd("ascii")
    forms = [
        data.replace(b"\n", b"\r\n"),
        data.replace(b"# .PCD v0.7 - Point Cloud Data file format\n", b""),
        data.replace(b"FIELDS", b"COLUMNS"),
        data.replace(b"VIEWPOINT 0 0 0 1 0 0 0\n", b""),
        data.replace(b"HEIGHT 1", b"HEIGHT 3").replace(b"WIDTH 300", b"WIDTH 100"),
        data.replace(b"WIDTH 300\nHEIGHT 1\n", b""),
        pcd("binary") + b"\n",
    ]
    for form in forms:
        assert detected(Source("a", form)).kinds == ("points",)
        assert np.array_equal(load(form, "a"), XYZ)
    packed = data.replace(b"TYPE F F F U U F", b"TYPE F F F U U U")
    whole = (RGB.astype(np.int64) << np.array([16, 8, 0])).sum(axis=1)
    head, body = packed.split(b"DATA ascii\n")
    rows = zip(body.splitlines(), whole, strict=True)
    lines = [b" ".join([*line.split()[:-1], b"%d" % colour]) for line, colour in rows]
    assert np.allclose(load(head + b"DATA ascii\n" + b"\n".join(lines), "a", *COLOURS)[:, 3:], RGB / 255)


def test_beams_that_did_not_come_back_are_left_out() -> None:
    xyz = XYZ.copy()
    xyz[5:9] = np.nan
    for kind in KINDS:
        source = Source("a.pcd", pcd(kind, xyz))
        points = POINTS.load(source, PointsSpec(pool_points=500), Limits())
        assert np.array_equal(points, np.delete(XYZ, range(5, 9), axis=0))
        assert source.notes == ["left out 4 of 300 points that are not finite numbers"]


PCD = pcd("binary")
PACKED = pcd("binary_compressed")
AT = PACKED.index(b"compressed\n") + 11


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


HOSTILE = {
    "points": (changed(PCD, b"POINTS 300", b"POINTS 900"), "900 points in a PCD of 300 x 1"),
    "claim": (changed(changed(PCD, b"POINTS 300", b"POINTS 900"), b"WIDTH 300", b"WIDTH 900"), "declared at least"),
    "short": (changed(changed(PCD, b"POINTS 300", b"POINTS 200"), b"WIDTH 300", b"WIDTH 200"), "found more bytes"),
    "limit": (changed(changed(PCD, b"POINTS 300", b"POINTS 99999999"), b"WIDTH 300", b"WIDTH 99999999"), "vertices="),
    "negative": (changed(changed(PCD, b"POINTS 300", b"POINTS -300"), b"WIDTH 300", b"WIDTH -300"), "-300 points"),
    "no end": (PCD[:100], "no line DATA"),
    "fields": (changed(PCD, b"SIZE 4 4 4 1 2 4", b"SIZE 4 4 4"), "6 names, 3 sizes, 6 types, 6 counts"),
    "no z": (changed(PCD, b"x y z", b"x y w"), "expected x y z"),
    "wide": (changed(PCD, b"COUNT 1 1 1 3", b"COUNT 1 1 1 999999999"), "expected x y z"),
    "type": (changed(PCD, b"TYPE F F F", b"TYPE Q F F"), "cannot decode"),
    "size": (changed(PCD, b"SIZE 4", b"SIZE 999"), "cannot decode"),
    "data": (changed(PCD, b"DATA binary", b"DATA zipped"), "PCD data 'zipped'"),
    "lines": (pcd("ascii").rstrip().rpartition(b"\n")[0], "declared 300 points, found 299 lines"),
    "numbers": (changed(pcd("ascii"), b" 0 0 0 ", b" 0 0 "), "7 numbers a line in a PCD of 8"),
    "lzf claim": (PACKED[:AT] + struct.pack("<2I", 2**31, 300 * 21) + PACKED[AT + 8 :], "declared at least"),
    "lzf size": (PACKED[:AT] + struct.pack("<2I", 9, 2**32 - 1) + PACKED[AT + 8 :], "4294967295 bytes in 9 of LZF"),
    "lzf reference": (PACKED[: AT + 8] + b"\xff\xff\xff" + PACKED[AT + 11 :], "before its first"),
    "lzf cut": (PACKED[:AT] + struct.pack("<2I", 100, 300 * 21) + PACKED[AT + 8 : AT + 108], "LZF of "),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_pcd_that_lies_is_refused(case: str) -> None:
    data, words = HOSTILE[case]
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        load(data, "a.pcd")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_las_that_lies_is_refused() -> None:
    data, packed = bytearray(las()), bytearray(las(packed=True))

    def with_bytes(data: bytes, at: int, form: str, value: int) -> bytes:
        copy = bytearray(data)
        struct.pack_into(form, copy, at, value)
        return bytes(copy)

    (table,) = struct.unpack_from("<q", packed, struct.unpack_from("<I", packed, 96)[0])
    for lie, words in (
        (with_bytes(data, 107, "<I", 2**32 - 1), "--limit vertices="),
        (with_bytes(data, 107, "<I", 1000), "declared at least"),
        (with_bytes(data, 100, "<I", 2**32 - 1), "declared at least"),
        (with_bytes(data, 96, "<I", 2**32 - 1), "declared at least"),
        (with_bytes(data, 105, "<H", 3), "LAS points of format 2 in 3 bytes"),
        (with_bytes(data, 104, "<B", 63), "LAS points of format 63"),
        (bytes(data[:-1]), "declared at least"),
        (bytes(data[:100]), "ends inside the LAS header"),
        (with_bytes(packed, table + 4, "<I", 2**31), "2147483648 chunks in a LAZ of 300 points"),
        (with_bytes(packed, struct.unpack_from("<I", packed, 96)[0], "<q", 2**40), "chunk table"),
        (with_bytes(packed, 105, "<H", 65535), ""),
    ):
        with pytest.raises(DataError) as caught:
            load(lie, "a.las")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_las_without_its_extra_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "laspy", None)
    with pytest.raises(UsageError, match=r"laspy, which reads LAS, is missing; pip install 'perceiver-cli\[lidar\]'"):
        load(b"LASF" + bytes(400), "a.las")


def test_other_bin_files_are_no_clouds() -> None:
    for other in (bytes(4096), RNG.integers(0, 256, 4096, np.uint8).tobytes(), np.arange(1024, dtype="<i4").tobytes()):
        assert not POINTS.sniff(other, "a.bin")
    for floats in (RNG.normal(size=512), np.sin(np.arange(512))):  # an embedding, a sound
        assert not POINTS.sniff(floats.astype("<f4").tobytes(), "a.bin")
    assert not POINTS.sniff(RNG.uniform(0, 9, 500).astype("<f4").tobytes(), "a.pcd.bin")  # a ring is a whole number
    assert not POINTS.sniff(raw(4)[:4096], "a.dat")
    with pytest.raises(DataError, match="4790 bytes, no multiple of 16"):
        load(raw(4)[:-10], "a.bin")
    with pytest.raises(LimitError, match="vertices"):
        load(raw(4), "a.bin", limits=Limits(vertices=10))


# ---------------------------------------------------------------- columns of the byte array


def write_materials(folder: Path, suffix: str, count: int, seed: int) -> None:
    """Write clouds of one shape in three classes that only the strength of their echo tells apart."""
    rng = np.random.default_rng(seed)
    for strength, name in ((20, "grass"), (90, "asphalt"), (160, "paint")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            xyz = rng.uniform(-10, 10, (128, 3)).astype(np.float32) * np.array([1, 1, 0.1], np.float32)
            intensity = np.clip(rng.normal(strength, 12, 128), 0, 255).astype(np.uint16)
            path = folder / name / f"{i}{suffix}"
            if suffix == ".pcd":
                path.write_bytes(pcd(("ascii", "binary")[i % 2], xyz, intensity, np.zeros((128, 3), np.uint8)))
                continue
            laspy = pytest.importorskip("laspy")
            cloud = laspy.create(point_format=0)
            cloud.header.scales = [0.001] * 3
            cloud.x, cloud.y, cloud.z = xyz.astype(np.float64).T
            cloud.intensity = intensity * 256
            cloud.write(str(path))


SMALL = [
    *("--preset", "tiny-points", "--device", "cpu", "--steps", "40", "--batch-size", "8"),
    *("--set", "inputs.points.num_points=64", "--set", "inputs.points.bands=2", "--set", "model.num_latents=8"),
    *("--set", "model.latent_channels=32", "--set", "train.lr=0.01", "--set", "inputs.points.stem=none"),
]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pcd", ".las"])
def test_intensity_beats_positions_alone(perceive: Perceive, tmp_path: Path, suffix: str) -> None:
    for split, count in (("train", 12), ("test", 6)):
        write_materials(tmp_path / "d" / split, suffix, count, seed=len(split))
    accuracy = {}
    for name, more in (("xyz", []), ("intensity", ["--set", 'inputs.points.columns=["intensity"]'])):
        done = perceive("train", "d", *SMALL, *more, "-o", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = perceive("evaluate", "d", "-m", name, "--device", "cpu", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        accuracy[name] = json.loads(done.stdout)["accuracy"]
    assert accuracy["intensity"] > 0.9
    assert accuracy["xyz"] < 0.7
    config = (tmp_path / "intensity" / "config.toml").read_text()
    assert 'columns = [\n    "intensity",\n]' in config
    assert "\ncolumns" not in (tmp_path / "xyz" / "config.toml").read_text()
    if suffix == ".pcd":
        after_training(perceive, tmp_path)


def after_training(perceive: Perceive, place: Path) -> None:
    """Records, their predictions, `info`, `explain` and an export know the columns."""
    cpu = ("--device", "cpu")

    def run(*arguments: str) -> bytes:
        done = perceive(*arguments, cwd=place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    files = run("predict", "d/test", "-m", "intensity", *cpu, "--all-probs").splitlines()
    run("preprocess", "d/test", "-m", "intensity", "-o", "decoded.tar")
    run("preprocess", "d/test", "-m", "intensity", "-o", "fourier.tar", "--fourier")
    for records in ("decoded.tar", "fourier.tar"):
        rows = run("predict", records, "-m", "intensity", *cpu, "--all-probs").splitlines()
        for one, other in zip(map(json.loads, files), map(json.loads, rows), strict=True):
            assert one["probs"] == pytest.approx(other["probs"], rel=1e-3, abs=1e-5)
    run("preprocess", "d/train", "-m", "intensity", "-o", "views.tar", "--augment", "2")
    run("train", "views.tar", *SMALL, "--set", 'inputs.points.columns=["intensity"]', "--steps", "2", "-o", "again")
    refused = perceive("predict", "decoded.tar", "-m", "xyz", *cpu, cwd=place)
    assert b'prepared with inputs.points.columns = ["intensity"], but the model has []' in refused.stderr
    assert json.loads(run("info", "intensity", "--json"))["inputs"]["points"]["channels"] == 3 * 5 + 1
    run("explain", "d/test/grass/0.pcd", "-m", "intensity", "-o", "x.ply", *cpu)
    run("explain", "d/test/grass/0.pcd", "-m", "intensity", "-o", "x.png", *cpu)
    facts = json.loads(run("explain", "d/test/grass/0.pcd", "-m", "intensity", "--json", *cpu))["inputs"]["points"]
    assert facts["columns"] == ["x", "y", "z", "intensity", "heat", "attention"]
    assert {len(row) for row in facts["points"]} == {6}
    run("export", "intensity", "-o", "x.pt2")


def test_points_that_are_left_out_are_told(perceive: Perceive, tmp_path: Path) -> None:
    write_materials(tmp_path / "d", ".pcd", 4, 0)
    path = tmp_path / "d" / "grass" / "0.pcd"
    xyz = RNG.uniform(-10, 10, (128, 3)).astype(np.float32)
    xyz[:3] = np.nan
    path.write_bytes(pcd("binary", xyz, np.zeros(128, np.uint16), np.zeros((128, 3), np.uint8)))
    told = b"left out 3 of 128 points that are not finite numbers"
    done = perceive("train", "d", *SMALL, "--steps", "2", "-o", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"1 file read in part, the first 'grass/0.pcd': " + told in done.stderr
    done = perceive("lint", "d", cwd=tmp_path)
    assert b"1 file read in part, the first 'grass/0.pcd': " + told in done.stderr
    done = perceive("predict", "d/grass/0.pcd", "d/grass/1.pcd", "-m", "run", "--device", "cpu", cwd=tmp_path)
    one, other = map(json.loads, done.stdout.splitlines())
    assert one["notes"] == [told.decode()]
    assert "notes" not in other
    done = perceive("explain", "d/grass/0.pcd", "-m", "run", "--device", "cpu", "--json", cwd=tmp_path)
    assert told.decode() in json.loads(done.stdout)["notes"]
