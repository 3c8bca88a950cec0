"""Kills at each call of a save, full and failing disks, permissions, closed streams, few files, links of strangers."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from perceiver_cli.files import TEMPORARY
from perceiver_cli.model.checkpoint import read_tensors
from perceiver_cli.records.shards import open_shards
from perceiver_cli.training.state import load_state
from tests.faults.disk import NOBODY, Disk, Ended
from tests.faults.table import Place, Verdict, row

SMALL = [
    "model.num_latents=4", "model.latent_channels=8", "model.num_self_heads=2", "model.self_attends_per_block=1",
    "model.schedule=c0 t0", "train.batch_size=4", "train.save_every=1 steps", "train.eval_every=2 steps",
]  # fmt: skip
# Without a stem, so that a byte array of the recipe can be written.
SETS = [word for change in (*SMALL, "inputs.image.stem=none") for word in ("--set", change)] + ["--workers", "0"]


class World:
    """A data set, a run of two steps and its disk, made once for a row."""

    def __init__(self, place: Place) -> None:
        self.disk = Disk(place)
        self.root, self.folder, self.place = self.disk.root, place.folder, place
        pixels = np.random.default_rng(0).integers(0, 255, (16, 12, 12), np.uint8)
        for number, picture in enumerate(pixels):
            path = place.folder / "data" / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        self.data, self.picture = place.folder / "data", place.folder / "data" / "a" / "00.png"
        self.run = place.folder / "run"
        self.expect(self.disk.run("train", self.data, "-o", self.run, "--steps", "2", *SETS))
        self.two = self.contents(self.run)
        self.four = self.resumed(place.folder / "four")

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        self.disk.__exit__()

    def expect(self, done: Ended) -> Ended:
        if done.returncode:
            raise RuntimeError(f"{' '.join(done.args)} ended with {done.returncode}: {done.stderr[-400:]!r}")
        return done

    def resumed(self, copy: Path) -> dict[str, object]:
        """Return what a run of two steps, resumed to four in a copy, consists of."""
        shutil.copytree(self.run, copy)
        self.expect(self.disk.run("train", "--resume", "-o", copy, "--steps", "4"))
        return self.contents(copy)

    def contents(self, run: Path) -> dict[str, object]:
        """Return what must be the same at the end of equal runs: the model's bytes, the state's step and weights."""
        state = load_state(run)
        weights = {name: tensor.numpy().tobytes() for name, tensor in state.tensors.items()}
        return {"model": (run / "model.safetensors").read_bytes(), "step": state.fields["step"], "state": weights}

    def clear(self) -> Path:
        """Return the disk, emptied."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.root


def leftovers(folder: Path) -> list[str]:
    """Return the names of temporary files below a folder."""
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


def not_whole(folder: Path) -> Verdict:
    """Return which file below a folder is a part of something, or has a temporary name that is not ours."""
    for path in folder.rglob("*"):
        try:
            if path.name.endswith(".tmp"):
                if not TEMPORARY.fullmatch(path.name):
                    return f"a strange temporary file {path.name}"
            elif path.suffix == ".safetensors":
                read_tensors(path)
            elif path.suffix == ".tar":
                open_shards([str(path)])
            elif path.is_file() and path.suffix in (".html", ".json", ".toml", ".npy") and not path.stat().st_size:
                return f"{path.name} is empty"
        except Exception as error:
            return f"{path.relative_to(folder)}: {type(error).__name__}: {error}"
    return ""


def told(done: Ended, *statuses: int, words: str = "") -> Verdict:
    """Return what is wrong with the end of a command: its status, a traceback, no error or a wrong cause."""
    text = done.stderr.decode("utf-8", "replace")
    shown = " ".join(word[-40:] for word in done.args)[:120]
    if done.returncode not in statuses:
        return f"{shown}: status {done.returncode}, expected {' or '.join(map(str, statuses))}: {text[-300:]}"
    if "Traceback" in text or "this is a bug" in text or "Exception ignored" in text:
        return f"{shown}: a traceback: {text[-300:]}"
    if done.returncode > 0 and words and not re.search(words, text):
        return f"{shown}: without {words!r}: {text[-300:]}"
    return ""


# ---------------------------------------------------------------- kills at each call

Scenario = tuple[Callable[[], None], list[str | Path], Callable[[], Verdict]]


def scenarios(world: World) -> dict[str, Scenario]:
    """Return commands that save: what lies there before, the arguments, and the next start with its judgement."""
    root = world.root
    run, tars, report = root / "run", root / "tars" / "s-%d.tar", root / "report"
    train = ["train", world.data, "-o", run, "--steps", "2", *SETS]
    shards = ["preprocess", world.data, "-o", tars, "--shard-size", "3k"]
    evaluate = ["evaluate", world.data, "-m", run, "-o", report, "--calibrate"]

    def nothing() -> None:
        world.clear()

    def a_run() -> None:
        shutil.copytree(world.run, world.clear() / "run")

    def trained(wanted: dict[str, object], resume: list[str | Path]) -> Verdict:
        done = world.disk.run(*resume)
        if done.returncode in (2, 3):  # there is no state yet
            if told(done, 2, 3):
                return told(done, 2, 3)
            done = world.disk.run(*train, "--replace")
            wanted = world.two
        if verdict := told(done, 0):
            return verdict
        return "" if world.contents(run) == wanted else "another end than the run that was not killed"

    def prepared(wanted: dict[str, bytes]) -> Verdict:
        done = world.disk.run(*shards, "--resume")
        found = {path.name: path.read_bytes() for path in tars.parent.glob("*.tar")}
        return told(done, 0) or ("" if found == wanted else f"other shards: {sorted(found)}")

    def evaluated() -> Verdict:
        return told(world.disk.run(*evaluate), 0)

    nothing()
    world.expect(world.disk.run(*shards))
    whole = {path.name: path.read_bytes() for path in tars.parent.glob("*.tar")}
    resume: list[str | Path] = ["train", "--resume", "-o", run, "--steps", "4"]
    again: list[str | Path] = ["train", "--resume", "-o", run, "--steps", "2"]
    return {
        "resume": (a_run, resume, partial(trained, world.four, resume)),
        "train": (nothing, train, partial(trained, world.two, again)),
        "replace": (a_run, [*train, "--replace"], partial(trained, world.two, again)),
        "shards": (nothing, shards, partial(prepared, whole)),
        "evaluate": (a_run, evaluate, evaluated),
    }


def spread(items: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """Return `count` of the items, evenly spread."""
    return [items[place * len(items) // count] for place in range(min(count, len(items)))]


@row("killed at each call of a save", 150, 6)
def kills(place: Place) -> Iterator[Verdict]:
    with World(place) as world:
        known = scenarios(world)
        places: list[tuple[str, int]] = []
        for name, (before, arguments, _) in known.items():
            before()
            places += [(name, at + 1) for at in range(world.expect(world.disk.run(*arguments)).calls)]
        for name, at in spread(places, place.count):
            before, arguments, after = known[name]
            before()
            done = world.disk.run(*arguments, kill=at)
            verdict = "" if done.returncode == -signal.SIGKILL else f"status {done.returncode}"
            verdict = verdict or not_whole(world.root) or after()
            if not verdict and leftovers(world.root):
                verdict = f"left behind: {leftovers(world.root)}"
            yield verdict and f"{name}, killed at call {at}: {verdict}"


# ---------------------------------------------------------------- disks that fail


def writers(world: World) -> dict[str, tuple[list[str | Path], dict[str, Path]]]:
    """Return commands that write, with their outputs."""
    root, picture = world.root, world.picture
    return {
        "train": (["train", world.data, "-o", root / "run", "--steps", "2", *SETS, "--replace"], {}),
        "resume": (["train", "--resume", "-o", root / "run", "--steps", "4"], {}),
        "tar": (["preprocess", picture, "-o", root / "x.tar"], {}),
        "shards": (["preprocess", world.data, "-o", root / "new/s-%d.tar", "--shard-size", "3k"], {}),
        "rows": (["preprocess", picture, "-m", world.run, "-o", root / "x.npy"], {}),
        "embeddings": (["predict", picture, "-m", world.run, "--embeddings", root / "e.npy"], {}),
        "stdout": (["predict", picture, "-m", world.run], {"stdout": root / "answers"}),
        "report": (["evaluate", world.data, "-m", world.run, "-o", root / "report"], {}),
    }


def failing(place: Place, number: int, kinds: str, *, once: bool) -> Iterator[Verdict]:
    """Yield the verdict on commands whose disk fails at their first, second ... call, for ever or once."""
    with World(place) as world:
        commands = writers(world)
        places: list[tuple[str, int]] = []

        def before() -> None:
            shutil.copytree(world.run, world.clear() / "run")

        for name, (arguments, outputs) in commands.items():
            before()
            done = world.expect(world.disk.run(*arguments, **{key: str(path) for key, path in outputs.items()}))
            places += [(name, at + 1) for at in range(done.calls)]
        for name, at in spread(places, place.count):
            arguments, outputs = commands[name]
            before()
            files = {key: str(path) for key, path in outputs.items()}
            done = world.disk.run(*arguments, **files, fail=at, number=number, kinds=kinds, once=once)
            # Nothing may be left to write from this call on.
            verdict = told(done, 0, 5, words=re.escape(os.strerror(number)) + "|cannot write|cannot be")
            verdict = verdict or not_whole(world.root / "run")
            if not verdict and leftovers(world.root):
                verdict = f"left behind: {leftovers(world.root)}"
            if not verdict and name in ("train", "resume"):
                again = world.disk.run("train", "--resume", "-o", world.root / "run", "--steps", "4")
                if again.returncode in (2, 3):
                    again = world.disk.run(*commands["train"][0])
                verdict = told(again, 0)
            yield verdict and f"{name}, call {at}: {verdict}"


@row("disk full", 56, 4)
def full(place: Place) -> Iterator[Verdict]:
    yield from failing(place, errno.ENOSPC, "OWLMY", once=False)


@row("errors of the disk (EIO)", 56, 4)
def input_output(place: Place) -> Iterator[Verdict]:
    yield from failing(place, errno.EIO, "OWSRLMY", once=True)


# ---------------------------------------------------------------- paths and permissions


@row("read-only and permission", 102, 6)
def permissions(place: Place) -> Iterator[Verdict]:
    with World(place) as world:
        for above in (place.folder.parent, place.folder):
            above.chmod(0o755)
        secret, locked, readable = place.folder / "secret", place.folder / "locked", place.folder / "readable"
        shutil.copytree(world.data, secret / "data")
        shutil.copytree(world.run, secret / "run")
        (secret / "list").write_text(f"{world.picture}\n")
        shutil.copytree(world.data, readable / "data")
        shutil.copytree(world.run, readable / "run")
        (place.folder / "loop").symlink_to("loop")
        (place.folder / "file").write_text("x")
        locked.mkdir()
        home = place.folder / "home"
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        secret.chmod(0)
        locked.chmod(0o555)
        (readable / "data" / "b").chmod(0)
        (readable / "run" / "model.safetensors").chmod(0)
        for file in (readable / "data" / "a").iterdir():
            file.chmod(0)
        picture, data, run = world.picture, world.data, world.run
        inputs = {
            "secret": secret, "long": place.folder / ("x" * 300), "loop": place.folder / "loop",
            "not a folder": place.folder / "file" / "x", "closed": readable,
        }  # fmt: skip
        commands: list[list[str | Path]] = []
        for bad in inputs.values():
            at = partial(lambda base, name: base / name if base.name in ("secret", "readable") else base, bad)
            commands += [
                ["train", at("data"), "-o", home / "r", "--steps", "1", *SETS], ["evaluate", at("data"), "-m", run],
                ["evaluate", data, "-m", at("run")], ["predict", at("data"), "-m", run],
                ["predict", picture, "-m", at("run")], ["lint", at("data")],
                ["preprocess", at("data"), "-o", home / "x.tar"], ["info", at("run")],
                ["compare", run, at("run")], ["export", at("run"), "-o", home / "x.onnx"],
                ["train", data, "-o", home / "r", "--init-from", at("run")], ["import", at("run"), "-o", home / "m"],
            ]  # fmt: skip
            if bad is not readable:
                commands += [
                    ["train", data, "-o", home / "r", "--config", at("run/config.toml")],
                    ["predict", "-m", run, "--files-from", at("list")], ["train", "--resume", "-o", at("run")],
                ]  # fmt: skip
        for out in (locked, secret, Path("/proc"), place.folder / "loop", place.folder / "file"):
            commands += [
                ["train", data, "-o", out / "r", "--steps", "1", *SETS], ["evaluate", data, "-m", run, "-o", out / "r"],
                ["predict", picture, "-m", run, "--embeddings", out / "e.npy"],
                ["preprocess", picture, "-o", out / "x.tar"],
                ["preprocess", picture, "-o", out / "x-%d.tar"], ["compare", run, run, "-o", out / "c.png"],
            ]  # fmt: skip
        environment = world.disk.environment | {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
        for arguments in commands[:: max(1, len(commands) // place.count)][: place.count]:
            shutil.rmtree(home / "r", ignore_errors=True)
            done = world.disk.run(*arguments, user=NOBODY, cwd=str(home), environment=environment)
            verdict = told(done, 2, 3, 5)
            if not verdict and b"stdout" in done.stderr:
                verdict = f"stdout is blamed: {done.stderr[-300:]!r}"
            cause = b"denied|too long|Too many levels|Not a dir|No such file|no such|not readable|cannot"
            if not verdict and not re.search(cause, done.stderr):
                verdict = f"without a cause: {arguments}: {done.stderr[-300:]!r}"
            yield verdict


# ---------------------------------------------------------------- streams and descriptors


def readers(world: World) -> list[list[str | Path]]:
    """Return commands that answer on stdout."""
    return [
        ["--help"], ["--version"], ["train", "--help"], ["info", "tiny-image"], ["info", world.run, "--json"],
        ["presets"], ["presets", "show", "tiny-image"], ["predict", world.picture, "-m", world.run],
        ["lint", world.data],
        ["evaluate", world.data, "-m", world.run], ["compare", world.run, world.run], ["preprocess", world.picture],
        ["train", world.data, "-o", world.root / "run", "--steps", "1", "--replace", *SETS],
    ]  # fmt: skip


@row("closed streams", 91, 6)
def streams(place: Place) -> Iterator[Verdict]:
    """The expected status of each: 5 for a stdout that cannot be written, SIGPIPE for a reader that left."""
    ways: list[tuple[dict[str, str | None], int]] = [
        ({"stdout": None}, 5), ({"stdout": "/dev/full"}, 5), ({"stdout": "no reader"}, -signal.SIGPIPE),
        ({"stderr": None}, 0), ({"stderr": "/dev/full"}, 0), ({"stderr": "no reader"}, 0), ({"stdin": None}, 0),
    ]  # fmt: skip
    with World(place) as world:
        trials = [(arguments, way, status) for arguments in readers(world) for way, status in ways]
        for arguments, way, status in trials[:: max(1, len(trials) // place.count)][: place.count]:
            done = world.disk.run(*arguments, **way)
            verdict = told(done, status, words="stdout" if status == 5 else "")
            yield verdict and f"{way}: {verdict}"


@row("few file descriptors", 60, 4)
def descriptors(place: Place) -> Iterator[Verdict]:
    """With fewer than any command needs it still ends with one line; an input is never to blame."""
    with World(place) as world:
        data, run, root = world.data, world.run, world.root
        commands: list[list[str | Path]] = [
            ["predict", world.picture, "-m", run], ["evaluate", data, "-m", run, "--workers", "2"],
            ["train", data, "-o", root / "r", "--steps", "1", "--replace", *SETS],
            ["train", data, "-o", root / "r", "--steps", "1", "--replace", *SETS[:-1], "2"],
            ["preprocess", data, "-o", root / "x.tar", "--workers", "2"], ["lint", data, "--workers", "2"],
        ]  # fmt: skip
        trials = [(arguments, number) for number in (8, 10, 12, 14, 16, 18, 20, 24, 32, 48) for arguments in commands]
        for arguments, number in trials[:: max(1, len(trials) // place.count)][: place.count]:
            done = world.disk.run(*arguments, limits=[("RLIMIT_NOFILE", number)])
            verdict = told(done, 0, 5)
            yield verdict and f"{number} files: {verdict}"


@row("signals while stdin is spooled", 8, 4)
def spool(place: Place) -> Iterator[Verdict]:
    with World(place) as world:
        world.expect(world.disk.run("preprocess", world.data, "-o", place.folder / "x.tar"))
        data = (place.folder / "x.tar").read_bytes()
        before = set(os.listdir(place.folder / "tmp"))  # torch's
        pipe = place.folder / "pipe"
        os.mkfifo(pipe)
        ended = threading.Event()

        def feed() -> None:
            with pipe.open("wb", 0) as file:
                file.write(data[: len(data) // 2])
                ended.wait(60)

        kinds = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP]
        for number in [kinds[place % 4] for place in range(place.count)]:
            ended.clear()
            feeding = threading.Thread(target=feed)
            feeding.start()
            process = world.disk.start("train", "-", "-o", world.root / "run", *SETS, stdin=str(pipe))
            time.sleep(1 + place.random.random())
            os.kill(process, number)
            done = world.disk.wait()
            ended.set()
            feeding.join()
            left = set(os.listdir(place.folder / "tmp")) - before
            yield f"left in TMPDIR: {left}" if left else told(done, -number)


@row("foreign run folders", 48, 6)
def foreign(place: Place) -> Iterator[Verdict]:
    """Links at every name of a run, to files and folders outside: nothing there changes."""
    with World(place) as world:
        run, outside = world.root / "run", place.folder / "outside"
        state = next(path.name for path in (world.run / "last").glob("*.safetensors"))
        names = [
            ".lock", "last", "model.safetensors", "metrics.jsonl", "config.toml", "split.jsonl", "README.md",
            "tensorboard", "last/MANIFEST.json", f"last/{state}", "last/step-00000004.safetensors", ".a.tmp",
        ]  # fmt: skip
        commands: list[list[str | Path]] = [
            ["train", "--resume", "-o", run, "--steps", "4"],
            ["train", world.data, "-o", run, "--replace", "--steps", "2", *SETS],
            ["evaluate", world.data, "-m", run, "--calibrate", "-o", run],
            ["train", world.data, "-o", run, "--steps", "2", *SETS],
        ]
        trials = [(name, arguments) for name in names for arguments in commands]
        for name, arguments in trials[:: max(1, len(trials) // place.count)][: place.count]:
            world.clear()
            shutil.rmtree(outside, ignore_errors=True)
            shutil.copytree(world.run, run)
            shutil.copytree(world.run, outside)
            link = run / name
            if link.is_dir():
                shutil.rmtree(link)
            link.unlink(missing_ok=True)
            target = outside / ("" if name == "tensorboard" else name)
            if not target.exists():
                target.write_text("precious")
            link.symlink_to(target)
            before = seen(outside)
            done = world.disk.run(*arguments)
            verdict = told(done, 0, 2, 3, 5, 7)
            yield verdict or ("" if seen(outside) == before else f"{arguments} changed what {name} leads to")


def seen(folder: Path) -> dict[str, tuple[bytes, float]]:
    """Return the content and time of change of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            found[str(path)] = (path.read_bytes(), status.st_mtime)
    return found
