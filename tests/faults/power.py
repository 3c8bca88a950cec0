"""Lost power: what a disk may hold after a cut at any moment, rebuilt from the calls that disk.c wrote down.

Synced data and names are there. Of the rest nothing arrives, or any part of it: some writes and not others, a new
name before the data that it names.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.faults.table import Place, Verdict, row
from tests.faults.writing import SETS, World, not_whole, told


class Call(NamedTuple):
    """A call that changed the disk: its letter in disk.c, and what it changed."""

    kind: str
    inode: int
    offset: int
    one: str
    two: str
    data: bytes


def read_log(path: Path) -> list[Call]:
    """Return the calls of a log, in order."""
    calls, log, at = [], path.read_bytes(), 0
    while at < len(log):
        end = log.index(b"\n", at)
        kind, inode, offset, *sizes = log[at:end].split()
        at = end + 1
        parts = []
        for size in map(int, sizes):
            parts.append(log[at : at + size])
            at += size
        calls.append(Call(kind.decode(), int(inode), int(offset), parts[0].decode(), parts[1].decode(), parts[2]))
    return calls


@dataclass
class File:
    """A file, or a link to `target`. changes: (offset, data) of writes, (size, None) of cuts; synced: how many are."""

    changes: list[tuple[int, bytes | None]] = field(default_factory=list)
    synced: int = 0
    target: str | None = None
    is_folder: bool = False

    def content(self, arrives: Callable[[], bool]) -> bytes:
        """Return its bytes with all synced changes, and those of the rest that arrive."""
        data = bytearray()
        for number, (offset, written) in enumerate(self.changes):
            if number < self.synced or arrives():
                if written is None:
                    data = data[:offset].ljust(offset, b"\0")
                else:
                    data = data.ljust(offset, b"\0")
                    data[offset : offset + len(written)] = written
        return bytes(data)


class Machine:
    """The disk of a computer that loses power. names: changes of names, (folder, {path: file or None}), in order."""

    def __init__(self, root: Path, calls: list[Call]) -> None:
        self.root = str(root)
        self.names: list[tuple[str, dict[str, File | None]]] = []
        self.durable: set[int] = set()  # numbers of changes of names whose folder was synced since
        self.by_inode: dict[int, File] = {}
        for call in calls:
            self.do(call)

    def do(self, call: Call) -> None:
        """Repeat a call."""
        match call.kind:
            case "N":
                self.by_inode[call.inode] = file = File()
                if call.one:
                    self.change({call.one: file})
            case "W":
                self.by_inode[call.inode].changes.append((call.offset, call.data))
            case "T":
                self.by_inode[call.inode].changes.append((call.offset, None))
            case "S" if call.offset:  # a folder
                self.durable |= {number for number, (folder, _) in enumerate(self.names) if folder == call.one}
            case "S":
                self.by_inode[call.inode].synced = len(self.by_inode[call.inode].changes)
            case "L":
                self.change({call.two: self.by_inode[call.inode]})
            case "R":
                file = self.now().get(call.one)
                self.change({call.one: None, call.two: file})
            case "U" | "D":
                self.change({call.one: None})
            case "M":
                self.change({call.one: File(is_folder=True)})
            case "Y":
                self.change({call.two: File(target=call.one)})

    def change(self, names: dict[str, File | None]) -> None:
        folder = str(Path(next(iter(names))).parent)
        self.names.append((folder, names))

    def now(self) -> dict[str, File | None]:
        """Return the files by name, as a running system sees them."""
        return {path: file for _, names in self.names for path, file in names.items()}

    def restart(self, folder: Path, arrives: Callable[[], bool]) -> None:
        """Write what the disk holds after the cut into a folder."""
        held: dict[str, File | None] = {}
        for number, (_, names) in enumerate(self.names):
            if number in self.durable or arrives():
                held |= names
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path, file in sorted(held.items()):
            place = folder / path.removeprefix(self.root).lstrip("/")
            if file is None or not place.parent.is_dir():  # a folder that did not arrive takes all in it along
                continue
            if file.is_folder:
                place.mkdir()
            elif file.target is not None:
                place.symlink_to(file.target)
            else:
                place.write_bytes(file.content(arrives))


def cuts(world: World, calls: list[Call], count: int, chance: random.Random) -> Iterator[int]:
    """Restart the disk after `count` cuts, evenly spread over the calls; yield the number of calls before each."""
    for trial in range(count):
        at = trial * len(calls) // count + 1
        share = (0.0, 0.5, 0.9)[trial % 3]  # of what was not synced; at first nothing arrives
        machine = Machine(world.root, calls[:at])
        machine.restart(world.root, lambda share=share: chance.random() < share)  # type: ignore[misc]
        yield at


@row("lost power: a run", 120, 6)
def run(place: Place) -> Iterator[Verdict]:
    with World(place) as world:
        output, log = world.root / "runs" / "one", place.folder / "log"
        train = ["train", world.data, "-o", output, "--steps", "4", *SETS]
        world.expect(world.disk.run(*train, log=str(log)))
        wanted, calls = world.contents(output), read_log(log)
        renamed = [at for at, call in enumerate(calls) if call.kind == "R" and call.two.endswith("MANIFEST.json")]
        saved = renamed[0] + 1  # the folder is synced next
        for at in cuts(world, calls, place.count, place.random):
            verdict = not_whole(world.root)
            done = world.disk.run("train", "--resume", "-o", output)
            if not verdict and done.returncode in (2, 3) and at <= saved + 1:  # nothing was saved before the cut
                verdict = told(done, 2, 3)
                done = world.disk.run(*train, "--replace")
            verdict = verdict or told(done, 0)
            if not verdict and world.contents(output) != wanted:
                verdict = "another end than the run that was not cut"
            yield verdict and f"cut after call {at} of {len(calls)}: {verdict}"


@row("lost power: a run that replaces another", 40, 4)
def replacing(place: Place) -> Iterator[Verdict]:
    with World(place) as world:
        output, log = world.root / "one", place.folder / "log"
        first = ["train", world.data, "-o", output, "--steps", "2", *SETS]
        second = ["train", world.data, "-o", output, "--replace", "--steps", "4", *SETS]
        world.expect(world.disk.run(*first, log=str(log)))
        calls = [*read_log(log)]
        begun = len(calls)
        world.expect(world.disk.run(*second, log=str(log)))
        calls += read_log(log)
        wanted = world.contents(output)
        for trial in range(place.count):
            at = begun + trial * (len(calls) - begun) // place.count + 1
            machine = Machine(world.root, calls[:at])
            share = (0.0, 0.5, 0.9)[trial % 3]
            machine.restart(world.root, lambda share=share: place.random.random() < share)  # type: ignore[misc]
            verdict = not_whole(world.root)
            done = world.disk.run("train", "--resume", "-o", output, "--steps", "4")
            if not verdict and done.returncode in (2, 3):
                verdict = told(done, 2, 3)
                done = world.disk.run(*second)
            verdict = verdict or told(done, 0)
            if not verdict and world.contents(output) not in (wanted, world.four):
                verdict = "another end than the runs that were not cut"
            yield verdict and f"cut after call {at - begun} of {len(calls) - begun}: {verdict}"


@row("lost power: shards and their index", 40, 4)
def shards(place: Place) -> Iterator[Verdict]:
    with World(place) as world:
        log, tars = place.folder / "log", world.root / "new" / "s-%d.tar"
        prepare = ["preprocess", world.data, "-o", tars, "--shard-size", "3k"]
        world.expect(world.disk.run(*prepare, log=str(log)))
        calls = read_log(log)
        world.expect(world.disk.run("evaluate", tars.parent, "-m", world.run, log=str(log)))  # writes the indexes
        calls += read_log(log)
        wanted = {path.name: path.read_bytes() for path in tars.parent.glob("*.tar")}
        for at in cuts(world, calls, place.count, place.random):
            verdict = not_whole(world.root) or told(world.disk.run(*prepare, "--resume"), 0)
            found = {path.name: path.read_bytes() for path in tars.parent.glob("*.tar")}
            if not verdict and found != wanted:
                verdict = f"other shards: {sorted(found)}"
            verdict = verdict or told(world.disk.run("evaluate", tars.parent, "-m", world.run), 0)
            yield verdict and f"cut after call {at} of {len(calls)}: {verdict}"
