"""Points: every format gives the same surface, false claims cost nothing, nothing outside the file is touched."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.data.model_inputs import graph_inputs
from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.image import MODALITY as IMAGE, ImageSpec
from perceiver_cli.preprocess.mesh_files import read_mesh
from perceiver_cli.preprocess.points import MODALITY as POINTS, PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

trimesh = pytest.importorskip("trimesh")  # also here, so that no timing or memory below counts the import

LIMITS = Limits()
SPEC = PointsSpec(pool_points=2000, num_points=256)
CUBE = trimesh.creation.box((2, 2, 2))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def xyz(points: np.ndarray, gap: str = " ") -> bytes:
    return "".join(gap.join(map(str, point)) + "\n" for point in points.tolist()).encode()


def exported(kind: str, mesh: object = CUBE, **options: object) -> bytes:
    data = mesh.export(file_type=kind, **options)  # type: ignore[attr-defined]
    return data.encode() if isinstance(data, str) else data


BINARY_PLY = "ply\nformat binary_little_endian 1.0\nelement vertex {}\nproperty float x\nproperty float y\n"
BINARY_PLY += "property float z\n{}end_header\n"
ON_CUBE = CUBE.sample(500, seed=3)
FORMATS = {
    "binary.stl": exported("stl"),
    "solid.stl": b"solid but binary".ljust(80) + exported("stl")[80:],
    "ascii.stl": exported("stl_ascii"),
    "binary.ply": exported("ply"),
    "ascii.ply": exported("ply", encoding="ascii"),
    "a.obj": exported("obj"),
    "a.off": exported("off"),
    "a.glb": exported("glb"),
    "a.xyz": b"# x y z\n" + xyz(ON_CUBE),
    "comma.txt": xyz(ON_CUBE, ", "),
    "colour.xyz": xyz(np.hstack([ON_CUBE, ON_CUBE])),
    "a.npy": npy(ON_CUBE),
    "float32.npy": npy(np.asfortranarray(np.hstack([ON_CUBE, ON_CUBE]).astype(np.float32))),
    "integers.npy": npy(np.sign(ON_CUBE).astype(np.int16)),
}


def load(data: bytes, name: str = "x", spec: PointsSpec = SPEC, limits: Limits = LIMITS) -> np.ndarray:
    return POINTS.load(Source(name, data), spec, limits)


def prepare(raw: np.ndarray, seed: int | None = None, **spec: object) -> np.ndarray:
    rng = None if seed is None else np.random.default_rng(seed)
    made = POINTS.prepare(raw, PointsSpec.model_validate({"num_points": len(raw), **spec}), rng)
    assert made.positions is not None
    assert made.positions.dtype == np.float32
    assert made.values.shape == (len(made.positions), 0)
    return made.positions


def refused(data: bytes, name: str = "x", limits: Limits = LIMITS) -> DataError:
    """Return the DataError that `data` meets, which is one line, quick and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            load(data, name, limits=limits)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    start = time.process_time()  # of the processor, which others may share; now without imports and without counting
    with pytest.raises(DataError):
        load(data, name, limits=limits)
    assert time.process_time() - start < 0.5
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"'{name}': ")
    return caught.value


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_points_on_the_cube(name: str, tmp_path: Path) -> None:
    data = FORMATS[name]
    named = "points" if name[-3:] in ("txt", "npy") else None  # any table could have such a name
    assert detected(Source(name, data), named).kinds[0] == "points"
    points = load(data, name)
    assert points.dtype == np.float32
    mesh = name[-3:] not in ("xyz", "txt", "npy")
    assert points.shape == ((2000 if mesh else 500), 3)
    assert np.abs(np.abs(points).max(1) - 1).max() < 1e-5
    assert np.abs(points.mean(0)).max() < 0.15  # all sides, not one
    assert np.array_equal(points, load(data, name))
    (tmp_path / name).write_bytes(data)
    assert np.array_equal(points, POINTS.load(Source(str(tmp_path / name)), SPEC, LIMITS))


def test_samples_are_in_proportion_to_area_in_every_prefix() -> None:
    # Areas 1/2 and 9/2: the small triangle lies below z = 0.5.
    corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [0, 3, 1], [5, 5, 5]]
    faces = "f 1 2 3\nf 4 5 6\nf 7 7 7\n"
    data = "".join(f"v {x} {y} {z}\n" for x, y, z in corners) + faces
    points = load(data.encode(), spec=PointsSpec(pool_points=20_000))
    for count in (1000, 20_000):
        share = (points[:count, 2] < 0.5).mean()
        assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / count)
    large = points[points[:, 2] > 0.5]
    assert (large[:, :2] >= 0).all()
    assert large[:, :2].sum(1).max() <= 3 + 1e-5
    assert np.allclose(large.mean(0), [1, 1, 1], atol=4 * 0.71 / np.sqrt(len(large)))  # uniform in the triangle


def test_obj_polygons_relative_numbers_groups_and_continued_lines() -> None:
    square = b"mtllib ../../etc/passwd\no one\nv 0 0 0\nv 1 0 0 \\\n\nv 1 1 0\nv 0 1 0\nusemtl red\nf 1/1/1 2/2/1 3 4\n"
    other = b"o two\nvn 0 0 1\nv 0 0 5 # corner\r\nv 1 0 5\r\nv 0 1 5\r\ng b\nf -3//1 -2//1 -1//1\n"
    points = load(square + other)
    assert abs((points[:, 2] == 0).mean() - 2 / 3) < 0.05
    assert (points[points[:, 2] == 0].sum(1) > 1).mean() > 0.4  # both halves of the square
    alone = load(b"o x\n" + other.partition(b"\n")[2].replace(b"f -3", b"# -3"))
    assert alone.tolist() == [[0, 0, 5], [1, 0, 5], [0, 1, 5]]  # without faces, the vertices


def test_binary_ply_of_mixed_polygons_and_any_byte_order() -> None:
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]], np.float32)
    for order, name in (("<", "little"), (">", "big")):
        head = BINARY_PLY.replace("little", name).replace("property float x", "property uchar red\nproperty float x")
        head = head.format(7, "element face 2\nproperty list uchar int vertex_indices\nproperty float quality\n")
        body = b"".join(struct.pack(f"{order}B3f", 200, *corner) for corner in corners)
        square, triangle = struct.pack(f"{order}B4if", 4, 0, 1, 2, 3, 1.0), struct.pack(f"{order}B3if", 3, 4, 5, 6, 1.0)
        for faces in (square + triangle, triangle + square):
            points = load(head.encode() + body + faces)
            assert points.shape == (2000, 3)
            assert abs((points[:, 2] == 0).mean() - 2 / 3) < 0.05
            assert set(points[:, 2]) == {0, 5}
            refused(head.encode() + body + faces[:-1])
        negative = head.replace("uchar int", "char int").encode() + body + struct.pack(f"{order}b", -1) + bytes(40)
        refused(negative)


def test_glb_meshes_are_shown_where_nodes_put_them() -> None:
    scene = trimesh.Scene()
    scene.add_geometry(CUBE, node_name="here")
    for i in range(1, 4):
        move = trimesh.transformations.translation_matrix([10 * i, 0, 0])
        scene.add_geometry(CUBE, node_name=f"n{i}", parent_node_name="here", transform=move)
    data = exported("glb", scene)
    points = load(data)
    places = np.round(points[:, 0] / 10)
    assert set(places) == {0, 1, 2, 3}
    assert np.abs(np.abs(points - np.stack([10 * places, 0 * places, 0 * places], 1)).max(1) - 1).max() < 1e-5
    assert np.array_equal(points, load(data))


def test_no_area_gives_the_vertices_and_many_vertices_a_fixed_subset() -> None:
    flat = b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"
    assert load(flat).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    many = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    points = load(npy(many))
    assert points.shape == (2000, 3)
    assert len(np.unique(points, axis=0)) == 2000
    assert set(map(bytes, points)) <= set(map(bytes, many))
    assert np.array_equal(points, load(npy(many)))


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b"ply\nformat", "a", True),
        (b"OFF\n8 6 0", "a", True),
        (b"COFF 8 6 0", "a", True),
        (b"glTF\2\0\0\0", "a", True),
        (b"solid x\n facet normal", "a", True),
        (b"solid ground under our feet", "a.txt", False),
        (b"\0" * 84, "A.STL", True),
        (b"\0" * 84, "a", False),
        (b"# made by hand\n\nv 1 2 3\n", "a", True),
        (b"o cube\ng x\nusemtl y\n", "a", True),
        (b"1 2 3\n4 5 6\n-1e5 .5 2.\n", "a", False),
        (b"1 2 3\n4 5 6\n-1e5 .5 2.\n", "A.XYZ", True),
        (b"1 2\n3 4\n", "a.xyz", False),
        (b"1 2 3\nlabel\n", "a.xyz", False),
        (b"1 2 3\nlabel\n", "a.csv", False),
        (b"Dear reader,\n", "a.txt", False),
        (b"# nothing\n", "a.txt", False),
        (b"", "a.obj", False),
    ],
)
def test_sniff(head: bytes, name: str, expected: bool) -> None:
    assert POINTS.sniff(head, name) is expected


# ---------------------------------------------------------------- prepare and layout


def test_layout_is_the_papers() -> None:
    layout = POINTS.layout(PointsSpec())
    assert layout.num_inputs == 2048
    assert layout.num_channels == 387
    assert layout.max_resolution == (2240, 2240, 2240)
    assert not layout.is_grid
    with pytest.raises(UsageError, match="patch"):
        POINTS.layout(PointsSpec(patch=(2,)))


def test_positions_fill_the_unit_cube_about_their_mean() -> None:
    raw = (np.random.default_rng(0).normal(size=(1000, 3)) * [1, 20, 3] + [500, -7, 2]).astype(np.float32)
    for seed in (None, 1):
        positions = prepare(raw, seed, rotate="any", stretch=(0.5, 2.0))
        assert np.abs(positions).max() == 1
        assert np.abs(positions.mean(0)).max() < 1e-5
    centred = raw - raw.mean(0)
    assert np.abs(prepare(raw) - centred / np.abs(centred).max()).max() < 1e-5


def test_equal_points_and_huge_points() -> None:
    assert not prepare(np.full((100, 3), 0.1, np.float32)).any()
    assert not prepare(np.full((100, 3), 0.1, np.float32), 0).any()
    assert prepare(np.ones((1, 3), np.float32), num_points=4).tolist() == [[0, 0, 0]] * 4
    for size in (1e30, 1e-30):
        huge = (np.random.default_rng(0).uniform(-1, 1, (2048, 3)) * size).astype(np.float32)
        assert np.abs(prepare(huge, 1, rotate="y")).max() == 1


def test_each_point_is_scaled_by_its_own_factor_about_the_centre() -> None:
    half = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    raw = np.concatenate([half, -half])  # its mean is zero, and stays near it
    factors = {}
    for scale in ((1.0, 1.0), (0.9, 1.3)):
        positions = prepare(raw, 0, point_scale=scale).astype(np.float64)
        factors[scale] = np.linalg.norm(positions, axis=1)
    # The same seed draws the points in the same order; the ratio of lengths is the factor, up to one common number.
    ratio = factors[0.9, 1.3] / factors[1.0, 1.0]
    low, high = np.quantile(ratio, [0.05, 0.95])
    assert abs(low / high - 0.92 / 1.28) < 0.03
    assert ratio.std() / ratio.mean() == pytest.approx(0.4 / np.sqrt(12) / 1.1, rel=0.1)


@pytest.mark.parametrize("axis", ["x", "y", "z", "any"])
def test_rotation_keeps_shape_and_handedness(axis: str) -> None:
    frame = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    raw = np.concatenate([frame, -frame])
    turned = [prepare(raw, seed, rotate=axis, point_scale=(1.0, 1.0)).astype(np.float64) for seed in range(30)]
    for positions in turned:
        lengths = np.linalg.norm(positions, axis=1)
        assert np.allclose(lengths[lengths > 1e-6], lengths.max(), rtol=1e-4)
    if axis != "any":
        fixed = "xyz".index(axis)
        assert all(np.isclose(np.abs(p[:, fixed]).max(), np.linalg.norm(p, axis=1).max(), rtol=1e-4) for p in turned)
    assert len({positions.tobytes() for positions in turned}) == 30
    from perceiver_cli.preprocess.points import random_rotation

    turns = [random_rotation(axis, np.random.default_rng(seed)).astype(np.float64) for seed in range(2000)]
    assert np.allclose(np.linalg.det(turns), 1, atol=1e-5)
    assert np.allclose(turns[0] @ turns[0].T, np.eye(3), atol=1e-6)
    mean = np.eye(3)["xyz".index(axis)] if axis != "any" else np.zeros(3)
    assert np.abs(np.mean(turns, axis=0).diagonal() - mean).max() < 0.07


def test_points_are_drawn_without_repeats_while_there_are_enough() -> None:
    raw = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    drawn = prepare(raw, 0, num_points=200)
    assert len(np.unique(drawn, axis=0)) == 200
    repeated = prepare(raw, 0, num_points=700, point_scale=(1.0, 1.0))
    assert sorted(set(np.unique(repeated, axis=0, return_counts=True)[1])) == [2, 3]
    first = prepare(raw, num_points=200)
    assert np.array_equal(first, prepare(raw[:200]))
    assert np.array_equal(prepare(raw, num_points=700), prepare(raw[np.arange(700) % 300]))
    assert np.array_equal(drawn, prepare(raw, 0, num_points=200))
    assert not np.array_equal(drawn, prepare(raw, 1, num_points=200))


# ---------------------------------------------------------------- hostile files


def glb(tree: bytes | dict[str, object], binary: bytes = b"") -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    if binary:
        chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def glb_tree(**changes: object) -> dict[str, object]:
    """Return a glTF of one triangle in 36 bytes, changed."""
    return {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "scene": 0,
        **changes,
    }


TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
VEC3 = {"componentType": 5126, "type": "VEC3"}


class Canary:
    """Unpickled, it makes a folder."""

    path = ""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (Canary.path,)


HOSTILE = {
    "ply vertices": (BINARY_PLY.format(10**12, "").encode() + bytes(120), "declared at least"),
    "ply ascii": (
        b"ply\nformat ascii 1.0\nelement vertex 1000000000000\nproperty float x\nend_header\n1\n",
        "declared",
    ),
    "ply ascii short": (FORMATS["ascii.ply"][:-10], "declared 20 lines, found 19"),
    "ply binary short": (FORMATS["binary.ply"][:-1], "the PLY ends inside its data"),
    "ply negative": (BINARY_PLY.format(-5, "").encode(), "negative count"),
    "ply properties": (BINARY_PLY.format(1, "property float a\n" * 2000).encode() + bytes(9000), "properties"),
    "ply long header": (BINARY_PLY.format(1, "property float a\n" * 200_000).encode(), "no end of the PLY header"),
    "ply no header": (b"ply\nformat ascii 1.0\n", "no end of the PLY header"),
    "ply list": (
        BINARY_PLY.format(1, "element face 1\nproperty list uint int vertex_indices\n").encode()
        + bytes(12)
        + struct.pack("<I", 2**32 - 1),
        "",
    ),
    "ply texture": (
        BINARY_PLY.format(0, "comment TextureFile ../../etc/passwd\n").encode(),
        "no points",
    ),
    "stl count": (bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(500), "declared 4294967295 triangles"),
    "stl short": (FORMATS["binary.stl"][:-1], "declared 12 triangles"),
    "stl empty": (bytes(84), "no points"),
    "stl no solid": (b"solid x\nendsolid x\n", "found 19"),
    "stl ascii short": (FORMATS["ascii.stl"][:1000], "ends inside a facet"),
    "stl words": (FORMATS["ascii.stl"].replace(b"vertex 1.0", b"vertex one", 1), ""),
    "off": (b"OFF\n1000000000000 10 0\n0 0 0\n", "declared at least"),
    "off long": (b"OFF\n" + b"9" * 5000 + b" 1 0\n", "no counts"),
    "off index": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n", ""),
    "obj index": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 1000000000\n", "names vertex 999999999, found 3 vertices"),
    "obj negative": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 -4\n", "names vertex -1"),
    "obj zero": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 0\n", "names vertex -1"),
    "obj huge": (b"v 0 0 0\nf 1 1 " + b"9" * 4000 + b"\n", ""),
    "obj words": (b"v 0 0 zero\n", ""),
    "obj empty": (b"o nothing\n", "no points"),
    "obj nan": (b"v 0 0 nan\nv 1 1 1\nv 0 1 0\nf 1 2 3\n", "not finite"),
    "obj far": (b"v 0 0 1e31\nv 1 1 1\n", "beyond 1e+30"),
    "xyz ragged": (b"1 2 3\n" * 2000 + b"4 5\n", ""),
    "npy claim": (
        npy(np.zeros((1, 3)))[:128].replace(b"(1, 3), }", b"(333333333333, 3), }")[:128] + bytes(24),
        "vertices",
    ),
    "npy short": (npy(ON_CUBE)[:-1], "declared 12000 bytes of numbers, found 11999"),
    "npy long": (npy(ON_CUBE) + b"x", "found 12001"),
    "npy turned": (npy(ON_CUBE.T), "expected (points, 3)"),
    "npy flat": (npy(np.zeros(9)), "expected (points, 3)"),
    "npy text": (npy(np.full((4, 3), "a")), "expected numbers"),
    "npy empty": (npy(np.zeros((0, 3))), "no points"),
    "npy nan": (npy(np.full((4, 3), np.nan)), "not finite"),
    "npy header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", ""),
    "glb count": (glb(glb_tree(accessors=[{"count": 10**10, **VEC3}]), TRIANGLE), "--limit vertices=10000000000 "),
    "glb view": (
        glb(glb_tree(accessors=[{"bufferView": 0, "count": 1000, **VEC3}]), TRIANGLE),
        "declared at least 12000",
    ),
    "glb view size": (glb(glb_tree(bufferViews=[{"buffer": 0, "byteLength": 10**9}]), TRIANGLE), "declared at least"),
    "glb negative": (glb(glb_tree(accessors=[{"count": -1, **VEC3}]), TRIANGLE), "not a whole number"),
    "glb views": (
        glb(glb_tree(bufferViews=[{"buffer": 0, "byteLength": 100_000}] * 12_000), bytes(100_000)),
        "decoded",
    ),
    "glb accessors": (glb(glb_tree(accessors=[{"count": 9_000_000, **VEC3}] * 20), TRIANGLE), "decoded_bytes"),
    "glb instances": (
        glb(glb_tree(accessors=[{"count": 9_000_000, **VEC3}], nodes=[{"mesh": 0}] * 9), TRIANGLE),
        "--limit vertices=81000000 ",
    ),
    "glb primitives": (
        glb(
            glb_tree(
                accessors=[{"count": 9_000_000, **VEC3}],
                meshes=[{"primitives": [{"attributes": {"POSITION": 0}}] * 9}],
            ),
            TRIANGLE,
        ),
        "vertices",
    ),
    "glb uri": (glb(glb_tree(buffers=[{"byteLength": 36, "uri": "../../etc/passwd"}])), "external reference refused"),
    "glb http": (glb(glb_tree(buffers=[{"byteLength": 36, "uri": "http://h/x"}])), "external reference refused"),
    "glb cycle": (glb(glb_tree(nodes=[{"children": [1]}, {"children": [0]}]), TRIANGLE), ""),
    "glb parents": (glb(glb_tree(nodes=[{"children": [1, 1]}, {"mesh": 0}]), TRIANGLE), "two parents"),
    "glb chain": (
        glb(glb_tree(nodes=[{"mesh": 0, "children": [i + 1]} for i in range(9000)] + [{}]), TRIANGLE),
        "deep",
    ),
    "glb nodes": (glb(glb_tree(nodes=[{}] * 20_000)), "nodes"),
    "glb depth": (glb(b"[" * 200_000), ""),
    "glb list": (glb(b"[]"), ""),
    "glb chunk": (glb(glb_tree())[:12] + struct.pack("<I", 2**32 - 1) + b"JSON{}", "declared at least 4294967315"),
    "glb short": (FORMATS["a.glb"][:-1], "declared at least"),
    "glb stub": (b"glTF\2\0\0\0", "ends inside the GLB header"),
    "gltf": (json.dumps(glb_tree(buffers=[{"uri": "../../etc/passwd"}])).encode(), "not a format of points"),
    "text": (b"hello", "not a format of points"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, capfd: pytest.CaptureFixture) -> None:
    data, words = HOSTILE[case]
    assert words in str(refused(data, "x.stl" if case.startswith("stl") else "x"))
    assert capfd.readouterr() == ("", "")


def test_the_glb_that_the_hostile_ones_change_is_good() -> None:
    assert load(glb(glb_tree(), TRIANGLE)).max() <= 1
    images = {"images": [{"uri": "../../etc/passwd"}], "materials": [{}]}
    assert len(load(glb(glb_tree(**images), TRIANGLE))) == 2000  # not needed, not opened


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    Canary.path = str(tmp_path / "canary")
    file = io.BytesIO()
    np.save(file, np.array([[Canary(), 1, 2]], object), allow_pickle=True)
    assert b"mkdir" in file.getvalue()
    assert "an array of object" in str(refused(file.getvalue()))
    refused(pickle.dumps(Canary()), "x.npy")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name", ["binary.stl", "ascii.stl", "binary.ply", "ascii.ply", "a.obj", "a.off", "a.glb", "a.npy"]
)
def test_limits_name_the_flag_that_raises_them(name: str) -> None:
    error = refused(FORMATS[name], name, Limits(vertices=5))
    assert isinstance(error, LimitError)
    assert "--limit vertices=" in str(error)
    if name != "a.npy":
        assert "--limit faces=12 " in str(refused(FORMATS[name], name, Limits(faces=5)))
    assert "decoded_bytes" in str(refused(FORMATS[name], name, Limits(decoded_bytes=1000)))
    assert "file_bytes" in str(refused(FORMATS[name], name, Limits(file_bytes=100)))


def test_messages_hold_no_addresses_which_differ_in_each_run() -> None:
    """`preprocess` writes the message into its records, which are the same bytes in every run."""
    damaged = npy(ON_CUBE).replace(b"'<f8'", b"a.b.c")
    message = str(refused(damaged))
    assert "malformed node" in message
    assert "0x" not in message


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "integers.npy"])
def test_mutants_give_points_or_a_data_error(name: str, capfd: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(2)
    messages = []
    for trial in range(15):
        mutant = bytearray(FORMATS[name])
        region = min(len(mutant), 300) if trial % 2 else len(mutant)
        for at in rng.integers(0, region, rng.integers(1, 9)):
            mutant[at] = rng.integers(256)
        if trial % 5 == 0:
            del mutant[rng.integers(len(mutant)) :]
        try:
            found = load(bytes(mutant), name)
        except DataError as error:
            messages.append(str(error))
        else:
            assert found.ndim == 2
            assert len(found) > 0
            assert np.abs(found).max() <= 1e30
            assert np.isfinite(prepare(found, 0)).all()
    assert not any("\n" in message for message in messages)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("face", [b"999999999 0 1 2", b"4 0 1 2", b"-1 0 1 2", b"9" * 30 + b" 0 1 2"])
def test_a_face_of_an_off_has_the_corners_that_it_declares(face: bytes) -> None:
    data = b"OFF\n# a comment\n3 1 0\n0 0 0\n1 0 0\n0 1 0 # a corner\n\n%b\n"
    assert len(read_mesh(Source("x.off", data % b"3 0 1 2"), Limits())[1]) == 1
    with pytest.raises(DataError, match="corners, found 3"):
        read_mesh(Source("x.off", data % face), Limits())


def test_a_missing_cloud_of_a_model_with_a_stem_has_a_place_for_each_prepared_point() -> None:
    """`preprocess --model-input` stacked the few inputs after the stem with the many points before it."""
    spec = PointsSpec(pool_points=64, num_points=32, stem="neighbours", stem_points=8)
    cloud = POINTS.prepare(ON_CUBE, spec, None)
    layouts = {"image": IMAGE.layout(ImageSpec(size=(8, 8), patch=(4, 4))), "points": POINTS.layout(spec)}
    arrays = graph_inputs(layouts, [{"points": cloud}, {}])
    assert arrays["points_positions"].shape == (2, 32, 3)
    assert not arrays["points_positions"][1].any()
    assert arrays["points_present"].tolist() == [True, False]
