"""What readers of meshes and point clouds return, the checks that they share, and the names of columns."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

Floats = NDArray[np.float64]
NO_FACES = np.empty((0, 3), np.int64)
BOM = b"\xef\xbb\xbf"  # which editors put before UTF-8
NORMALS, COLOURS = ("nx", "ny", "nz"), ("red", "green", "blue")
UNIT = 0.02  # largest difference of a normal's length from 1: texts round numbers
# Other names of columns, in lower case; "scalar_" is CloudCompare's prefix.
ALIASES = {"i": "intensity", "reflectance": "intensity", "r": "red", "g": "green", "b": "blue"}
ALIASES |= {f"diffuse_{name}": name for name in COLOURS}
ALIASES |= {other.format(axis): f"n{axis}" for other in ("normal_{}", "normal{}", "n_{}") for axis in "xyz"}


class Mesh(NamedTuple):
    """The content of a file: vertices (V, 3), and triangles (F, 3) of vertex numbers; F is 0 for a point cloud.

    columns: returns the other columns (V,) by name; a file's columns are read only when this is called.
    """

    vertices: Floats
    faces: NDArray[np.int64] = NO_FACES
    columns: Callable[[], Mapping[str, Array]] = dict


def check_counts(source: Source, vertices: int, faces: int, limits: Limits) -> None:
    """Raise LimitError if a mesh has more vertices or faces than the limits allow."""
    source.check_limit(vertices, "vertices", "vertices", limits)
    source.check_limit(faces, "faces", "faces", limits)


def check_claim(source: Source, claimed: int, available: int) -> None:
    """Raise DataError if a file claims more bytes than it has."""
    if claimed > available:
        raise DataError(f"{source.shown}: declared at least {claimed} bytes of data, found {available}")


def unix_lines(data: bytes) -> bytes:
    """Return a text with line feeds for carriage returns, if these alone end its lines."""
    return data if b"\n" in data else data.replace(b"\r", b"\n")


def plain_name(name: str) -> str:
    """Return the usual name of a column: `Nx` and `normal_x` are both nx."""
    name = name.lower().removeprefix("scalar_")
    return ALIASES.get(name, name)


def are_normals(rows: Array) -> bool:
    """Return whether rows (N, 3) are unit vectors; a few may be missing, which are zeros."""
    lengths = np.linalg.norm(np.asarray(rows, np.float64), axis=1)
    unit = np.abs(lengths - 1) < UNIT
    return bool(len(rows)) and bool((unit | (lengths == 0)).all()) and float(unit.mean()) > 0.9


def columns_by_place(table: Array) -> dict[str, Array]:
    """Return the columns of a table (N, 3 or more) without names: by number, counted from 1, and by usual names.

    Writers put one number, or three, or one and then threes behind x, y, z: an intensity, unit normals, colours.
    """
    columns = {str(place + 1): table[:, place] for place in range(3, table.shape[1])}
    place, rest = 3, table.shape[1] - 3
    if rest % 3 == 1 and not (rest > 1 and are_normals(table[:, 3:6])):
        columns["intensity"] = table[:, 3]
        place = 4
    while place + 3 <= table.shape[1]:
        triple = table[:, place : place + 3]
        names = NORMALS if NORMALS[0] not in columns and are_normals(triple) else COLOURS
        columns |= {name: triple[:, i] for i, name in enumerate(names) if name not in columns}
        place += 3
    return columns


def by_trimesh(source: Source, data: bytes, file_type: str) -> Mesh:
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
    return Mesh(np.concatenate(vertices), np.concatenate(faces))
