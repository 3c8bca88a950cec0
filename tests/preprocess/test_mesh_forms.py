"""Meshes in the forms that writers give them: the same shape, or one line that says what is not read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.mesh_files import read_mesh
from perceiver_cli.preprocess.points import MODALITY as POINTS, PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import Perceive, at_least
from tests.preprocess.test_points import CUBE, FORMATS, TRIANGLE, VEC3, glb, glb_tree

trimesh = pytest.importorskip("trimesh")

SPEC = PointsSpec(pool_points=200, num_points=64)
CORNERS = np.array(CUBE.vertices)
VERTICES = "".join("{:g} {:g} {:g}\n".format(*corner) for corner in CORNERS)
FACES = "".join("3 {} {} {}\n".format(*face) for face in CUBE.faces)
# Earlier versions of trimesh read seven corners and a face that names an eighth.
OTHER_COUNTS = "cannot decode" if at_least("trimesh", "5.2") else "a face names vertex 7, found 7 vertices"
OFF = f"OFF\n8 12 0\n{VERTICES}{FACES}"
WIDER = "".join("{:g} {:g} {:g} 9 9 9\n".format(*corner) for corner in CORNERS)
TEXTURED = "".join("{:g} {:g} {:g} 0.5 0.5\n".format(*corner) for corner in CORNERS)
BINARY, ASCII, OBJ = FORMATS["binary.stl"], FORMATS["ascii.stl"], FORMATS["a.obj"]
PLY, TEXT_PLY = FORMATS["binary.ply"], FORMATS["ascii.ply"]
SOLID = b"solid " + ASCII.partition(b"\n")[0].removeprefix(b"solid").strip()
BOM = b"\xef\xbb\xbf"


def named(name: bytes) -> bytes:
    """Return the ASCII STL with another name of its solid."""
    return b"solid " + name + b"\n" + ASCII.partition(b"\n")[2].rpartition(b"endsolid")[0] + b"endsolid " + name + b"\n"


def capitals(data: bytes) -> bytes:
    for word in (b"endsolid", b"solid", b"endfacet", b"facet", b"normal", b"outer loop", b"endloop", b"vertex"):
        data = data.replace(word, word.upper())
    return data


FORMS = {  # data, file name; each is the cube
    "glued": (OFF.replace("OFF\n8", "OFF8").encode(), "a.off"),
    "glued with CRLF": (OFF.replace("OFF\n8", "OFF8").replace("\n", "\r\n").encode(), "a.off"),
    "glued without edges": (OFF.replace("OFF\n8 12 0", "OFF8 12").encode(), "a.off"),
    "one line": (OFF.replace("OFF\n", "OFF ").encode(), "a.off"),
    "blanks and lines": (OFF.replace("OFF\n8 12 0\n", "OFF  \n\n  8   12\t0  \n\n").encode(), "A.OFF"),
    "comments": (OFF.replace("OFF\n", "# made by\nOFF # an off\n# counts\n").encode(), "a.off"),
    "a comment behind counts": (OFF.replace("12 0\n", "12 0 # counts\n# vertices\n").encode(), "a.off"),
    "a count a line": (OFF.replace("8 12 0", "8\n12\n0").encode(), "a.off"),
    "long comments": (b"# about\n" * 900 + OFF.encode(), "a.off"),
    "no last line end": (OFF.rstrip().encode(), "a.off"),
    "CR": (OFF.replace("\n", "\r").encode(), "a.off"),
    "BOM of OFF": (BOM + OFF.encode(), "a.off"),
    "COFF": (f"COFF\n8 12 0\n{WIDER}{FACES}".encode(), "a.off"),
    "COFF glued": (f"COFF8 12 0\n{WIDER}{FACES}".encode(), "a.off"),
    "NOFF": (f"NOFF\n8 12 0\n{WIDER}{FACES}".encode(), "a.off"),
    "STOFF": (f"STOFF\n8 12 0\n{TEXTURED}{FACES}".encode(), "a.off"),
    "colours of faces": (OFF.replace("3 ", "3 ").replace(FACES, FACES.replace("\n", " 255 0 0\n")).encode(), "a.off"),
    "capitals": (capitals(ASCII), "a.stl"),
    "capitals of another name": (capitals(ASCII), "a.dat"),
    "a word in the name": (named(b"vertex_part"), "a.stl"),
    "words in the name": (named(b"vertex 1 2 3 of endfacet and facet normal"), "a.stl"),
    "no name": (named(b""), "a.stl"),
    "CRLF of STL": (ASCII.replace(b"\n", b"\r\n"), "a.stl"),
    "CR of STL": (ASCII.replace(b"\n", b"\r"), "a.stl"),
    "tabs": (ASCII.replace(b"vertex ", b"\tvertex\t"), "a.stl"),
    "BOM of STL": (BOM + ASCII, "a.stl"),
    "BOM of binary STL": (BOM + BINARY, "a.stl"),
    "binary that begins with solid": (b"solid facet by hand".ljust(80) + BINARY[80:], "a.stl"),
    "bytes behind": (BINARY + b"made by a program of the nineties", "a.stl"),
    "zeros behind": (BINARY + bytes(100), "a.stl"),
    "solid and bytes behind": (b"solid x".ljust(80, b"\0") + BINARY[80:] + b"abc", "a.stl"),
    "BOM of OBJ": (BOM + OBJ, "a.obj"),
    "other words of OBJ": (b"lod 1\nbevel on\nmade by hand\n" + OBJ, "a.obj"),
    "long comments of OBJ": (b"# about this mesh\n" * 400 + OBJ, "a.obj"),
    "CR of OBJ": (OBJ.replace(b"\n", b"\r"), "a.obj"),
    "CRLF of OBJ": (OBJ.replace(b"\n", b"\r\n"), "a.obj"),
    "lines of OBJ": (b"mg 1 2\nvp 0 1\nl 1 2\n" + OBJ, "a.obj"),
    "BOM of PLY": (BOM + PLY, "a.ply"),
    "CRLF of PLY": (TEXT_PLY.replace(b"\n", b"\r\n"), "a.ply"),
    "CR of PLY": (TEXT_PLY.replace(b"\n", b"\r"), "a.ply"),
    "a line end behind": (PLY + b"\n", "a.ply"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mesh_is_the_cube(form: str) -> None:
    data, name = FORMS[form]
    assert detected(Source(name, data)).kinds == ("points",)
    mesh = read_mesh(Source(name, data), Limits())
    assert len(mesh.faces) == 12
    assert np.allclose(np.abs(mesh.vertices), 1)
    points = POINTS.load(Source(name, data), SPEC, Limits())
    assert np.abs(np.abs(points).max(1) - 1).max() < 1e-5
    assert np.abs(points.mean(0)).max() < 0.3  # all sides


PART = {"POSITION": 0}
SHORT = np.array([[0, 0, 0], [100, 0, 0], [0, 100, 0]], "<i2")
QUANTISED = {
    "accessors": [{"bufferView": 0, "componentType": 5122, "count": 3, "type": "VEC3"}],
    "bufferViews": [{"buffer": 0, "byteLength": 24, "byteStride": 8}],
    "nodes": [{"mesh": 0, "scale": [0.01, 0.01, 0.01], "translation": [5, 0, 0]}],
    "extensionsUsed": ["KHR_mesh_quantization"],
    "extensionsRequired": ["KHR_mesh_quantization"],
}
QUANTISED_BYTES = np.pad(SHORT, ((0, 0), (0, 1))).tobytes().ljust(36, b"\0")


def refused_glb(words: str, binary: bytes = TRIANGLE, **changes: object) -> tuple[bytes, str, str]:
    return glb(glb_tree(**changes), binary), "a.glb", words


def primitive(**changes: object) -> dict[str, object]:
    return {"meshes": [{"primitives": [{"attributes": PART, **changes}]}]}


DRACO = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": PART}}
MESHOPT = {
    "EXT_meshopt_compression": {"buffer": 0, "byteLength": 20, "byteStride": 12, "count": 3, "mode": "ATTRIBUTES"}
}
PLAIN = [{"componentType": 5126, "count": 3, "type": "VEC3"}]
REFUSED = {
    "draco": refused_glb(
        "needs the glTF extension 'KHR_draco_mesh_compression'",
        accessors=PLAIN,
        extensionsRequired=["KHR_draco_mesh_compression"],
        **primitive(extensions=DRACO),
    ),
    "draco that is not required": refused_glb(
        "without data, only by 'KHR_draco_mesh_compression'", accessors=PLAIN, **primitive(extensions=DRACO)
    ),
    "meshopt": refused_glb(
        "needs the glTF extension 'EXT_meshopt_compression'",
        bufferViews=[{"buffer": 1, "byteLength": 36, "extensions": MESHOPT}],
        buffers=[{"byteLength": 36}, {"byteLength": 36, "extensions": {"EXT_meshopt_compression": {"fallback": True}}}],
        extensionsRequired=["EXT_meshopt_compression"],
    ),
    "meshopt that is not required": refused_glb(
        "needs the glTF extension 'EXT_meshopt_compression'",
        bufferViews=[{"buffer": 0, "byteLength": 36, "extensions": MESHOPT}],
    ),
    "a later one": refused_glb("needs the glTF extension 'EXT_tomorrow'", extensionsRequired=["EXT_tomorrow"]),
    "instances": refused_glb("EXT_mesh_gpu_instancing", extensionsRequired=["EXT_mesh_gpu_instancing"]),
    "sparse": refused_glb(
        "sparse accessors",
        accessors=[{"bufferView": 0, **VEC3, "count": 3, "sparse": {"count": 1, "indices": {}, "values": {}}}],
    ),
    "no data": refused_glb("vertices or faces without data", accessors=PLAIN),
    "no indices": refused_glb(
        "vertices or faces without data",
        accessors=[{"bufferView": 0, **VEC3, "count": 3}, {"componentType": 5125, "count": 3, "type": "SCALAR"}],
        **primitive(indices=1),
    ),
    "normalised": refused_glb(
        "normalised integers",
        QUANTISED_BYTES,
        **{**QUANTISED, "accessors": [{**QUANTISED["accessors"][0], "normalized": True}]},  # type: ignore[index,dict-item]
    ),
    "fan": refused_glb("a glTF primitive of mode 6", **primitive(mode=6)),
    "one place": (glb(glb_tree(), bytes(36)), "a.glb", "all 3 points are at the same place"),
    "4OFF": (OFF.replace("OFF", "4OFF").encode(), "a.off", "4OFF, not read here"),
    "nOFF": (OFF.replace("OFF\n", "nOFF\n3\n").encode(), "a.off", "nOFF, not read here"),
    "binary OFF": (b"OFF BINARY\n" + bytes(100), "a.off", "binary OFF, not read here"),
    "OFF of too few vertices": (OFF.replace("8 12", "7 12").encode(), "a.off", "7 vertices and 12 faces, found 20"),
    "OFF of too many vertices": (OFF.replace("8 12", "9 12").encode(), "a.off", "9 vertices and 12 faces, found 20"),
    "OFF of too few faces": (OFF.replace("8 12", "8 11").encode(), "a.off", "8 vertices and 11 faces, found 20 lines"),
    "OFF that is cut": (OFF[:-8].encode(), "a.off", "found 19 lines"),
    "OFF of other counts": (OFF.replace("8 12", "7 13").encode(), "a.off", OTHER_COUNTS),
    "PLY of too few vertices": (TEXT_PLY.replace(b"vertex 8", b"vertex 7"), "a.ply", "declared 19 lines, found 20"),
    "PLY of other counts": (
        TEXT_PLY.replace(b"vertex 8", b"vertex 7").replace(b"face 12", b"face 13"),
        "a.ply",
        "numbers in the element 'face'",
    ),
    "PLY of long lines": (TEXT_PLY.replace(b"\nproperty float z", b"", 1), "a.ply", "in the element 'vertex'"),
    "binary PLY of too few faces": (PLY.replace(b"face 12", b"face 11"), "a.ply", "13 bytes follow the elements"),
    "STL of too few triangles": (
        BINARY[:80] + struct.pack("<I", 11) + BINARY[84:], "a.stl", "declared 11 triangles, found 12",
    ),
    "STL of no triangles": (BINARY[:80] + bytes(4) + BINARY[84:], "a.stl", "declared 0 triangles, found 12"),
    "STL without a facet's end": (ASCII.replace(b"endfacet", b"", 1), "a.stl", "ends inside a facet"),
    "STL of a quadrilateral": (ASCII.replace(b"endloop", b"vertex 0 0 0\nendloop", 1), "a.stl", "not a triangle"),
    "STL without its end": (ASCII.rpartition(b"endsolid")[0], "a.stl", "ends inside a facet"),
    "OBJ": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "a.obj", "a face names vertex 3, found 3 vertices"),
    "OBJ at one place": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "a.obj", "all 3 points are at the same place"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_shape_that_would_be_false_is_refused_by_name(case: str) -> None:
    data, name, words = REFUSED[case]
    assert detected(Source(name, data)).kinds == ("points",)
    with pytest.raises(DataError) as caught:
        POINTS.load(Source(name, data), SPEC, Limits())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantised_glb_is_where_its_node_puts_it() -> None:
    mesh = read_mesh(Source("a.glb", glb(glb_tree(**QUANTISED), QUANTISED_BYTES)), Limits())
    assert np.allclose(mesh.vertices, [[5, 0, 0], [6, 0, 0], [5, 1, 0]])
    with_looks = {"extensionsRequired": ["KHR_materials_unlit", "KHR_texture_transform", "EXT_texture_webp"]}
    assert len(POINTS.load(Source("a.glb", glb(glb_tree(**with_looks), TRIANGLE)), SPEC, Limits())) == 200


def test_text_that_begins_with_off_is_no_mesh() -> None:
    for text in (b"OFF the record, 3 people said", b"OFFICE 12\n", b"OFFSET 1 2 3\n", b"solid ground\n"):
        assert not POINTS.sniff(text, "a.txt")


@pytest.mark.slow
def test_modelnet40_trains_as_downloaded(perceive: Perceive, tmp_path: Path) -> None:
    """class/train/*.off and class/test/*.off; in many files the counts stand behind OFF without a blank."""
    rng = np.random.default_rng(0)
    shapes = {
        "ball": trimesh.creation.icosphere(subdivisions=1),
        "box": CUBE,
        "rod": trimesh.creation.cylinder(0.1, 2.0),
    }
    for kind, mesh in shapes.items():
        for split, count in (("train", 12), ("test", 4)):
            folder = tmp_path / "ModelNet3" / kind / split
            folder.mkdir(parents=True)
            for i in range(count):
                vertices = np.array(mesh.vertices) * rng.uniform(0.5, 2)
                counts = f"{len(vertices)} {len(mesh.faces)} 0\n"
                rows = "".join("{:f} {:f} {:f}\n".format(*row) for row in vertices)
                rows += "".join("3 {} {} {}\n".format(*face) for face in mesh.faces)
                text = ("OFF" if i % 2 else "OFF\n") + counts + rows
                (folder / f"{kind}_{i:04d}.off").write_text(text)
    small = ("--preset", "tiny-points", "--steps", "60", "--batch-size", "8", "--device", "cpu", "-o", "run")
    small += ("--set", "inputs.points.num_points=64", "--set", "inputs.points.bands=4", "--set", "model.num_latents=8")
    done = perceive("train", "ModelNet3", *small, "--set", "train.lr=0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"unreadable" not in done.stderr
    done = perceive("evaluate", "ModelNet3", "-m", "run", "--device", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["num_examples"] == 12
    assert facts["accuracy"] > 0.8
