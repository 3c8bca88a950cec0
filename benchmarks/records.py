"""Records: shards against JPEGs and WebDataset, preprocess, a pipe, and the time to open a million records.

python -m benchmarks.records --seconds 5 --rounds 3
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import report, start
from perceiver_cli.cli.options import Json
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader, training_tasks
from perceiver_cli.data.prepare import Job, plan, write_records
from perceiver_cli.machine.made_up import made_up_files
from perceiver_cli.machine.measure import time_calls
from perceiver_cli.model.device import choose_compute
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.format import Facts, Header
from perceiver_cli.records.npy import npy_bytes, parse_npy
from perceiver_cli.records.stream import Feed, Writer, pack, read_records

FILES = 256  # JPEGs of 500 x 375, the size of ImageNet's
BATCH = 32
CHUNK = 64  # files per timed call of preprocess
RECORDS = 1_000_000  # of 8 x 8 pixels
PIPE_BYTES = 1 << 20
ROOT = Path(__file__).parent.parent
# A separate program without torch, so that its memory is that of opening records only.
OPEN_RECORDS = """
import json, sys, time
begin = time.perf_counter()
from perceiver_cli.data.catalog import scan
examples = len(scan(sys.argv[1]).hold_out(0.1).splits["train"])
seconds = time.perf_counter() - begin
from perceiver_cli.malloc import peak_bytes
print(json.dumps({"seconds": seconds, "peak_MiB": peak_bytes() / 2**20, "training_examples": examples}))
"""
POUR = "import sys; from benchmarks.records import pour; pour(sys.argv[2:], float(sys.argv[1]))"


def throughput(seconds: float, rounds: int, count: int = RECORDS) -> Iterator[dict[str, Any]]:
    """Yield samples per second of images as files and as records, MB/s of a pipe, and the cost to open `count` records.

    Reading ends with arrays in memory; the loader also crops to 224 x 224, mirrors and makes batches, in this process.
    Each figure is the median of `rounds`, taken in turn; `ratio` is the median of the ratios within a round to the
    contender `over`.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, shards = Path(folder, "data"), Path(folder, "shards")
        for label in ("a", "b"):
            made_up_files(data / label, "image", FILES // 2)
        recipe = ["inputs.image.flip=0.5", "inputs.image.randaugment_layers=0"]
        job = plan([str(data)], preset="imagenet", changes=recipe)
        for _ in write_records(job, str(shards / "x-%06d.tar"), _nothing, shard_bytes=64_000_000):
            pass
        files, records = scan(data).splits["train"], scan(shards).splits["train"]
        reader = Reader(job.header.inputs, Limits())
        contenders: dict[str, tuple[Callable[[], float], str]] = {
            "read JPEGs": (lambda: _reading(reader, files, seconds), "read JPEGs"),
            "read shards, shuffled": (lambda: _reading(reader, records, seconds), "read JPEGs"),
            "WebDataset, same shards in order": (lambda: _webdataset(shards, seconds), "read shards, shuffled"),
            "loader, JPEGs": (lambda: _loading(reader, files, seconds), "loader, JPEGs"),
            "loader, shards": (lambda: _loading(reader, records, seconds), "loader, JPEGs"),
            "preprocess, 1 worker": (lambda: _preparing(job, 1, seconds), "preprocess, 1 worker"),
            "preprocess, 2 workers": (lambda: _preparing(job, 2, seconds), "preprocess, 1 worker"),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        pipe = []
        for _ in range(rounds):
            for name, (measure, _) in contenders.items():
                rates[name].append(measure())
            pipe.append(_piping(sorted(shards.glob("*.tar")), seconds))
        for name, (_, base) in contenders.items():
            ratios = [rate / other for rate, other in zip(rates[name], rates[base], strict=True)]
            yield {"name": name, "samples_per_s": median(rates[name]), "ratio": median(ratios), "over": base}
    yield {"name": "records through a pipe", "MB_per_s": median(pipe)}
    yield from opening(count)


def _nothing(data: bytes) -> None:
    """Drop the bytes."""


def _reading(reader: Reader, examples: Sequence[Example], seconds: float) -> float:
    order = cycle(np.random.default_rng(0).permutation(len(examples)))

    def read() -> None:
        np.array(reader.decode(examples[int(next(order))]).arrays["image"])  # copied from the mapped file

    return 1 / time_calls(read, seconds).mean


def _loading(reader: Reader, examples: Sequence[Example], seconds: float) -> float:
    batches = reader.batches(training_tasks(examples, BATCH, 0, 0, 1 << 40))
    return BATCH / time_calls(lambda: next(batches), seconds).mean


def _webdataset(shards: Path, seconds: float) -> float:
    """Return samples per second of WebDataset's reader, or NaN if it is not installed."""
    try:
        import webdataset
    except ImportError:
        return float("nan")
    urls = sorted(map(str, shards.glob("*.tar")))
    samples = iter(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode().repeat())
    return 1 / time_calls(lambda: next(samples)["image.npy"], seconds).mean


def _preparing(job: Job, workers: int, seconds: float) -> float:
    """Return files per second of `preprocess`, whose records are dropped."""
    endless = replace(job, examples=list(job.examples) * 1000)
    written = write_records(endless, "-", _nothing, workers)
    rate = CHUNK / time_calls(lambda: list(islice(written, CHUNK)), seconds).mean
    written.close()  # type: ignore[attr-defined]
    return rate


def _piping(tars: Sequence[Path], seconds: float) -> float:
    """Return the MB/s at which this process reads and checks the records of another process."""
    command = [sys.executable, "-c", POUR, str(seconds), *map(str, tars)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=PIPE_BYTES, cwd=ROOT) as writer:
        assert writer.stdout is not None
        feed = Feed(writer.stdout, "'pipe'")  # type: ignore[arg-type]
        begin = None
        for _, record in read_records(feed, Limits(), feed.take):
            for npy in record.arrays.values():
                parse_npy(npy, record.key)
            if begin is None:
                begin, before = time.perf_counter(), feed.at
        assert begin is not None
        return (feed.at - before) / 1e6 / (time.perf_counter() - begin)


def pour(tars: Sequence[str], seconds: float) -> None:
    """Pack the records of tars again and write them to stdout, repeatedly for `seconds`."""
    originals = []
    for tar in tars:
        with open(tar, "rb") as file:
            feed = Feed(file, tar)
            originals += list(read_records(feed, Limits(), feed.take))
    out = sys.stdout.buffer
    writer, number, begin = Writer(out.write, originals[0][0]), 0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        for header, record in originals:
            writer.packed(pack(record.facts, record.arrays, number, header))
            number += 1
    writer.close()
    out.flush()


def opening(count: int) -> Iterator[dict[str, Any]]:
    """Yield seconds and memory of a process that opens `count` tiny records for training, without and with an index."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        spec = ImageSpec(size=(8, 8), color="grey", mean=(0.5,), std=(0.25,))
        header = Header({"image": spec}, tuple("0123456789"))
        array = npy_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8, 1))
        with path.open("wb") as file:
            writer = Writer(file.write, header)
            for number in range(count):
                name = f"{number % 10}/{number:07d}.png"
                facts = Facts(name, name, "train", (str(number % 10),))
                writer.packed(pack(facts, {"image": array}, number, header))
            writer.close()
        for name in ("indexed", "opened"):
            command = [sys.executable, "-c", OPEN_RECORDS, str(path)]
            done = subprocess.run(command, check=True, capture_output=True)
            yield {"name": f"{count:,} records of 8 x 8 pixels, {name}", **json.loads(done.stdout)}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender, in turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
    records: Annotated[int, typer.Option(min=100, help="Number of tiny records to open.")] = RECORDS,
    json: Json = False,
) -> None:
    """Measure reading, loading and writing of records, against JPEGs and WebDataset."""
    report(throughput(seconds, rounds, records), choose_compute("cpu"), json)


if __name__ == "__main__":
    start(main)
