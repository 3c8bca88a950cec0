"""Point clouds and the surfaces of meshes: positions, as in the paper's ModelNet40 model (4.3), and chosen columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import register
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Modality, Rng, check_contract, stem_in_words
from perceiver_cli.preprocess.geometry import COLOURS, NORMALS, Floats, Mesh
from perceiver_cli.preprocess.mesh_files import FORMATS, mesh_format, read_mesh
from perceiver_cli.preprocess.point_tables import may_be_points
from perceiver_cli.preprocess.source import Source, as_data_errors, probed
from perceiver_cli.preprocess.spec import InputSpec, Limits, Positive, Range, Size


class PointsSpec(InputSpec):
    """Points of a cloud or of a mesh's surface: positions (paper 4.3), and columns that are named here."""

    newer = ("columns", "mean", "std", "stem", "stem_points", "stem_neighbours", "stem_channels")
    modality: Literal["points"] = "points"
    num_points: Annotated[int, Field(ge=1, le=1 << 20)] = 2048  # inputs of the model
    max_resolution: tuple[Positive, Positive, Positive] = (2240.0, 2240.0, 2240.0)  # 10 x 112 x 2
    patch: tuple[Size, ...] = (1,)
    # Learned layers before positions are attached: none (the paper), or stem_points of the points, each with what its
    # nearest neighbours among all points show of the surface.
    stem: Literal["none", "neighbours"] = "none"
    stem_points: Size = 256  # inputs of the model after the stem
    stem_neighbours: Annotated[int, Field(ge=1, le=256)] = 16  # points that the stem sees around each input
    stem_channels: Size = 64  # channels after the stem
    # Points sampled once from each file and kept; each visit in training draws num_points from these.
    pool_points: Annotated[int, Field(ge=1, le=1 << 24)] = 8192
    # Other numbers of each point, as values beside its position: names as in the file ("intensity", "red", "nx", ...),
    # or "4" for the fourth number of a row. Colours become 0 to 1; normals unit vectors: of a mesh those of its faces,
    # of a cloud without any those of the plane through each point's neighbours.
    columns: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=64)] = ()
    mean: tuple[float, ...] | Literal["auto"] = "auto"  # mean of each column; "auto": that of the training files
    std: tuple[Positive, ...] | Literal["auto"] = "auto"  # divisor of each column after mean; "auto": as mean
    # Training: a factor for each point (paper 4.3), rotation about one axis, a factor for each axis, a mirror along
    # each named axis with probability one half, and noise on each coordinate.
    point_scale: Range = (0.99, 1.01)
    rotate: Literal["none", "x", "y", "z", "any"] = "none"  # axis of random turns
    stretch: Range = (1.0, 1.0)  # range of the factor for each axis
    mirror: tuple[Literal["x", "y", "z"], ...] = ()  # axes along which half of the clouds are mirrored
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.0  # standard deviation of noise added to each point


POOL_SEED = 0  # the pool of a file is the same in every run
MAX_COORDINATE = 1e30  # squares cannot overflow float64, and sums cannot overflow float32
BLOCK_FACES = 1 << 20  # faces per block of areas, to bound memory
FAR = 1000  # distance from zero, in sizes of the shape, from which float32 rounds it visibly
NEIGHBOURS = 12  # of a point, itself among them, that give the normal of a cloud without normals
PROBES = 16  # files that are decoded to settle mean and std
TINY_POINTS = 64  # a cloud with fewer points is a fault


class PointsModality(Modality[PointsSpec]):
    """Meshes and point clouds in common formats of a single file."""

    name = "points"
    precedence = 4
    formats = ", ".join(FORMATS)
    suffixes = frozenset({
        ".ply", ".off", ".obj", ".stl", ".glb", ".gltf", ".pcd", ".las", ".laz",
        ".xyz", ".xyzi", ".xyzn", ".xyzrgb", ".pts", ".asc",
    })  # fmt: skip
    decides = ("pool_points", "columns")
    paper_preset = "modelnet40"
    preparation = "num_points of the surface or cloud; centred on their mean, divided by the largest coordinate"

    def sniff(self, head: bytes, name: str) -> bool:
        return mesh_format(head, name) is not None

    def may_read(self, head: bytes, name: str) -> bool:
        return may_be_points(head)

    def is_table(self, head: bytes, name: str) -> bool:
        found = mesh_format(head, name, asked=True)
        return found is not None and found.is_table

    def load(self, source: Source, spec: PointsSpec, limits: Limits) -> Array:
        """Return up to `spec.pool_points` points (P, 3 + columns) float32, the same every time.

        Of a mesh they are samples of the surface: faces are drawn in proportion to their area, and points uniformly on
        each face. Draws are independent, so every prefix is a fair sample too. Without faces, or without area, the
        points are the vertices. Points of a cloud that are not finite are left out, and noted.
        """
        source.check_decoded(spec.pool_points, 4 * (3 + len(spec.columns)), limits)
        mesh = read_mesh(source, limits)
        values = _values(source, mesh, spec.columns)
        if not len(mesh.faces):
            mesh, values = _finite(source, mesh, values)
        vertices, faces = check_contract(source, mesh.vertices, "points"), mesh.faces
        check_contract(source, values, "columns") if values.size else None
        for noun, numbers in (("coordinates", vertices), ("columns", values)):
            if np.abs(numbers).max(initial=0) > MAX_COORDINATE:
                raise DataError(f"{source.shown}: {noun} beyond {MAX_COORDINATE:g}")
        if len(vertices) > 1 and (vertices == vertices[0]).all():
            raise DataError(f"{source.shown}: all {len(vertices)} points are at the same place", "expected a shape")
        if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
            wrong = faces.max() if faces.max() >= len(vertices) else faces.min()
            raise DataError(f"{source.shown}: a face names vertex {wrong}, found {len(vertices)} vertices")
        points, drawn = _pool(vertices, faces, values, spec)
        places = _normals_among(spec.columns)
        if places and not len(faces) and not values[:, places].any():
            source.note("no normals: estimated from the neighbours of each point")
            drawn[:, places] = estimated_normals(points)
        return np.hstack([_near_zero(points), drawn]).astype(np.float32)

    def loaded(self, spec: PointsSpec) -> tuple[str, tuple[int | None, ...]]:
        return "float32", (None, 3 + len(spec.columns))

    def in_words(self, spec: PointsSpec) -> str:
        columns = f", with {', '.join(spec.columns)}" if spec.columns else ""
        return f"{spec.num_points:,} points of each surface or cloud{columns}{stem_in_words(spec.stem)}"

    def resolve(self, spec: PointsSpec, sources: Sequence[Source], limits: Limits) -> PointsSpec:
        """Return `spec` with mean and std of each column in a sample of `sources`; 0 and 1 without sources.

        Normals keep 0 and 1: their directions are relative to the axes. Raises DataError if no source can be read.
        """
        if "auto" not in (spec.mean, spec.std):
            return spec
        mean, std = np.zeros(len(spec.columns)), np.ones(len(spec.columns))
        if spec.columns and sources:
            arrays = probed(sources[:PROBES], partial(self.load, spec=spec, limits=limits), "inputs.points.mean")
            sample = np.concatenate([array[:, 3:].astype(np.float64) for array in arrays])
            known = np.isin(spec.columns, NORMALS)
            mean, std = np.where(known, mean, sample.mean(axis=0)), np.where(known, std, sample.std(axis=0))
        neat = {"mean": [float(f"{m:.4g}") for m in mean], "std": [float(f"{s:.4g}") or 1.0 for s in std]}
        return spec.filled({key: tuple(numbers) for key, numbers in neat.items()})

    def layout(self, spec: PointsSpec) -> Layout:
        """Return num_points inputs, or stem_points after a stem; the paper's have 387 channels of positions alone."""
        if spec.patch != (1,):
            raise UsageError(f"inputs.points.patch {list(spec.patch)}: points have no grid, expected [1]")
        if spec.positions == "learned":
            raise UsageError("inputs.points.positions cannot be learned: points have no fixed places")
        count = len(spec.columns)
        if len({*spec.columns, "x", "y", "z"}) != count + 3:
            raise UsageError(f"inputs.points.columns {list(spec.columns)}: x, y or z, or a name twice", "leave it out")
        if 0 < len(set(NORMALS) & set(spec.columns)) < 3:
            raise UsageError(
                f"inputs.points.columns {list(spec.columns)}: nx, ny and nz rotate together, expected all three"
            )
        mean, std = (() if number == "auto" else number for number in (spec.mean, spec.std))
        for name, numbers in (("mean", mean), ("std", std)):
            if numbers and len(numbers) != count:
                raise UsageError(f"inputs.points.{name} has {len(numbers)} numbers, expected {count}, one for a column")
        stem: dict[str, Any] = {}
        if spec.stem != "none":
            stem = {"stem": spec.stem, "stem_channels": spec.stem_channels, "values_grid": (spec.num_points,)}
            stem["stem_neighbours"] = min(spec.stem_neighbours, spec.num_points)
        num_inputs = min(spec.stem_points, spec.num_points) if stem else spec.num_points
        return Layout((num_inputs,), count, 3, spec.bands, spec.max_resolution, is_grid=False,
                      mean=mean or (0.0,), std=std or (1.0,), permutation=spec.permutation, **stem)  # fmt: skip

    def prepare(self, raw: Array, spec: PointsSpec, rng: Rng | None) -> ByteArray:
        """Return num_points of the pool `raw` (P, 3 + c): positions (M, 3) normalised to [-1, 1], and values (M, c).

        Steps as in paper 4.3: centre; with `rng` scale each point, stretch, mirror, rotate and add noise; centre again;
        divide by the largest coordinate. Equal points become zeros. Normals follow; other columns stay as they are.
        """
        count, picked = spec.num_points, picked_points(spec, len(raw), rng)
        points, values = _centred(raw[picked, :3]), raw[picked, 3:]
        if rng is not None:
            points = points * rng.uniform(*spec.point_scale, (count, 1)).astype(np.float32)
            change = np.eye(3, dtype=np.float32)  # of normals
            if spec.stretch != (1.0, 1.0):
                factors = rng.uniform(*spec.stretch, 3).astype(np.float32)
                points = points * factors
                change = change / factors
            for axis in spec.mirror:
                if rng.random() < 0.5:
                    points[:, "xyz".index(axis)] *= -1
                    change[:, "xyz".index(axis)] *= -1
            if spec.rotate != "none":
                turn = random_rotation(spec.rotate, rng)
                points, change = points @ turn, change @ turn
            if spec.jitter:
                points = points + rng.normal(0, spec.jitter * np.abs(points).max(), points.shape).astype(np.float32)
            if places := _normals_among(spec.columns):
                values[:, places] = _unit(values[:, places] @ change)
        points = _centred(points)
        points /= np.abs(points).max() or 1.0
        return ByteArray(values, points.astype(np.float32, copy=False))

    def viewed(self, spec: PointsSpec) -> PointsSpec:
        """Return `spec` without variations: another view is another draw of points."""
        calm = {"point_scale": (1.0, 1.0), "rotate": "none", "stretch": (1.0, 1.0), "mirror": (), "jitter": 0.0}
        return spec.model_copy(update=calm)

    def fault(self, raw: Array) -> str | None:
        return "tiny" if len(raw) < TINY_POINTS else super().fault(raw[:, :3])


MODALITY = PointsModality()
register(MODALITY)


def picked_points(spec: PointsSpec, size: int, rng: Rng | None = None) -> NDArray[np.intp]:
    """Return the indices (num_points,) of the points of a pool that are the inputs, in their order."""
    count = spec.num_points
    if spec.stem != "none":  # its first points are centres: a fair sample, also of a cloud stored line by line
        return np.resize((rng or np.random.default_rng(POOL_SEED)).permutation(size), count)
    if rng is None:
        return np.arange(count) % size
    if count <= size:
        return rng.choice(size, count, replace=False, shuffle=False)
    return np.resize(rng.permutation(size), count)


def _centred(points: Array) -> Array:
    # The first point is subtracted first: equal points become exact zeros, which a rounded mean would not give.
    points = points - points[0]
    points -= points.mean(axis=0)
    return points


def random_rotation(axis: str, rng: Rng) -> NDArray[np.float32]:
    """Return a random rotation (3, 3): uniform about one axis, or uniform over all rotations for "any"."""
    if axis == "any":
        turn, upper = np.linalg.qr(rng.normal(size=(3, 3)))
        turn *= np.sign(np.diag(upper))  # makes it uniform (Mezzadri 2007)
        turn[0] *= np.sign(np.linalg.det(turn))
        return turn.astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.eye(3)
    i, j = [k for k in range(3) if k != "xyz".index(axis)]
    turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return turn.astype(np.float32)


def _values(source: Source, mesh: Mesh, names: Sequence[str]) -> Floats:
    """Return the named columns (V, c) of a mesh: colours in 0..1, unit normals, other numbers as they are.

    Normals of a surface, and of a cloud without any, are zeros here: they come from the points drawn later. Raises
    DataError for a column that the file lacks.
    """
    values = np.zeros((len(mesh.vertices), len(names)))
    wanted = [name for name in names if not (len(mesh.faces) and name in NORMALS)]
    if not wanted:
        return values
    with as_data_errors(source, "columns"):
        columns = mesh.columns()
        if set(NORMALS).isdisjoint(columns):
            wanted = [name for name in wanted if name not in NORMALS]
        if missing := [name for name in wanted if name not in columns]:
            present = ", ".join(map(show_path, columns)) or "none besides x, y, z"
            raise DataError(f"{source.shown}: no column {', '.join(missing)}: its columns are {present}",
                            "change inputs.points.columns")  # fmt: skip
        colours = [np.asarray(columns[name]) for name in wanted if name in COLOURS]
        white = _white(colours) if colours else 1.0
        for name in wanted:
            values[:, names.index(name)] = np.asarray(columns[name], np.float64) / (white if name in COLOURS else 1.0)
        if set(NORMALS) <= set(wanted):
            places = _normals_among(names)
            values[:, places] = _unit(values[:, places])
    return values


def _white(colours: Sequence[Array]) -> float:
    """Return the value of full brightness: 255 for bytes, else the least of 1 (floats), 255, 65535 above all."""
    if all(array.dtype == np.uint8 for array in colours):
        return 255.0
    top = max(float(np.max(array, initial=0)) for array in colours)
    is_float = any(array.dtype.kind == "f" for array in colours)
    return 1.0 if is_float and top <= 1 else 255.0 if top <= 255 else 65535.0


def _normals_among(names: Sequence[str]) -> list[int]:
    """Return the places of nx, ny and nz among the names of columns; none unless all three are there."""
    return [names.index(name) for name in NORMALS] if set(NORMALS) <= set(names) else []


def _unit(vectors: Array) -> Array:
    """Return vectors (N, 3) at length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0))


def estimated_normals(points: Floats) -> Floats:
    """Return a unit vector (P, 3) for each point of a cloud: the normal of the plane through its nearest neighbours.

    Hoppe et al. 1992. Of its two directions the one away from the mean of the cloud.
    """
    from scipy.spatial import cKDTree

    nearest = cKDTree(points).query(points, k=np.arange(min(NEIGHBOURS, len(points))) + 1)[1]
    around = points[nearest]  # (P, neighbours, 3)
    around = around - around.mean(axis=1, keepdims=True)
    around /= np.abs(around).max(axis=(1, 2), keepdims=True).clip(np.finfo(float).tiny)  # squares keep their digits
    normals = np.linalg.eigh(around.swapaxes(1, 2) @ around)[1][:, :, 0]  # of the smallest eigenvalue
    away = (normals * (points - points.mean(axis=0))).sum(axis=1, keepdims=True)
    return np.asarray(np.where(away < 0, -normals, normals))


def _finite(source: Source, mesh: Mesh, values: Floats) -> tuple[Mesh, Floats]:
    """Return a cloud without the points that are not finite, as lidar has them for beams that do not come back."""
    kept = np.asarray(np.isfinite(np.hstack([mesh.vertices, values])).all(axis=1))
    if kept.all() or not kept.any():
        return mesh, values
    source.note(f"left out {int((~kept).sum())} of {len(kept)} points that are not finite numbers")
    return Mesh(mesh.vertices[kept]), values[kept]


def _near_zero(points: Floats) -> Floats:
    """Return points, moved by whole numbers if float32 would round their shape: metres on a map begin at millions."""
    low, high = points.min(axis=0), points.max(axis=0)
    if 0 < (high - low).max() < np.abs(points).max() / FAR:
        points = points - np.floor(low)
    return points


def _pool(vertices: Floats, faces: NDArray[np.int64], values: Floats, spec: PointsSpec) -> tuple[Floats, Floats]:
    """Return the pool: area-weighted samples of the surface, or at most as many vertices if there is no surface.

    Also return their values: interpolated in each face, and for normals those of the face.
    """
    count, rng = spec.pool_points, np.random.default_rng(POOL_SEED)
    if len(faces):
        blocks = range(0, len(faces), BLOCK_FACES)
        area = np.cumsum(np.concatenate([_areas(vertices, faces[i : i + BLOCK_FACES]) for i in blocks]))
        if area[-1] > 0:
            # side="right": a draw of exactly 0 must not choose a first face without area.
            drawn = np.searchsorted(area, rng.random(count) * area[-1], side="right").clip(max=len(faces) - 1)
            origin, first, second = (vertices[faces[drawn, corner]] for corner in range(3))
            u, v = weights = rng.random((2, count, 1))
            u, v = np.where(u + v > 1, 1 - weights, weights)  # fold back the far half of the parallelogram
            at, one, other = (values[faces[drawn, corner]] for corner in range(3))
            between = at + u * (one - at) + v * (other - at)
            if places := _normals_among(spec.columns):
                between[:, places] = _unit(np.cross(first - origin, second - origin))
            return np.asarray(origin + u * (first - origin) + v * (second - origin)), between
    if len(vertices) <= count:
        return vertices, values
    chosen = rng.choice(len(vertices), count, replace=False)
    return vertices[chosen], values[chosen]


def _areas(vertices: Floats, faces: NDArray[np.int64]) -> Floats:
    """Return twice the area of each triangle."""
    origin, first, second = (vertices[faces[:, corner]] for corner in range(3))
    return np.asarray(np.linalg.norm(np.cross(first - origin, second - origin), axis=1))
