"""Embeddings of any number of inputs in one file, written row by row in constant memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from perceiver_cli.files import atomic_write, check_suffix
from perceiver_cli.records.npy import npy_header

if TYPE_CHECKING:
    from perceiver_cli.inference.predictor import Prediction


def check_embeddings(path: str | os.PathLike[str]) -> str:
    """Return the suffix of an output. Raises UsageError if it is not a format of embeddings."""
    return check_suffix(path, (".npy", ".safetensors"), "--embeddings", "not a format of embeddings")


def keeping_embeddings(
    predictions: Iterable[Prediction], path: str | os.PathLike[str], channels: int
) -> Iterator[Prediction]:
    """Yield predictions and write their embeddings, D = `channels`, in the same order.

    FILE.npy holds rows (n, D); FILE.safetensors also their "paths", UTF-8, each ended by NUL. An unreadable input has a
    row of NaN. The file appears at the end. Both formats begin with the number of rows, known only then: npy's header
    is overwritten, the content of safetensors waits in temporary files. Raises UsageError for another suffix,
    ResourceError if the file cannot be written.
    """
    named = check_embeddings(path) == ".safetensors"
    count, folder = 0, os.path.dirname(path) or "."  # temporary files need the disk of the output
    with atomic_write(path) as file, TemporaryFile(dir=folder) as waiting, TemporaryFile(dir=folder) as names:
        if not named:
            file.write(npy_header("<f4", (0, channels)))
        for prediction in predictions:
            row = np.full(channels, np.nan) if prediction.embedding is None else prediction.embedding
            (waiting if named else file).write(row.astype("<f4", copy=False).tobytes())
            if named:
                names.write(os.fsencode(prediction.path) + b"\0")
            count += 1
            yield prediction
        if not named:
            file.seek(0)
            file.write(npy_header("<f4", (count, channels)))
            return
        end = 4 * count * channels
        tensors = {
            "embeddings": {"dtype": "F32", "shape": [count, channels], "data_offsets": [0, end]},
            "paths": {"dtype": "U8", "shape": [names.tell()], "data_offsets": [end, end + names.tell()]},
        }
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)  # aligns the tensors
        file.write(len(header).to_bytes(8, "little") + header)
        for content in (waiting, names):
            content.seek(0)
            shutil.copyfileobj(content, file)
