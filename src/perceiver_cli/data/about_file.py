"""The answer of `perceiver info FILE`: what a file is taken for, and what is decoded from it."""

from __future__ import annotations

from typing import Any

from perceiver_cli.config import load_preset
from perceiver_cli.data.containers import containers
from perceiver_cli.data.manifest import is_manifest
from perceiver_cli.errors import DataError
from perceiver_cli.files import perceiver_command
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.detection import looked_at, without_rows
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits


def about_file(path: str, limits: Limits) -> tuple[dict[str, Any], list[tuple[Array, InputSpec]]]:
    """Return the facts about a file and, for each modality that reads it, the decoded array with its spec.

    The tiny preset of the modality decodes it, with every "auto" settled by this file. A file that holds or names
    other files is not decoded. Raises DataError if it is not certain that a modality reads the file.
    """
    lint = {"looked_at_by": perceiver_command(["perceiver", "lint", path])}
    if (held := containers(path)) is not None:
        return {"path": path, "taken_for": f"a file of {held[0]}", "sure": "by its content", **lint}, []
    file = without_rows(looked_at(Source(path)))
    if file.error is not None:
        if is_manifest(path):
            return {"path": path, "taken_for": "a manifest", "sure": "by its name", **lint}, []
        raise file.error
    facts: dict[str, Any] = {"path": path, "taken_for": file.source.kinds[0], "sure": "by its content"}
    decoded = []
    for kind in file.source.kinds:
        try:
            facts[kind], raw, spec = _decoded(kind, file.source, limits)
        except DataError as error:
            if len(file.source.kinds) == 1:
                raise
            facts[kind] = {"error": str(error)}  # a video without sound
            continue
        decoded.append((raw, spec))
    if not decoded:
        raise DataError(facts[file.source.kinds[0]]["error"])
    if file.source.notes:
        facts["notes"] = list(file.source.notes)
    return facts, decoded


def _decoded(kind: str, source: Source, limits: Limits) -> tuple[dict[str, Any], Array, InputSpec]:
    reader = modality(kind)
    declared = reader.declared(source, limits)  # first, so that an error names the file, not an option that it settles
    spec = settled(reader.resolve(load_preset(f"tiny-{kind}").inputs[kind], [source], limits))
    raw, layout = reader.load(source, spec, limits), reader.layout(spec)
    facts = {
        **declared,
        "decoded": f"{' x '.join(map(str, raw.shape))} {raw.dtype}",
        "values": f"{raw.min():.4g} to {raw.max():.4g}",
        "read_by_a_model": reader.in_words(spec),
    }
    if not layout.is_grid:
        ends = list(zip(raw.min(axis=0), raw.max(axis=0), strict=True))[: layout.dims]
        facts["extents"] = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in ends)
    return facts, raw, spec
