"""Files of meshes and point clouds: the claims of a file checked, then its vertices and triangles read.

A new format is one entry of `FORMATS`, at the end. NumPy reads STL, OBJ, XYZ, NPY and binary PLY; trimesh reads ASCII
PLY, OFF and GLB, from memory, with a resolver that refuses every other file.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import warnings
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

Floats = NDArray[np.float64]
NO_FACES = np.empty((0, 3), np.int64)
Mesh = tuple[Floats, NDArray[np.int64]]  # vertices (V, 3) and triangles (F, 3); F is 0 for a point cloud
Property = tuple[str, str, str]  # of a PLY: name, NumPy type, NumPy type of a list's length or ""
Element = tuple[str, int, list[Property]]  # of a PLY: name, number of rows, properties of a row
MAX_HEADER_BYTES = 1 << 16  # of PLY
MAX_PROPERTIES = 1000
MAX_JSON_BYTES = 8 << 20  # of GLB
MAX_DIGITS = 9  # of a face's count in OFF
MAX_NODES, MAX_DEPTH = 10_000, 128
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
PLY_TYPES |= {"float": "f4", "double": "f8"} | {f"int{8 * n}": f"i{n}" for n in (1, 2, 4, 8)}
PLY_TYPES |= {f"uint{8 * n}": f"u{n}" for n in (1, 2, 4, 8)} | {f"float{8 * n}": f"f{n}" for n in (2, 4, 8)}
GLTF_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
GLTF_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
XYZ_SUFFIXES = ("xyz", "txt", "pts")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
ASCII_STL = rb"(?s)solid.*facet"
OBJ_WORDS = ("v", "vn", "vt", "f", "o", "g", "mtllib", "usemtl", "s")


def check_counts(source: Source, vertices: int, faces: int, limits: Limits) -> None:
    """Raise LimitError if a mesh has more vertices or faces than the limits allow."""
    source.check_limit(vertices, "vertices", "vertices", limits)
    source.check_limit(faces, "faces", "faces", limits)


def _check_claim(source: Source, claimed: int, available: int) -> None:
    if claimed > available:
        raise DataError(f"{source.shown}: declared at least {claimed} bytes of data, found {available}")


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


def _read_stl(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of an STL. Binary files often begin with "solid" too: only the size tells them from ASCII."""
    count = int.from_bytes(data[80:84], "little")
    if len(data) == 84 + 50 * count:
        check_counts(source, 3 * count, count, limits)
        record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
        vertices = np.frombuffer(data, record, count, 84)["corners"].reshape(-1, 3).astype(np.float64)
    elif re.match(ASCII_STL, data[:HEAD_BYTES]):
        check_counts(source, data.count(b"vertex"), data.count(b"endfacet"), limits)
        if b"endsolid" not in data or data.count(b"vertex") != 3 * data.count(b"endfacet"):
            raise DataError(f"{source.shown}: ends inside a facet, or a facet is not a triangle")
        vertices = _numbers(re.findall(rb"vertex[ \t]+([^\r\n]+)", data))
    else:
        raise DataError(f"{source.shown}: declared {count} triangles in {84 + 50 * count} bytes, found {len(data)}")
    return vertices, np.arange(len(vertices)).reshape(-1, 3)


def _read_obj(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the vertices and faces of an OBJ; objects, groups, materials, normals and textures are ignored."""
    data = data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    check_counts(source, data.count(b"\nv "), data.count(b"\nf "), limits)
    rows = re.findall(rb"(?m)^[ \t]*([vf])[ \t]+([^\r\n#]*)", data)
    is_vertex = np.array([kind == b"v" for kind, _ in rows], bool)
    vertices = _numbers([row for kind, row in rows if kind == b"v"])
    faces = [row for kind, row in rows if kind == b"f"]
    if not faces:
        return vertices, NO_FACES
    sizes = np.array([len(row.split()) for row in faces])
    index = np.fromstring(re.sub(rb"/\S*", b"", b" ".join(faces)), np.int64, sep=" ")
    # Positive numbers count from 1, negative ones back from the last vertex above the face.
    before = np.repeat(np.cumsum(is_vertex)[~is_vertex], sizes)
    return vertices, _triangles(np.where(index < 0, before + index, index - 1), sizes)


def _numbers(lines: Any) -> Floats:
    """Return (N, 3): the first three numbers of every line."""
    return np.loadtxt(lines, np.float64, usecols=(0, 1, 2), ndmin=2).reshape(-1, 3)


def _read_xyz(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of a text with three or more numbers a line, separated by blanks or commas."""
    check_counts(source, data.count(b"\n"), 0, limits)
    return _numbers(io.BytesIO(data.replace(b",", b" "))), NO_FACES


def _read_npy(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of an (N, 3 or more) array of numbers. Raises DataError for objects, never unpickling them."""
    file, npy = io.BytesIO(data), np.lib.format
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, column_major, dtype = read_header(file)
    if dtype.kind not in "fiu":
        raise DataError(f"{source.shown}: an array of {dtype.name}, expected numbers")
    if len(shape) != 2 or shape[1] < 3 or min(shape) < 0 or (shape[0] == 3 and shape[1] > 3):
        raise DataError(f"{source.shown}: an array of shape {shape}, expected (points, 3)")
    check_counts(source, shape[0], 0, limits)
    declared, available = prod(shape) * dtype.itemsize, len(data) - file.tell()
    if declared != available:
        raise DataError(f"{source.shown}: declared {declared} bytes of numbers, found {available}")
    array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if column_major else "C")
    return array[:, :3].astype(np.float64), NO_FACES


def _by_trimesh(source: Source, data: bytes, file_type: str) -> Mesh:
    """Return `data` as one mesh: a copy of each geometry for every node that shows it, moved by the node."""
    logging.getLogger("trimesh").setLevel(logging.CRITICAL + 1)
    import trimesh

    class Refuse(trimesh.resolvers.Resolver):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def get(self, key: str) -> bytes:
            raise DataError(f"{source.shown}: external reference refused: {show_path(key)}")

        def keys(self) -> list[str]:
            return []

        write = namespaced = get

    options = {"resolver": Refuse(), "process": False, "skip_materials": True}  # the default resolver opens files
    scene = trimesh.load_scene(io.BytesIO(data), file_type=file_type, **options)
    vertices, faces, total = [np.empty((0, 3))], [NO_FACES], 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        points = np.asarray(geometry.vertices, np.float64).reshape(-1, 3)
        vertices.append(points @ transform[:3, :3].T + transform[:3, 3])
        faces.append(np.asarray(getattr(geometry, "faces", NO_FACES), np.int64).reshape(-1, 3) + total)
        total += len(points)
    return np.concatenate(vertices), np.concatenate(faces)


def _read_ply(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of a PLY. Its header is checked first: the file must be long enough for all elements."""
    body, is_ascii, elements = _ply_header(source, data)
    columns = [(count, size or kind) for _, count, row in elements for _, kind, size in row]
    # A number takes a digit and a blank in ASCII.
    needed = sum(count * (2 if is_ascii else np.dtype(kind).itemsize) for count, kind in columns)
    _check_claim(source, needed, len(data) - body + 1)
    counts = {name: count for name, count, _ in elements}
    check_counts(source, counts.get("vertex", 0), counts.get("face", 0), limits)
    if not is_ascii:
        return _binary_ply(data, body, elements)
    lines = sum(1 for line in data[body:].splitlines() if line.strip())
    if sum(counts.values()) > lines:
        raise DataError(f"{source.shown}: declared {sum(counts.values())} lines, found {lines}")
    return _by_trimesh(source, data, "ply")


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


def _binary_ply(data: bytes, at: int, elements: list[Element]) -> Mesh:
    """Return the mesh of a binary PLY whose body begins at `at`. trimesh fails on triangles beside quadrilaterals."""
    vertices, faces = np.empty((0, 3)), NO_FACES
    for name, count, row in elements:
        columns, at = _ply_columns(data, at, count, row)
        if name == "vertex":
            vertices = np.stack([np.asarray(columns[axis], np.float64).reshape(-1) for axis in "xyz"], axis=1)
        for key in ("vertex_indices", "vertex_index"):
            if name == "face" and count and key in columns:
                corners = list(columns[key])
                faces = _triangles(np.concatenate(corners).astype(np.int64), np.array([len(face) for face in corners]))
    return vertices, faces


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
    """Return the mesh of an OFF. Its counts are checked first: a vertex needs at least 6 bytes of text, a face 2."""
    counts = re.match(rb"\w*OFF(?:\s|#[^\n]*\n)+(\d{1,18})[ \t]+(\d{1,18})", data)
    if counts is None:
        raise DataError(f"{source.shown}: no counts of vertices and faces after OFF")
    vertices, faces = int(counts[1]), int(counts[2])
    _check_claim(source, 6 * vertices + 2 * faces, len(data) - counts.end() + 1)
    check_counts(source, vertices, faces, limits)
    text = re.sub(rb"#[^\n]*", b"", data[counts.end() :])
    lines = [words for line in text.splitlines()[1:] if (words := line.split())]
    for corners, *rest in lines[vertices : vertices + faces]:  # trimesh takes the corners that are there
        if not corners.isdigit() or len(corners) > MAX_DIGITS or int(corners) > len(rest):
            raise DataError(f"{source.shown}: a face with {show_path(os.fsdecode(corners))} corners, found {len(rest)}")
    return _by_trimesh(source, data, "off")


def _read_glb(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of a GLB. Its chunks and its JSON are checked first, against the file and the limits."""
    if len(data) < 20:
        raise DataError(f"{source.shown}: ends inside the GLB header")
    length, json_bytes = struct.unpack("<8x2I", data[:16])
    _check_claim(source, max(length, 20 + json_bytes), len(data))
    if json_bytes > MAX_JSON_BYTES:
        raise DataError(f"{source.shown}: {json_bytes} bytes of JSON in a GLB, expected <= {MAX_JSON_BYTES}")
    _check_gltf(source, json.loads(data[20 : 20 + json_bytes]), len(data) - 20 - json_bytes, limits)
    return _by_trimesh(source, data, "glb")


def _check_gltf(source: Source, tree: dict[str, Any], binary_bytes: int, limits: Limits) -> None:
    """Raise DataError if a glTF tree names other files, claims more than the file holds, or unfolds past the limits."""
    if any("uri" in buffer for buffer in tree.get("buffers", [])):
        raise DataError(f"{source.shown}: external reference refused", "expected a GLB with all its data inside")
    accessors, nodes = tree.get("accessors", []), tree.get("nodes", [])
    _check_nodes(source, nodes)
    view_bytes = [view["byteLength"] for view in tree.get("bufferViews", [])]
    counts = [accessor["count"] for accessor in accessors]
    if any(not isinstance(size, int) or size < 0 for size in view_bytes + counts):
        raise DataError(f"{source.shown}: a size in the GLB is not a whole number")
    _check_claim(source, max(view_bytes, default=0), binary_bytes)
    source.check_decoded(sum(view_bytes), 1, limits)  # trimesh copies each view
    total = 0
    for accessor, count in zip(accessors, counts, strict=True):
        needed = count * GLTF_BYTES[accessor["componentType"]] * GLTF_COLUMNS[accessor["type"]]
        if count > 3 * limits.faces:
            source.check_limit(count, "vertices", "vertices", limits)
        if "bufferView" in accessor:
            _check_claim(source, needed, view_bytes[accessor["bufferView"]])
        total += needed
    source.check_decoded(total, 1, limits)
    sizes = []  # (vertices, corners of triangles) of each mesh
    for mesh in tree.get("meshes", []):
        shapes = [(p["attributes"]["POSITION"], p.get("indices")) for p in mesh["primitives"]]
        corners = sum(counts[position if index is None else index] for position, index in shapes)
        sizes.append((sum(counts[position] for position, _ in shapes), corners))
    # Many nodes may show one mesh, and many meshes may use one accessor.
    for shown in (sizes, [sizes[node["mesh"]] for node in nodes if "mesh" in node]):
        check_counts(source, sum(size[0] for size in shown), sum(size[1] for size in shown) // 3, limits)


def _check_nodes(source: Source, nodes: list[dict[str, Any]]) -> None:
    """Raise DataError if the nodes of a glTF tree are too many, too deep, or have two parents."""
    if len(nodes) > MAX_NODES:
        raise DataError(f"{source.shown}: {len(nodes)} nodes, expected <= {MAX_NODES}")
    children = [child for node in nodes for child in node.get("children", [])]
    if len(children) != len(set(children)):  # else a few nodes unfold into millions
        raise DataError(f"{source.shown}: a node with two parents")
    level, depth = sorted(set(range(len(nodes))) - set(children)), 0
    while level := [child for node in level for child in nodes[node].get("children", [])]:
        if (depth := depth + 1) > MAX_DEPTH:  # a node's transform is the product of all transforms above it
            raise DataError(f"{source.shown}: nodes more than {MAX_DEPTH} deep")


class MeshFormat(NamedTuple):
    """One file format of meshes or point clouds.

    matches(head, suffix): whether a file that begins with `head` has this format; `suffix` is lower case without a dot.
    read(source, data, limits): the mesh in `data`. It compares the file's claims with its size and the limits before it
    allocates, opens no other file, and may raise anything: `read_mesh` makes it a DataError.
    """

    matches: Callable[[bytes, str], bool]
    read: Callable[[Source, bytes, Limits], Mesh]


def _is_obj(head: bytes, suffix: str) -> bool:
    """Return whether the first three lines begin with words of OBJ."""
    lines = _text_lines(head)
    return bool(lines) and all(line[0] in OBJ_WORDS for line in lines[:3])


def _is_xyz(head: bytes, suffix: str) -> bool:
    """Return whether all lines are numbers; if the suffix is one of `XYZ_SUFFIXES`, whether the first line is."""
    lines = _text_lines(head)[: 1 if suffix in XYZ_SUFFIXES else None]
    rows = [" ".join(line).replace(",", " ").split() for line in lines]
    return bool(rows) and all(len(row) >= 3 and all(map(NUMBER.fullmatch, row)) for row in rows)


def _text_lines(head: bytes) -> list[list[str]]:
    """Return the words of each line that is neither blank nor a comment; no lines if `head` is not text."""
    if re.search(rb"[\0-\x08]", head):
        return []
    text = head.decode("ascii", "replace")
    if len(head) == HEAD_BYTES:
        text = text.rpartition("\n")[0]  # the last line may be incomplete
    return [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


# By the name that messages show, in the order in which `mesh_format` asks: signatures first, guesses at text last.
FORMATS = {
    "PLY": MeshFormat(lambda head, suffix: head.startswith((b"ply\n", b"ply\r")), _read_ply),
    "GLB": MeshFormat(lambda head, suffix: head.startswith(b"glTF"), _read_glb),
    "NPY": MeshFormat(lambda head, suffix: head.startswith(b"\x93NUMPY"), _read_npy),
    "OFF": MeshFormat(lambda head, suffix: re.match(rb"(ST)?C?N?OFF\s", head) is not None, _read_off),
    # A binary STL has no signature, only its suffix.
    "STL": MeshFormat(lambda head, suffix: suffix == "stl" or re.match(ASCII_STL, head) is not None, _read_stl),
    "OBJ": MeshFormat(_is_obj, _read_obj),
    "XYZ": MeshFormat(_is_xyz, _read_xyz),
}


def mesh_format(head: bytes, name: str) -> MeshFormat | None:
    """Return the format of a file that begins with `head`, or None if it is neither a mesh nor a point cloud."""
    suffix = name.lower().rpartition(".")[2]
    return next((known for known in FORMATS.values() if known.matches(head, suffix)), None)


def read_mesh(source: Source, limits: Limits) -> Mesh:
    """Return the mesh in a file. Raises DataError for every exception of its reader, whose warnings stay hidden."""
    data = source.read(limits)
    file_format = mesh_format(data[:HEAD_BYTES], source.name)
    if file_format is None:
        raise DataError(f"{source.shown}: not a format of points", f"expected {', '.join(FORMATS)}")
    with as_data_errors(source, "points"), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # NumPy only warns if it stops in the middle of a text of numbers.
        warnings.filterwarnings("error", "string or file could not be read")
        vertices, faces = file_format.read(source, data, limits)
        check_counts(source, len(vertices), len(faces), limits)
    return vertices, faces
