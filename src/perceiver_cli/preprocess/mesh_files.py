"""Files of meshes and point clouds: the claims of a file checked, then its vertices and triangles read.

A new format is one entry of `FORMATS`, at the end. NumPy reads STL, OBJ, tables, PCD and binary PLY; trimesh reads
ASCII PLY, OFF and GLB, from memory, with a resolver that refuses every other file; laspy reads LAS.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.geometry import (
    BOM,
    COLOURS,
    Floats,
    Mesh,
    by_trimesh,
    check_claim,
    check_counts,
    plain_name,
    unix_lines,
)  # fmt: skip
from perceiver_cli.preprocess.glb_files import read_glb
from perceiver_cli.preprocess.lidar_files import is_pcd, is_raw_cloud, raw_suffix, read_las, read_pcd, read_raw
from perceiver_cli.preprocess.point_tables import are_points, may_be_points, read_array, read_points
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

Property = tuple[str, str, str]  # of a PLY: name, NumPy type, NumPy type of a list's length or ""
Element = tuple[str, int, list[Property]]  # of a PLY: name, number of rows, properties of a row
MAX_HEADER_BYTES = 1 << 16  # of PLY
MAX_PROPERTIES = 1000
MAX_DIGITS = 9  # of a face's count in OFF
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
PLY_TYPES |= {"float": "f4", "double": "f8"} | {f"int{8 * n}": f"i{n}" for n in (1, 2, 4, 8)}
PLY_TYPES |= {f"uint{8 * n}": f"u{n}" for n in (1, 2, 4, 8)} | {f"float{8 * n}": f"f{n}" for n in (2, 4, 8)}
ASCII_STL = rb"(?si)\s*solid.*facet"
OFF_KEY = rb"(?:\s|#[^\n]*\n)*((?:ST)?C?N?4?n?OFF)(?=[\s\d#]|$)"
OBJ_WORDS = ("v", "vn", "vt", "vp", "f", "l", "p", "o", "g", "s", "mtllib", "usemtl", "mg")


def _triangles(corners: Array, sizes: Array) -> NDArray[np.int64]:
    """Return the triangles (F, 3) of polygons, each cut into a fan.

    corners: the vertex numbers of all polygons, one after the other. sizes: the number of corners of each polygon.
    """
    fans = np.maximum(sizes - 2, 0)
    first = np.repeat(np.cumsum(sizes) - sizes, fans)
    step = np.arange(len(first)) - np.repeat(np.cumsum(fans) - fans, fans)
    return np.asarray(corners[np.stack([first, first + step + 1, first + step + 2], axis=1)])


# trimesh 5.2 is slower than these readers: OBJ 1.2 to 11 times (198,000 triangles: 2.5 s instead of 0.7 s) and in
# another order of faces, binary STL 5 to 60 times, ASCII STL and XYZ up to 2.8 times (from 1,500 triangles on).


STL_RECORD = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def _read_stl(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of an STL. Binary files often begin with "solid" too: only the size tells them from ASCII."""
    count = int.from_bytes(data[80:84], "little")
    more = len(data) - 84 - 50 * count
    if more and re.match(ASCII_STL, data[:HEAD_BYTES]) and b"\0" not in data[:HEAD_BYTES]:
        return _ascii_stl(source, data, limits)
    if more < 0 or len(data) < 84:
        raise DataError(f"{source.shown}: declared {count} triangles in {84 + 50 * count} bytes, found {len(data)}")
    check_counts(source, 3 * count, count, limits)
    corners = np.frombuffer(data, STL_RECORD, count, 84)["corners"].astype(np.float64)
    # Some writers add bytes of their own. Whole triangles in the place of the declared ones contradict the count.
    if more and more % 50 == 0:
        others = np.frombuffer(data, STL_RECORD, more // 50, 84 + 50 * count)["corners"]
        size = 10 * np.abs(corners).max(initial=0)
        if others.any() and (count == 0 or bool((np.abs(others) <= size).all())):
            raise DataError(f"{source.shown}: declared {count} triangles, found {count + more // 50}")
    return _soup(corners.reshape(-1, 3))


def _ascii_stl(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of a text; names of solids may hold any word, and keywords may be in capitals."""
    lower = unix_lines(data).lower()  # half the time of patterns that ignore case
    data = re.sub(rb"solid[^\r\n]*", b"", lower)
    facets, vertices = data.count(b"endfacet"), re.findall(rb"vertex[ \t]+([^\r\n]+)", data)
    check_counts(source, len(vertices), facets, limits)
    if b"endsolid" not in lower or len(vertices) != 3 * facets or data.count(b"facet") != 2 * facets:
        raise DataError(f"{source.shown}: ends inside a facet, or a facet is not a triangle")
    return _soup(_numbers(vertices))


def _soup(vertices: Floats) -> Mesh:
    """Return the mesh of which three vertices each are a triangle."""
    return Mesh(vertices, np.arange(len(vertices)).reshape(-1, 3))


def _read_obj(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the vertices and faces of an OBJ, and the vertices' colours; all else is ignored."""
    data = unix_lines(data).replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    check_counts(source, data.count(b"\nv "), data.count(b"\nf "), limits)
    rows = re.findall(rb"(?m)^[ \t]*([vf])[ \t]+([^\r\n#]*)", data)
    is_vertex = np.array([kind == b"v" for kind, _ in rows], bool)
    lines = [row for kind, row in rows if kind == b"v"]
    vertices, columns = _numbers(lines), partial(_obj_colours, lines)
    faces = [row for kind, row in rows if kind == b"f"]
    if not faces:
        return Mesh(vertices, columns=columns)
    sizes = np.array([len(row.split()) for row in faces])
    index = np.fromstring(re.sub(rb"/\S*", b"", b" ".join(faces)), np.int64, sep=" ")
    # Positive numbers count from 1, negative ones back from the last vertex above the face.
    before = np.repeat(np.cumsum(is_vertex)[~is_vertex], sizes)
    return Mesh(vertices, _triangles(np.where(index < 0, before + index, index - 1), sizes), columns)


def _obj_colours(lines: list[bytes]) -> dict[str, Array]:
    """Return the colours that many programs write behind x, y, z; none if a vertex lacks them."""
    sizes = {len(line.split()) for line in lines}
    if sizes not in ({6}, {7}):
        return {}
    table = np.loadtxt(lines, np.float64, usecols=(3, 4, 5), ndmin=2)
    return {name: table[:, place] for place, name in enumerate(COLOURS)}


def _numbers(lines: Any) -> Floats:
    """Return (N, 3): the first three numbers of every line."""
    return np.loadtxt(lines, np.float64, usecols=(0, 1, 2), ndmin=2).reshape(-1, 3)


def _read_ply(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of a PLY. Its header is checked first: the file must have just the elements that it declares."""
    data = unix_lines(data) if b"format ascii" in data[:HEAD_BYTES] else data
    body, is_ascii, elements = _ply_header(source, data)
    columns = [(count, size or kind) for _, count, row in elements for _, kind, size in row]
    # A number takes a digit and a blank in ASCII.
    needed = sum(count * (2 if is_ascii else np.dtype(kind).itemsize) for count, kind in columns)
    check_claim(source, needed, len(data) - body + 1)
    counts = {name: count for name, count, _ in elements}
    check_counts(source, counts.get("vertex", 0), counts.get("face", 0), limits)
    if not is_ascii:
        return _binary_ply(source, data, body, elements)
    lines = [line for line in data[body:].splitlines() if line.strip()]
    if sum(counts.values()) != len(lines):
        raise DataError(f"{source.shown}: declared {sum(counts.values())} lines, found {len(lines)}")
    read_columns: Callable[[], Mapping[str, Array]] = dict
    start = 0
    for name, count, row in elements:
        _check_lines(source, name, lines[start : start + count], row)
        if name == "vertex" and not any(size for _, _, size in row):
            read_columns = partial(_ascii_columns, lines[start : start + count], row)
        start += count
    return by_trimesh(source, data, "ply")._replace(columns=read_columns)


def _check_lines(source: Source, name: str, lines: list[bytes], row: list[Property]) -> None:
    """Raise DataError if a line of an ASCII element has not the numbers that its properties need."""
    has_lists = any(size for _, _, size in row)
    for words in map(bytes.split, lines):
        needed = len(row)
        if has_lists:
            needed = 0
            for _, _, size in row:
                length = words[needed] if size and needed < len(words) else b"0"
                needed += 1 + (int(length) if length.isdigit() and len(length) <= MAX_DIGITS else len(words))
        if needed != len(words):
            raise DataError(f"{source.shown}: a line of {len(words)} numbers in the element {show_path(name)}",
                            f"expected {needed}")  # fmt: skip


def _ascii_columns(lines: list[bytes], row: list[Property]) -> dict[str, Array]:
    """Return the columns of the vertices of an ASCII PLY; whole numbers keep their type, which says their range."""
    table = np.loadtxt(lines, np.float64, ndmin=2)
    return {
        plain_name(key): table[:, place].astype(kind) for place, (key, kind, _) in enumerate(row) if key not in "xyz"
    }


def _ply_header(source: Source, data: bytes) -> tuple[int, bool, list[Element]]:
    """Return the offset of the body of a PLY, whether it is ASCII, and its elements."""
    end = data.find(b"end_header", 0, MAX_HEADER_BYTES)
    body = data.find(b"\n", end) + 1
    if end < 0 or body == 0:
        raise DataError(f"{source.shown}: no end of the PLY header in {min(len(data), MAX_HEADER_BYTES)} bytes")
    lines = [line.split() for line in data[:end].decode("ascii", "replace").splitlines()]
    encoding = next(line[1] for line in lines if line[:1] == ["format"])
    order = ">" if encoding == "binary_big_endian" else "<"
    elements: list[Element] = []
    for line in lines:
        if line[:1] == ["element"]:
            elements.append((line[1], int(line[2]), []))
        elif line[:1] == ["property"]:
            size = order + PLY_TYPES[line[2]] if line[1] == "list" else ""
            elements[-1][2].append((line[-1], order + PLY_TYPES[line[-2]], size))
    properties = sum(len(element[2]) for element in elements)
    if properties > MAX_PROPERTIES or any(count < 0 for _, count, _ in elements):
        raise DataError(f"{source.shown}: {properties} properties, or a negative count, in the PLY header")
    return body, encoding == "ascii", elements


def _binary_ply(source: Source, data: bytes, at: int, elements: list[Element]) -> Mesh:
    """Return the mesh of a binary PLY whose body begins at `at`. trimesh fails on triangles beside quadrilaterals."""
    mesh = Mesh(np.empty((0, 3)))
    for name, count, row in elements:
        columns, at = _ply_columns(data, at, count, row)
        if name == "vertex":
            vertices = np.stack([np.asarray(columns[axis], np.float64).reshape(-1) for axis in "xyz"], axis=1)
            mesh = mesh._replace(vertices=vertices, columns=partial(_binary_columns, columns, row))
        for key in ("vertex_indices", "vertex_index"):
            if name == "face" and count and key in columns:
                corners = list(columns[key])
                faces = _triangles(np.concatenate(corners).astype(np.int64), np.array([len(face) for face in corners]))
                mesh = mesh._replace(faces=faces)
    if len(data[at:].strip()) > 1:
        raise DataError(f"{source.shown}: {len(data) - at} bytes follow the elements that the header declares")
    return mesh


def _binary_columns(columns: Mapping[str, Any], row: list[Property]) -> dict[str, Array]:
    """Return the columns of the vertices of a binary PLY that are no lists."""
    names = [key for key, _, size in row if not size and key not in "xyz"]
    return {plain_name(name): np.asarray(columns[name]).reshape(-1) for name in names}


def _ply_columns(data: bytes, at: int, count: int, row: list[Property]) -> tuple[dict[str, Any], int]:
    """Return {property: its value in every row} of a binary element, and the offset of the next element."""
    fields: list[Any] = []
    for key, kind, size in row:  # in most files all lists have the length of the first
        first = np.frombuffer(data, size, 1, at + np.dtype(fields).itemsize)[0] if size and count else 0
        fields += [(f"{key} size", size), (key, kind, (int(first),))] if size else [(key, kind)]
    record = np.dtype(fields)
    if at + count * record.itemsize <= len(data):
        table = np.frombuffer(data, record, count, at)
        if all((table[f"{key} size"] == table[f"{key} size"][:1]).all() for key, _, size in row if size):
            return {key: table[key] for key, _, _ in row}, at + count * record.itemsize
    columns: dict[str, Any] = {key: [] for key, _, _ in row}
    for _ in range(count):
        for key, kind, size in row:
            length = int(np.frombuffer(data, size, 1, at)[0]) if size else 1
            at += np.dtype(size).itemsize if size else 0
            if not 0 <= length * np.dtype(kind).itemsize <= len(data) - at:
                raise ValueError("the PLY ends inside its data")
            columns[key].append(np.frombuffer(data, kind, length, at))
            at += length * np.dtype(kind).itemsize
    return columns, at


def _read_off(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of an OFF. Its counts are checked first: a vertex needs at least 6 bytes of text, a face 2.

    In ModelNet40 the counts of many files stand in the first line, behind OFF without a blank.
    """
    data = unix_lines(data)
    key = re.match(OFF_KEY, data)
    if key is None or key[1].lstrip(b"STCN") != b"OFF" or re.match(rb"[ \t]*BINARY", data[key.end() :]):
        form = "binary OFF" if key is None or key[1].endswith(b"NOFF") or key[1] == b"OFF" else key[1].decode()
        raise DataError(f"{source.shown}: {form}, not read here", "expected OFF, COFF, NOFF or STOFF in text")
    counts = re.match(rb"(?:\s|#[^\n]*\n)*(\d{1,18})\s+(\d{1,18})\b[^\n]*", data[key.end() :])
    if counts is None:
        raise DataError(f"{source.shown}: no counts of vertices and faces after OFF")
    vertices, faces, start = int(counts[1]), int(counts[2]), key.end() + counts.end()
    check_claim(source, 6 * vertices + 2 * faces, len(data) - start + 1)
    check_counts(source, vertices, faces, limits)
    text = re.sub(rb"#[^\n]*", b"", data[start:])
    lines = [words for line in text.splitlines() if (words := line.split())]
    if lines and len(lines[0]) == 1 and faces + vertices:
        lines.pop(0)  # the number of edges, in a line of its own
        text = text.lstrip().partition(b"\n")[2]
    if len(lines) != vertices + faces:
        found = f"found {len(lines)} lines for them"
        raise DataError(f"{source.shown}: declared {vertices} vertices and {faces} faces, {found}")
    for corners, *rest in lines[vertices:]:  # trimesh takes the corners that are there
        if not corners.isdigit() or len(corners) > MAX_DIGITS or int(corners) > len(rest):
            raise DataError(f"{source.shown}: a face with {show_path(os.fsdecode(corners))} corners, found {len(rest)}")
    return by_trimesh(source, b"OFF\n%d %d 0\n" % (vertices, faces) + text.lstrip(), "off")


class MeshFormat(NamedTuple):
    """One file format of meshes or point clouds.

    matches(head, suffix): whether a file that begins with `head` has this format; `suffix` is lower case without a dot.
    read(source, data, limits): the mesh in `data`. It compares the file's claims with its size and the limits before it
    allocates, opens no other file, and may raise anything: `read_mesh` makes it a DataError.
    """

    matches: Callable[[bytes, str], bool]
    read: Callable[[Source, bytes, Limits], Mesh]
    is_table: bool = False  # numbers alone: a file of another meaning may look the same


def _is_obj(head: bytes, suffix: str) -> bool:
    """Return whether the first three lines begin with words of OBJ; an .obj may have a vertex below other words.

    It may also have only comments in its head.
    """
    lines = _text_lines(head)
    if not lines:
        return suffix == "obj" and _is_comments(head)
    vertices = [line for line in lines if line[0] == "v" and len(line) > 3]
    return all(line[0] in OBJ_WORDS for line in lines[:3]) or (suffix == "obj" and bool(vertices))


def _is_off(head: bytes, suffix: str) -> bool:
    """Return whether numbers follow OFF; an .off may have only comments before them in its head."""
    key = re.match(OFF_KEY, head)
    if key is None:
        return suffix == "off" and _is_comments(head)
    return re.match(rb"(?:\s|#[^\n]*(?:\n|$))*(?:\d|BINARY|$)", head[key.end() :]) is not None


def _is_comments(head: bytes) -> bool:
    """Return whether a text is longer than `head`, in which there are only comments."""
    lines = head.splitlines()
    return len(head) >= HEAD_BYTES - len(BOM) and all(line.lstrip()[:1] in b"#" for line in lines) and b"\0" not in head


def _text_lines(head: bytes) -> list[list[str]]:
    """Return the words of each line that is neither blank nor a comment; no lines if `head` is not text."""
    if re.search(rb"[\0-\x08]", head):
        return []
    text = head.decode("ascii", "replace")
    if len(head) >= HEAD_BYTES - len(BOM):
        text = text.rpartition("\n")[0]  # the last line may be incomplete
    return [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


# By the name that messages show, in the order in which `mesh_format` asks: signatures first, guesses at text last.
FORMATS = {
    "PLY": MeshFormat(lambda head, suffix: head.startswith((b"ply\n", b"ply\r")), _read_ply),
    "GLB": MeshFormat(lambda head, suffix: head.startswith(b"glTF"), read_glb),
    "PCD": MeshFormat(is_pcd, read_pcd),
    "LAS, LAZ": MeshFormat(lambda head, suffix: head.startswith(b"LASF"), read_las),
    "OFF": MeshFormat(_is_off, _read_off),
    # A binary STL has no signature, only its suffix.
    "STL": MeshFormat(lambda head, suffix: suffix == "stl" or re.match(ASCII_STL, head) is not None, _read_stl),
    "OBJ": MeshFormat(_is_obj, _read_obj),
    "NPY": MeshFormat(
        lambda head, suffix: head.startswith(b"\x93NUMPY") and are_points(head, suffix), read_array, True
    ),
    "XYZ": MeshFormat(are_points, read_points, True),
    "KITTI's BIN": MeshFormat(is_raw_cloud, read_raw, True),
}


def mesh_format(head: bytes, name: str, *, asked: bool = False) -> MeshFormat | None:
    """Return the format of a file that begins with `head`, or None if it is neither a mesh nor a point cloud.

    asked: the user says that it is one, so that a table of any name will do.
    """
    suffix, head = raw_suffix(name), head.removeprefix(BOM)
    known = next((known for known in FORMATS.values() if known.matches(head, suffix)), None)
    if known is None and asked and head.startswith(b"\x93NUMPY"):
        return FORMATS["NPY"]
    return FORMATS["XYZ"] if known is None and asked and may_be_points(head) else known


def read_mesh(source: Source, limits: Limits) -> Mesh:
    """Return the mesh in a file. Raises DataError for every exception of its reader, whose warnings stay hidden."""
    data = source.read(limits).removeprefix(BOM)
    file_format = mesh_format(data[:HEAD_BYTES], source.name, asked=True)  # detection has asked
    if file_format is None:
        raise DataError(f"{source.shown}: not a format of points", f"expected {', '.join(FORMATS)}")
    with as_data_errors(source, "points"), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # NumPy only warns if it stops in the middle of a text of numbers.
        warnings.filterwarnings("error", "string or file could not be read")
        mesh = file_format.read(source, data, limits)
        check_counts(source, len(mesh.vertices), len(mesh.faces), limits)
    return mesh
