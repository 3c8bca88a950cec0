"""Flipped bits in every file that the program writes: each is found, or the answer is the same.

A row makes its files once, in this process, with a model that has not learnt: only equal answers count.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from perceiver_cli.errors import PerceiverError
from tests.faults.table import Place, Verdict, row

COUNT = 12  # pictures
SETS = ("model.num_latents=4", "model.latent_channels=16", "model.num_self_heads=2", "model.schedule=c0 t0")


def flipped(data: bytes, rng: Random) -> tuple[int, bytes]:
    """Return data with one bit flipped, and the place of its byte."""
    changed, place = bytearray(data), rng.randrange(len(data))
    changed[place] ^= 1 << rng.randrange(8)
    return place, bytes(changed)


def judge(place: int, before: Any, answer: Callable[[], Any]) -> Verdict:
    """Return "" if `answer` gives what it gave before, or raises an error of the program."""
    try:
        found = answer()
    except PerceiverError:
        return ""
    except BaseException as error:
        return f"byte {place}: {type(error).__name__}: {error}"
    return "" if found == before else f"byte {place}: another answer, and nothing was said"


def pictures(folder: Path) -> Path:
    """Write a few PNGs of two classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / "data" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    return folder / "data"


def model(folder: Path) -> Path:
    """Write a model of such pictures, with random weights."""
    import torch

    from perceiver_cli.config import load_preset
    from perceiver_cli.model.checkpoint import ModelInfo, save_model
    from perceiver_cli.model.perceiver import Perceiver
    from perceiver_cli.preprocess import modality, settled

    sizes = ("size=[64, 64]", "color=grey", "mean=[0.5]", "std=[0.25]", "patch=[8, 8]")
    config = load_preset("tiny-image").override([*SETS, *(f"inputs.image.{each}" for each in ("stem=none", *sizes))])
    config = config.model_copy(update={"inputs": {name: settled(spec) for name, spec in config.inputs.items()}})
    torch.manual_seed(0)
    layouts = {name: modality(name).layout(spec) for name, spec in config.inputs.items()}
    perceiver = Perceiver(config.model, layouts, 2)
    path = folder / "model.safetensors"
    save_model(path, perceiver.state_dict(), ModelInfo(config, ("a", "b"), 1, {"val_loss": 1.0}))
    return path


def shard(folder: Path, path: Path) -> Path:
    """Write the pictures as a tar of records for a model."""
    from perceiver_cli.data.prepare import plan, write_records

    list(write_records(plan([str(pictures(folder))], model=str(path)), str(folder / "x.tar"), lambda _: None))
    return folder / "x.tar"


def write_kept(path: Path, data: bytes, time: int) -> None:
    """Write a file that keeps its time of change: the index that belongs to it stays valid."""
    path.write_bytes(data)
    os.utime(path, ns=(time, time))


def catalog_of(path: Path) -> Any:
    """Return all that training and evaluation take from records, or the first error of an array."""
    from perceiver_cli.data.catalog import scan
    from perceiver_cli.records.format import Stored

    catalog, found = scan(path), []
    for split, examples in catalog.splits.items():
        for example in examples:
            arrays = [source.array().tobytes() for source in example.sources.values() if isinstance(source, Stored)]
            found.append((split, example.id, example.labels, example.key, example.error, arrays))
    return catalog.classes, catalog.fingerprint, found


@row("a flipped bit in a tar of records", 200, 10)
def tars(place: Place) -> Iterator[Verdict]:
    """In turn read as a file, from stdin, and by its index, which is not made again."""
    from perceiver_cli.data.inputs import Pipe
    from perceiver_cli.inference.predictor import Predictor

    predictor = Predictor(model(place.folder), device="cpu")
    tar = shard(place.folder, predictor.path)
    data, time = tar.read_bytes(), tar.stat().st_mtime_ns

    def answers(source: Any) -> Any:
        found = [(each.path, each.probs) for each in predictor.predict(source) if each.error is None]
        if len(found) < COUNT:
            raise PerceiverError("a record with an error")
        return found

    ways: list[Callable[[], Any]] = [
        lambda: answers(str(tar)),
        lambda: answers(Pipe("-", io.BytesIO(tar.read_bytes()))),
        lambda: catalog_of(tar),
    ]
    before = [way() for way in ways]
    for trial in range(place.count):
        at, changed = flipped(data, place.random)
        write_kept(tar, changed, time)
        yield judge(at, before[trial % 3], ways[trial % 3])
        write_kept(tar, data, time)


@row("a flipped bit in an index of records", 200, 10)
def indexes(place: Place) -> Iterator[Verdict]:
    tar = shard(place.folder, model(place.folder))
    before = catalog_of(tar)
    index = Path(f"{tar}.index")
    data = index.read_bytes()
    for _ in range(place.count):
        at, changed = flipped(data, place.random)
        index.write_bytes(changed)
        yield judge(at, before, lambda: catalog_of(tar))


@row("a flipped bit in a model file", 200, 10)
def models(place: Place) -> Iterator[Verdict]:
    from perceiver_cli.model.checkpoint import load_model

    path = model(place.folder)
    data = path.read_bytes()
    for _ in range(place.count):
        at, changed = flipped(data, place.random)
        path.write_bytes(changed)
        yield judge(at, None, lambda: load_model(path) and "loaded")


def state_of(run: Path) -> Any:
    """Return all that a resumed training, and commands that read a run, take from its folder."""
    from perceiver_cli.config import load_config
    from perceiver_cli.data.splits import read_split
    from perceiver_cli.run_folder import read_log
    from perceiver_cli.training.state import load_state

    state, split = load_state(run), read_split(run / "split.jsonl")
    if state.damaged:
        raise PerceiverError(state.damaged[0])
    log = [{name: record[name] for name in ("step", "val_loss", "best")} for record in read_log(run)]
    tensors = {name: tensor.tolist() for name, tensor in state.tensors.items()}
    load_config(run / "config.toml")  # a user may write it: it is valid, or an error
    return tensors, state.fields, split.classes, split.keys.tolist(), split.held.tolist(), log


@row("a flipped bit in a run folder", 200, 20)
def runs(place: Place) -> Iterator[Verdict]:
    """In MANIFEST.json, both states, split.jsonl, metrics.jsonl and config.toml."""
    sets = [word for each in (*SETS, "train.save_every=2 steps") for word in ("--set", each)]
    few = ("--steps", "4", "--batch-size", "4", "--workers", "0", "--device", "cpu")
    done = place.run("train", pictures(place.folder), "-o", "run", *few, *sets)
    assert done.returncode == 0, done.stderr
    run = place.folder / "run"
    before = state_of(run)
    files = sorted(path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".toml", ".safetensors"))
    files.remove(run / "model.safetensors")
    for trial in range(place.count):
        path = files[trial % len(files)]
        data = path.read_bytes()
        at, changed = flipped(data, place.random)
        path.write_bytes(changed)
        verdict = judge(at, before, lambda: state_of(run))
        yield f"{path.name}: {verdict}" if verdict else ""
        path.write_bytes(data)


@row("a flipped bit in a byte array", 100, 10)
def byte_arrays(place: Place) -> Iterator[Verdict]:
    from perceiver_cli.data.prepare import input_recipe, write_byte_array
    from perceiver_cli.inference.predictor import Predictor
    from perceiver_cli.preprocess.source import Source

    predictor = Predictor(model(place.folder), device="cpu")
    picture = Source(str(next(pictures(place.folder).rglob("*.png"))))
    path = place.folder / "x.safetensors"
    spec, limits = input_recipe(picture, str(predictor.path), None, {})
    write_byte_array(picture, spec, limits, str(path))

    def answer() -> Any:
        (found,) = predictor.predict(str(path))
        if found.error is not None:
            raise PerceiverError(found.error)
        return found.probs

    before, data = answer(), path.read_bytes()
    for _ in range(place.count):
        at, changed = flipped(data, place.random)
        path.write_bytes(changed)
        yield judge(at, before, answer)
