"""Decoded examples, kept once per machine in memory: each process decodes a share, and all map the results."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

import numpy as np

from perceiver_cli.data.decoder import Decoded
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader
from perceiver_cli.model.ranks import Ranks

ALIGNMENT = 64  # bytes
IN_MEMORY = "/dev/shm"  # a folder in memory, on Linux


def preload_shared(
    reader: Reader,
    examples: Sequence[Example],
    budget_bytes: int,
    workers: int,
    ranks: Ranks,
    stopping: Callable[[], bool],
) -> Iterator[int]:
    """Decode examples until the processes of this machine together hold `budget_bytes`; yield the number done.

    All processes learn what one finds unreadable. Sound and video too long to keep are decoded at each visit.
    """
    place = ranks.place
    own = examples[place.local :: place.local_size]
    done = 0
    for done in reader.preload(own, budget_bytes // place.local_size, workers):
        yield min(len(examples), done * place.local_size)
        if stopping():  # the other processes still wait for the next exchange
            break
    with tempfile.NamedTemporaryFile(prefix="perceiver-", dir=_folder(reader, place.local_size)) as file:
        mine = {"host": socket.gethostname(), "path": file.name, "done": done, "kept": _written(reader, file)}
        every = ranks.exchange({**mine, "bad": reader.bad, "notes": reader.notes})
        kept: dict[str, Decoded] = {}
        reader.bad.clear()  # filled again, in the same order in all processes
        for theirs in every:
            reader.bad.update(theirs["bad"])
            reader.notes.update(theirs["notes"])
            if theirs["host"] == mine["host"]:
                with suppress(OSError, ValueError):  # another container has the file: decoded at each visit
                    kept |= _mapped(theirs["path"], theirs["kept"])
        reader.decoded.update(kept)
        ranks.meet()  # all have mapped the files, whose names can go
    yield sum(theirs["done"] for theirs in every if theirs["host"] == every[0]["host"])


def _folder(reader: Reader, processes: int) -> str:
    """Return a folder for the arrays of this machine's processes: in memory if there is room for all."""
    needed = sum(decoded.nbytes for decoded in reader.decoded.values()) * processes
    with suppress(OSError, AttributeError):  # not on every system
        free = os.statvfs(IN_MEMORY)
        if free.f_bavail * free.f_frsize > 2 * needed and os.access(IN_MEMORY, os.W_OK):
            return IN_MEMORY
    return tempfile.gettempdir()


def _written(reader: Reader, file: IO[bytes]) -> dict[str, Any]:
    """Move the decoded arrays of a reader to a file; return where each is, by example. A full disk ends it."""
    kept: dict[str, Any] = {}
    with suppress(OSError):
        for name, decoded in list(reader.decoded.items()):
            if decoded.long or decoded.ready or any(array.dtype.hasobject for array in decoded.arrays.values()):
                continue
            del reader.decoded[name]
            arrays = {}
            for modality, array in decoded.arrays.items():
                file.write(bytes(-file.tell() % ALIGNMENT))
                arrays[modality] = [file.tell(), array.dtype.str, array.shape]
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            kept[name] = {"arrays": arrays, "seconds": decoded.seconds, "notes": decoded.notes}
    return kept


def _mapped(path: str, kept: dict[str, Any]) -> dict[str, Decoded]:
    """Return the arrays that a process of this machine has written, mapped for reading."""
    if not kept:
        return {}
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = {}
    for name, facts in kept.items():
        arrays = {
            modality: np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)
            for modality, (offset, dtype, shape) in facts["arrays"].items()
        }
        found[name] = Decoded(arrays, {}, facts["seconds"], notes=tuple(facts["notes"]))
    return found
