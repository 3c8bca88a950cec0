"""GLB: the claims of its JSON checked against the file and the limits, then its triangles read by trimesh."""

from __future__ import annotations

import json
import struct
from typing import Any

from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.geometry import Mesh, by_trimesh, check_claim, check_counts
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

MAX_JSON_BYTES = 8 << 20
MAX_NODES, MAX_DEPTH = 10_000, 128
GLTF_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
# Required extensions that change materials, lights or the type of numbers, and no shape.
HARMLESS = (
    "KHR_materials_",
    "KHR_texture_",
    "EXT_texture_",
    "MSFT_texture_",
    "KHR_lights_",
    "KHR_xmp",
    "KHR_mesh_quantization",
)
MODES = {0: "points", 1: "lines", 4: "triangles", 5: "triangle strips"}  # trimesh ignores the others
GLTF_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}


def read_glb(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the mesh of a GLB. Its chunks and its JSON are checked first, against the file and the limits."""
    if len(data) < 20:
        raise DataError(f"{source.shown}: ends inside the GLB header")
    length, json_bytes = struct.unpack("<8x2I", data[:16])
    check_claim(source, max(length, 20 + json_bytes), len(data))
    if json_bytes > MAX_JSON_BYTES:
        raise DataError(f"{source.shown}: {json_bytes} bytes of JSON in a GLB, expected <= {MAX_JSON_BYTES}")
    _check_gltf(source, json.loads(data[20 : 20 + json_bytes]), len(data) - 20 - json_bytes, limits)
    return by_trimesh(source, data, "glb")


def _check_gltf(source: Source, tree: dict[str, Any], binary_bytes: int, limits: Limits) -> None:
    """Raise DataError if a glTF tree names other files, claims more than the file holds, or unfolds past the limits."""
    if any("uri" in buffer for buffer in tree.get("buffers", [])):
        raise DataError(f"{source.shown}: external reference refused", "expected a GLB with all its data inside")
    _check_extensions(source, tree)
    accessors, nodes = tree.get("accessors", []), tree.get("nodes", [])
    _check_nodes(source, nodes)
    view_bytes = [view["byteLength"] for view in tree.get("bufferViews", [])]
    counts = [accessor["count"] for accessor in accessors]
    if any(not isinstance(size, int) or size < 0 for size in view_bytes + counts):
        raise DataError(f"{source.shown}: a size in the GLB is not a whole number")
    check_claim(source, max(view_bytes, default=0), binary_bytes)
    source.check_decoded(sum(view_bytes), 1, limits)  # trimesh copies each view
    total = 0
    for accessor, count in zip(accessors, counts, strict=True):
        needed = count * GLTF_BYTES[accessor["componentType"]] * GLTF_COLUMNS[accessor["type"]]
        if count > 3 * limits.faces:
            source.check_limit(count, "vertices", "vertices", limits)
        if "bufferView" in accessor:
            check_claim(source, needed, view_bytes[accessor["bufferView"]])
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
    _check_shapes(source, tree)


HINT = "write it plainly: gltf-transform copy IN OUT, then gltf-transform dequantize OUT OUT"


def _check_extensions(source: Source, tree: dict[str, Any]) -> None:
    """Raise DataError for an extension that changes shapes and is not read here."""
    names = [str(name) for name in tree.get("extensionsRequired", [])]
    names += [name for view in tree.get("bufferViews", []) for name in view.get("extensions", {}) if "meshopt" in name]
    for name in names:
        if not name.startswith(HARMLESS):
            raise DataError(f"{source.shown}: needs the glTF extension {show_path(name)}, which is not read here", HINT)


def _check_shapes(source: Source, tree: dict[str, Any]) -> None:
    """Raise DataError for vertices and faces that trimesh would read as zeros or other numbers."""
    accessors = tree.get("accessors", [])
    for primitive in (each for mesh in tree.get("meshes", []) for each in mesh["primitives"]):
        if (mode := primitive.get("mode", 4)) not in MODES:
            raise DataError(
                f"{source.shown}: a glTF primitive of mode {mode!r:.20}", f"expected {list(MODES.values())}"
            )
        used = [primitive["attributes"]["POSITION"], primitive.get("indices")]
        for accessor in (accessors[index] for index in used if index is not None):
            if "sparse" in accessor:
                raise DataError(f"{source.shown}: sparse accessors of glTF, which are not read here", HINT)
            if "bufferView" not in accessor:
                by = "".join(f", only by {show_path(name)}" for name in primitive.get("extensions", {}))
                raise DataError(f"{source.shown}: vertices or faces without data{by}", HINT)
            if accessor.get("normalized"):
                raise DataError(f"{source.shown}: normalised integers as vertices, which are not read here", HINT)


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
