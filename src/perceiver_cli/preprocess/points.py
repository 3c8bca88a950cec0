"""Point clouds and the surfaces of meshes: positions only, as in the paper's ModelNet40 model (section 4.3)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.preprocess import register
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Modality, Rng, check_contract
from perceiver_cli.preprocess.mesh_files import FORMATS, Floats, mesh_format, read_mesh
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits, Positive, Range, Size


class PointsSpec(InputSpec):
    """Points of a cloud or of a mesh's surface: positions only (paper 4.3)."""

    modality: Literal["points"] = "points"
    num_points: Annotated[int, Field(ge=1, le=1 << 20)] = 2048  # inputs of the model
    max_resolution: tuple[Positive, Positive, Positive] = (2240.0, 2240.0, 2240.0)  # 10 x 112 x 2
    patch: tuple[Size, ...] = (1,)
    # Points sampled once from each file and kept; each visit in training draws num_points from these.
    pool_points: Annotated[int, Field(ge=1, le=1 << 24)] = 8192
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
TINY_POINTS = 64  # a cloud with fewer points is a fault


class PointsModality(Modality[PointsSpec]):
    """Meshes and point clouds in common formats of a single file."""

    name = "points"
    precedence = 4
    formats = ", ".join(FORMATS)
    decides = ("pool_points",)
    paper_preset = "modelnet40"
    preparation = "num_points of the surface or cloud; centred on their mean, divided by the largest coordinate"

    def sniff(self, head: bytes, name: str) -> bool:
        return mesh_format(head, name) is not None

    def load(self, source: Source, spec: PointsSpec, limits: Limits) -> Array:
        """Return up to `spec.pool_points` points (P, 3) float32: samples of the surface, the same every time.

        Faces are drawn in proportion to their area, and points uniformly on each face. Draws are independent, so every
        prefix is a fair sample too. Without faces, or without area, the points are the vertices.
        """
        source.check_decoded(spec.pool_points, 12, limits)
        vertices, faces = read_mesh(source, limits)
        check_contract(source, vertices, "points")
        if np.abs(vertices).max() > MAX_COORDINATE:
            raise DataError(f"{source.shown}: coordinates beyond {MAX_COORDINATE:g}")
        if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
            wrong = faces.max() if faces.max() >= len(vertices) else faces.min()
            raise DataError(f"{source.shown}: a face names vertex {wrong}, found {len(vertices)} vertices")
        return _pool(vertices, faces, spec.pool_points).astype(np.float32)

    def loaded(self, spec: PointsSpec) -> tuple[str, tuple[int | None, ...]]:
        return "float32", (None, 3)

    def layout(self, spec: PointsSpec) -> Layout:
        """Return num_points inputs of positions alone: 387 channels with 64 bands (paper 4.3)."""
        if spec.patch != (1,):
            raise UsageError(f"inputs.points.patch {list(spec.patch)}: points have no grid, expected [1]")
        if spec.positions == "learned":
            raise UsageError("inputs.points.positions cannot be learned: points have no fixed places")
        grid = (spec.num_points,)
        return Layout(grid, 0, 3, spec.bands, spec.max_resolution, is_grid=False, permutation=spec.permutation)

    def prepare(self, raw: Array, spec: PointsSpec, rng: Rng | None) -> ByteArray:
        """Return num_points of the pool `raw` (P, 3), normalised to [-1, 1], as positions (M, 3) without values.

        Steps as in paper 4.3: centre; with `rng` scale each point, stretch, mirror, rotate and add noise; centre again;
        divide by the largest coordinate. Equal points become zeros.
        """
        count, size = spec.num_points, len(raw)
        if rng is None:
            picked = np.arange(count) % size
        elif count <= size:
            picked = rng.choice(size, count, replace=False, shuffle=False)
        else:
            picked = np.resize(rng.permutation(size), count)
        points = _centred(raw[picked])
        if rng is not None:
            points = points * rng.uniform(*spec.point_scale, (count, 1)).astype(np.float32)
            if spec.stretch != (1.0, 1.0):
                points = points * rng.uniform(*spec.stretch, 3).astype(np.float32)
            for axis in spec.mirror:
                if rng.random() < 0.5:
                    points[:, "xyz".index(axis)] *= -1
            if spec.rotate != "none":
                points = points @ random_rotation(spec.rotate, rng)
            if spec.jitter:
                points = points + rng.normal(0, spec.jitter * np.abs(points).max(), points.shape).astype(np.float32)
        points = _centred(points)
        points /= np.abs(points).max() or 1.0
        return ByteArray(np.empty((count, 0), np.float32), points.astype(np.float32, copy=False))

    def fault(self, raw: Array) -> str | None:
        return "tiny" if len(raw) < TINY_POINTS else super().fault(raw)


MODALITY = PointsModality()
register(MODALITY)


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


def _pool(vertices: Floats, faces: NDArray[np.int64], count: int) -> Floats:
    """Return `count` area-weighted samples of the surface, or at most `count` vertices if there is no surface."""
    rng = np.random.default_rng(POOL_SEED)
    if len(faces):
        blocks = range(0, len(faces), BLOCK_FACES)
        area = np.cumsum(np.concatenate([_areas(vertices, faces[i : i + BLOCK_FACES]) for i in blocks]))
        if area[-1] > 0:
            # side="right": a draw of exactly 0 must not choose a first face without area.
            drawn = np.searchsorted(area, rng.random(count) * area[-1], side="right").clip(max=len(faces) - 1)
            origin, first, second = (vertices[faces[drawn, corner]] for corner in range(3))
            u, v = weights = rng.random((2, count, 1))
            u, v = np.where(u + v > 1, 1 - weights, weights)  # fold back the far half of the parallelogram
            return np.asarray(origin + u * (first - origin) + v * (second - origin))
    if len(vertices) <= count:
        return vertices
    return np.asarray(vertices[rng.choice(len(vertices), count, replace=False)])


def _areas(vertices: Floats, faces: NDArray[np.int64]) -> Floats:
    """Return twice the area of each triangle."""
    origin, first, second = (vertices[faces[:, corner]] for corner in range(3))
    return np.asarray(np.linalg.norm(np.cross(first - origin, second - origin), axis=1))
