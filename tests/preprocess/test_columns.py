"""Columns of points: found by name in each format, scaled, turned with the points, and absent unless they are named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.config import Config, load_preset
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.preprocess.points import MODALITY as POINTS, PointsSpec, estimated_normals
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.format import Header
from tests.preprocess.test_point_tables import npy, text, with_normals
from tests.preprocess.test_points import exported

trimesh = pytest.importorskip("trimesh")

RNG = np.random.default_rng(0)
side = np.hstack
COLOURS, NORMALS = ("red", "green", "blue"), ("nx", "ny", "nz")
XYZ = RNG.uniform(-1, 1, (50, 3))
RGB = RNG.integers(0, 256, (50, 3))
UNIT = with_normals(50)[:, 3:6]
ECHO = RNG.integers(0, 200, (50, 1))


def load(data: bytes, name: str, *columns: str) -> np.ndarray:
    return POINTS.load(Source(name, data), PointsSpec(pool_points=100, num_points=64, columns=columns), Limits())


def ply(kind: str, colour: str = "uchar", names: tuple[str, ...] = COLOURS) -> bytes:
    head = f"ply\nformat {kind} 1.0\nelement vertex 50\n" + "".join(f"property float {axis}\n" for axis in "xyz")
    head += "".join(f"property {colour} {name}\n" for name in names) + "property float scalar_Intensity\nend_header\n"
    values = RGB if colour == "uchar" else RGB / 255
    if kind == "ascii":
        rows = zip(XYZ.tolist(), values.tolist(), ECHO.tolist(), strict=True)
        return head.encode() + "".join(" ".join(map(str, [*p, *c, *i])) + "\n" for p, c, i in rows).encode()
    form = "<3f3Bf" if colour == "uchar" else "<7f"
    rows = zip(XYZ.tolist(), values.tolist(), ECHO.tolist(), strict=True)
    return head.encode() + b"".join(struct.pack(form, *p, *c, *i) for p, c, i in rows)


TABLES = {
    "4.xyz": (text(side([XYZ, ECHO])), ("intensity",), ECHO),
    "6.xyz": (text(side([XYZ, RGB])), COLOURS, RGB / 255),
    "unit.xyz": (text(side([XYZ, RGB / 255])), COLOURS, RGB / 255),
    "6n.xyz": (text(side([XYZ, UNIT])), NORMALS, UNIT),
    "7.pts": (b"50\n" + text(side([XYZ, ECHO, RGB])), ("intensity", *COLOURS), side([ECHO, RGB / 255])),
    "9.xyz": (text(side([XYZ, RGB, UNIT])), (*NORMALS, *COLOURS), side([UNIT, RGB / 255])),
    "10.asc": (text(side([XYZ, ECHO, UNIT, RGB])), ("intensity", *NORMALS), side([ECHO, UNIT])),
    "names.xyz": (
        b"//X Y Z Nz Ny Nx Scalar_Intensity\n" + text(side([XYZ, UNIT[:, ::-1], ECHO])),
        (*NORMALS, "intensity"),
        side([UNIT, ECHO]),
    ),
    "named.csv": (
        b"x,y,z,Reflectance,curvature\n" + text(side([XYZ, ECHO, ECHO + 1]), ","),
        ("curvature", "intensity"),
        side([ECHO + 1, ECHO]),
    ),
    "number.xyz": (text(side([XYZ, ECHO])), ("4",), ECHO),
    "label.txt": (text(side([XYZ, UNIT, ECHO])), ("7", *NORMALS), side([ECHO, UNIT])),
    "a.npy": (npy(side([XYZ, ECHO])), ("intensity",), ECHO),
    "n.npy": (npy(side([XYZ, UNIT]).astype(np.float32)), NORMALS, UNIT),
    "a.obj": (b"".join(b"v " + line for line in text(side([XYZ, RGB / 255])).splitlines(True)), COLOURS, RGB / 255),
    "ascii.ply": (ply("ascii"), (*COLOURS, "intensity"), side([RGB / 255, ECHO])),
    "binary.ply": (ply("binary_little_endian"), (*COLOURS, "intensity"), side([RGB / 255, ECHO])),
    "float.ply": (ply("binary_little_endian", "float"), COLOURS, RGB / 255),
    "diffuse.ply": (ply("ascii", names=("diffuse_red", "diffuse_green", "diffuse_blue")), COLOURS, RGB / 255),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_found_by_name(name: str) -> None:
    data, columns, values = TABLES[name]
    points = load(data, name, *columns)
    assert points.dtype == np.float32
    assert np.allclose(points[:, 3:], values, atol=1e-5)
    assert np.array_equal(points[:, :3], load(data, name))
    assert np.array_equal(load(data, name, *columns[::-1])[:, 3:], points[:, 3:][:, ::-1])


def test_a_missing_column_is_a_line() -> None:
    data = text(side([XYZ, ECHO]))
    with pytest.raises(DataError, match=r"'a.xyz': no column red: its columns are '4', 'intensity'; change inputs"):
        load(data, "a.xyz", "red")
    with pytest.raises(DataError, match="no column intensity: its columns are none besides x, y, z"):
        load(exported("stl"), "a.stl", "intensity")
    with pytest.raises(DataError, match="no column nz: its columns are 'nx', 'ny'"):
        load(b"x,y,z,nx,ny\n" + text(side([XYZ, UNIT[:, :2]]), ","), "a.csv", *NORMALS)


def test_normals_of_a_cloud_without_any_are_those_of_the_plane_through_neighbours() -> None:
    ball = RNG.normal(size=(2000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    source = Source("ball.xyz", text(side([5 + 0.1 * ball, XYZ[:1, :1] * np.ones((2000, 1))])))
    spec = PointsSpec(columns=("intensity", *NORMALS), pool_points=2000)
    points = POINTS.load(source, spec, Limits())
    outwards = (points[:, 4:] * (points[:, :3] - points[:, :3].mean(axis=0)) * 10).sum(axis=1)
    assert np.quantile(outwards, 0.01) > 0.95
    assert np.allclose(np.linalg.norm(points[:, 4:], axis=1), 1, atol=1e-6)
    assert source.notes == ["no normals: estimated from the neighbours of each point"]
    plane = side([RNG.random((300, 2)), np.zeros((300, 1))])
    assert np.allclose(np.abs(estimated_normals(plane)), (0, 0, 1))
    assert np.isfinite(estimated_normals(np.array([[0.0, 0, 0], [1, 0, 0]]))).all()
    assert np.isfinite(estimated_normals(np.repeat(plane[:2], 50, axis=0) * 1e25)).all()  # many at one place


def test_a_column_that_is_not_finite_drops_its_point() -> None:
    rows = side([XYZ, ECHO]).astype(float)
    rows[7, 3] = np.nan
    source = Source("a.npy", npy(rows))
    points = POINTS.load(source, PointsSpec(pool_points=100, columns=("intensity",)), Limits())
    assert len(points) == 49
    assert source.notes == ["left out 1 of 50 points that are not finite numbers"]
    assert len(load(npy(rows), "a.npy")) == 50  # nothing is wrong with its place


@pytest.mark.parametrize("kind", ["stl", "ply", "obj", "off", "glb"])
def test_normals_of_a_mesh_are_those_of_its_faces(kind: str) -> None:
    points = load(exported(kind), f"a.{kind}", *NORMALS)
    assert np.array_equal(points[:, :3], load(exported(kind), f"a.{kind}"))
    sides = np.abs(points[:, :3]).argmax(axis=1)
    assert np.allclose(points[:, 3:], np.eye(3)[sides] * np.sign(points[:, :3]), atol=1e-5)


def test_colours_are_interpolated_in_a_face() -> None:
    """Red is x and green is y at the corners, so they are in between."""
    corners = [(0, 0), (1, 0), (0, 1)]
    data = "".join(f"v {x} {y} 0 {x} {y} 0\n" for x, y in corners) + "f 1 2 3\n"
    points = load(data.encode(), "a.obj", "red", "green")
    assert np.allclose(points[:, 3:], points[:, :2], atol=1e-6)


# ---------------------------------------------------------------- the byte array


def prepared(raw: np.ndarray, seed: int | None, **options: object) -> tuple[np.ndarray, np.ndarray]:
    rng = None if seed is None else np.random.default_rng(seed)
    made = POINTS.prepare(raw, PointsSpec.model_validate({"num_points": len(raw), **options}), rng)
    assert made.positions is not None
    return made.positions.astype(np.float64), made.values.astype(np.float64)


SPHERE = (lambda x: side([x, x, np.arange(500)[:, None]]).astype(np.float32))(with_normals(500)[:, 3:6])
ALL = (*NORMALS, "ring")


@pytest.mark.parametrize(
    "options",
    [{"rotate": "any"}, {"rotate": "z"}, {"mirror": ["x", "z"]}, {"mirror": ["y"], "rotate": "y"}, {"jitter": 0.0}],
)
def test_normals_turn_with_the_points(options: dict[str, object]) -> None:
    """On a sphere the normal is the position, before and after."""
    for seed in range(5):
        positions, values = prepared(SPHERE, seed, columns=ALL, point_scale=(1.0, 1.0), **options)
        outward = positions - positions.mean(0)
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        assert np.abs((outward * values[:, :3]).sum(axis=1)).min() > 0.99
        assert (outward * values[:, :3]).sum(axis=1).min() > 0.99
        assert np.allclose(np.linalg.norm(values[:, :3], axis=1), 1, atol=1e-5)
        assert sorted(values[:, 3]) == list(range(500))  # which no augmentation touches


def test_normals_of_a_stretched_surface_stay_perpendicular() -> None:
    """A plane through x + y = 0 that is stretched: its normal follows by the inverse."""
    along = RNG.uniform(-1, 1, (400, 2))
    raw = side([along[:, :1], -along[:, :1], along[:, 1:], np.tile([0.5**0.5, 0.5**0.5, 0.0], (400, 1))])
    positions, values = prepared(raw.astype(np.float32), 3, columns=NORMALS, stretch=(0.3, 3.0), point_scale=(1.0, 1.0))
    between = positions[1:] - positions[:-1]
    assert np.abs((between * values[:-1]).sum(axis=1)).max() < 1e-4


def test_without_columns_nothing_changes() -> None:
    spec = PointsSpec()
    dumped = spec.model_dump(mode="json")
    assert not {"columns", "mean", "std"} & dumped.keys()
    assert not {"columns", "mean", "std"} & load_preset("modelnet40").to_dict()["inputs"]["points"].keys()
    assert b"columns" not in Header({"points": spec}).to_json()
    assert Header({"points": spec}).hash == "e81a4f6c8291790e"
    layout = POINTS.layout(spec)
    assert (layout.channels, layout.mean, layout.std) == (0, (0.0,), (1.0,))
    raw = RNG.normal(size=(300, 3)).astype(np.float32)
    for seed in (None, 4):
        positions, values = prepared(raw, seed, rotate="any", stretch=(0.5, 2.0), mirror=["x"], jitter=0.01)
        assert values.shape == (300, 0)
        wide = side([raw, raw]).astype(np.float32)
        same, _ = prepared(
            wide, seed, rotate="any", stretch=(0.5, 2.0), mirror=["x"], jitter=0.01, columns=("a", "b", "c")
        )
        assert np.array_equal(positions, same)


def test_options_travel(tmp_path: Path) -> None:
    config = load_preset("tiny-points").override(['inputs.points.columns=["intensity"]', "inputs.points.mean=[3]"])
    again = Config.parse(config.to_dict(), "x")
    assert again == config
    spec = again.inputs["points"]
    assert isinstance(spec, PointsSpec)
    assert (spec.columns, spec.mean, spec.std) == (("intensity",), (3.0,), "auto")


def test_mean_and_deviation_come_from_the_training_files() -> None:
    rows = side([XYZ, 100 + 10 * RNG.normal(size=(50, 1)), UNIT])
    source = Source("a.npy", npy(rows))
    spec = PointsSpec(columns=("4", "nx", "ny", "nz"))
    settled = POINTS.resolve(spec, [source, source], Limits())
    assert settled.mean == (pytest.approx(rows[:, 3].mean(), rel=1e-3), 0, 0, 0)
    assert settled.std == (pytest.approx(rows[:, 3].std(), rel=1e-3), 1, 1, 1)
    layout = POINTS.layout(settled)
    assert layout.channels == 4
    assert layout.num_channels == 387 + 4
    assert layout.mean == settled.mean
    assert POINTS.resolve(spec, [], Limits()).mean == (0, 0, 0, 0)
    same = PointsSpec(columns=("4",), mean=(1.0,), std=(2.0,))
    assert POINTS.resolve(same, [source], Limits()) == same
    constant = POINTS.resolve(
        PointsSpec(columns=("4",)), [Source("a.npy", npy(side([XYZ, XYZ[:, :1] * 0 + 5])))], Limits()
    )
    assert (constant.mean, constant.std) == ((5.0,), (1.0,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": ("x",)}, "x, y or z, or a name twice"),
        ({"columns": ("a", "a")}, "a name twice"),
        ({"columns": ("nx", "ny")}, "expected all"),
        ({"columns": ("a",), "mean": (1.0, 2.0)}, "inputs.points.mean has 2 numbers, expected 1"),
        ({"columns": ("a",), "std": (1.0, 2.0)}, "inputs.points.std has 2 numbers, expected 1"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        POINTS.layout(PointsSpec.model_validate(options))
