"""The inputs of an exported model as arrays in one file: what `preprocess --model-input` writes. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perceiver_cli.data.decoder import Decoder, View
from perceiver_cli.data.inputs import Named, examples_of
from perceiver_cli.data.listing import data_of_run, ways_to_read
from perceiver_cli.errors import DataError
from perceiver_cli.files import atomic_write, check_suffix, show_path
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.preprocess.base import Array, Layout
from perceiver_cli.run_folder import find_model


def write_model_inputs(
    named: Iterable[Named],
    model: str | None,
    output: str | os.PathLike[str],
    raised: Mapping[str, float],
    given: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a line for each example: its names and its rows in FILE.npz, or its error; then write the file.

    given: see `ways_to_read`.

    FILE.npz holds an array for each input of the exported graph, by its name. An example has a row for each view (eval
    window); an unreadable one has none. Raises DataError if no example can be read, UsageError for another suffix.
    """
    check_suffix(output, (".npz",), "-o", "not a format of a model's inputs")
    path = find_model(model)
    config = read_info(path).config
    decoder = Decoder(config.inputs, config.data.limits.raised(raised))
    views: list[View] = []
    run = data_of_run(path)
    for each in named:
        ways = ways_to_read(run, config.data, given or {}, each if isinstance(each, str) else None)
        for example in examples_of(each, config.inputs, decoder.limits, options=ways):
            line = {"path": example.path, **example.names}
            try:
                own = decoder.views(decoder.decode(example))
            except DataError as error:
                yield {**line, "error": str(error)}
                continue
            yield {**line, "rows": list(range(len(views), len(views) + len(own)))}
            views += own
    if not views:
        raise DataError(f"{show_path(output)}: not written: no input can be read")
    with atomic_write(output) as file:
        np.savez(file, **graph_inputs(decoder.layouts, views))  # type: ignore[arg-type]


def graph_inputs(layouts: Mapping[str, Layout], views: Sequence[View]) -> dict[str, Array]:
    """Return the graph's inputs (B, ...) by name; a missing modality is 0 and not present."""
    arrays: dict[str, Array] = {}
    for name, layout in layouts.items():
        own = [view.get(name) for view in views]
        if layout.channels:
            blank = np.zeros(layout.prepared_shape, np.float32)
            arrays[name] = np.stack([blank if each is None else each.values.astype(np.float32) for each in own])
        if not layout.is_grid:
            nowhere = np.zeros(layout.positions_shape, np.float32)
            places = [None if each is None else each.positions for each in own]
            arrays[f"{name}_positions"] = np.stack([nowhere if each is None else each for each in places])
        if len(layouts) > 1:
            arrays[f"{name}_present"] = np.array([each is not None for each in own])
    return arrays
