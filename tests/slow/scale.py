"""The same model at 1, 2 and 4 processes, and after every failure: `python -m tests.slow.scale FOLDER [WORD...]`.

Prints a line for each check. WORD: only checks whose name has it. Needs a CPU alone: processes talk by gloo.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import trimesh

from perceiver_cli.data import prepare
from perceiver_cli.model.ranks import ALONE, Ranks
from perceiver_cli.run_folder import MANIFEST, MODEL_FILE, STATE_FOLDER
from perceiver_cli.training.events import StepDone
from perceiver_cli.training.trainer import Trainer
from tests.conftest import RATE_HZ, SMALL, SMALL_CLIPS, tone_of, write_clip, write_images
from tests.training.test_ranks import as_ranks

STEPS = (
    "train.batch_size=4",
    "train.accumulate=4",
    "train.steps=6",
    "train.eval_every=3 steps",
    "train.save_every=2 steps",
)
FULL = (
    "train.optimizer=lamb", "train.mixup=0.2", "train.cutmix=1.0", "train.ema_decay=0.9", "train.clip_norm=1.0",
    "train.label_smoothing=0.1", "data.class_weight_power=0.5",
)  # fmt: skip
PLAIN = ("train.optimizer=lamb", "train.ema_decay=0.9", "train.clip_norm=1.0", "data.class_weight_power=0.5")
STEM = ("inputs.image.stem=conv-same", "inputs.image.patch=1", "inputs.image.stem_channels=4")


def digest(run: Path) -> str:
    """Return the first digits of a model file's hash."""
    return sha256((run / MODEL_FILE).read_bytes()).hexdigest()[:12]


# ---------------------------------------------------------------- the same bytes


def matrix(folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Return data and recipe of each check of the same bytes."""
    images = write_images(folder / "images", {f"{s}/{c}": n for s, n in (("train", 12), ("val", 5)) for c in "abc"}, 16)
    torch.manual_seed(0)
    clips, sounds, points = folder / "clips", folder / "sounds", folder / "points"
    for kind, row, hz in (("low", 2, 220.0), ("high", 9, 880.0)):
        for number in range(8):
            path = clips / kind / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Every third lacks its sound, every third its pictures.
            write_clip(path, None if number % 3 == 1 else row, None if number % 3 == 2 else hz, seed=number)
    rng = np.random.default_rng(0)
    for number in range(28):
        split, kind = ("test" if number % 7 > 4 else "train"), "ab"[number % 2]
        for top in (sounds, points):
            (top / split / kind).mkdir(parents=True, exist_ok=True)
        tone = tone_of(220.0 if kind == "a" else 880.0, 1.0, rng)
        soundfile.write(sounds / split / kind / f"{number}.wav", tone, RATE_HZ)
        solid = (
            trimesh.creation.box(rng.uniform(1, 2, 3))
            if kind == "a"
            else trimesh.creation.icosphere(2, rng.uniform(1, 2))
        )
        solid.export(points / split / kind / f"{number}.ply")
    tar = folder / "images.tar"
    for _ in prepare.write_records(prepare.plan([str(images)]), str(tar), lambda data: None):
        pass
    tiny = ("model.num_latents=8", "model.latent_channels=32", "model.num_self_heads=2")
    return {
        "images, AdamW": (images, (*SMALL, "train.optimizer=adamw")),
        "images, all of the recipe": (images, (*SMALL, *FULL)),
        "images, 2 workers": (images, (*SMALL, *FULL, "data.workers=2")),
        "images, records": (tar, (*SMALL, *FULL)),
        "images, batch norm": (images, (*SMALL, *FULL, *STEM)),
        "sound": (sounds, (*tiny, *PLAIN)),
        "points": (points, (*tiny, *PLAIN)),
        "video with sound, either missing": (clips, (*SMALL_CLIPS, *PLAIN)),
    }


def same_bytes(name: str, data: Path, recipe: Sequence[str], folder: Path) -> None:
    """Print whether 1, 2, 3 and 4 processes make one model, and a run that goes on with other numbers of them."""

    def run(output: Path, steps: int, ranks: Ranks, *, resume: bool = False) -> str:
        source = None if resume else data
        trainer = Trainer(source, output, overrides=[*recipe, *STEPS, "train.seed=3"], resume=resume, ranks=ranks)
        for event in trainer.fit():
            if isinstance(event, StepDone) and event.step == steps:
                trainer.stop()
        return digest(output)

    def by(count: int, output: Path, steps: int, *, resume: bool = False) -> str:
        if count == 1:
            return run(output, steps, ALONE, resume=resume)
        place = folder / f"{output.name}-{count}-{steps}"
        found = as_ranks(count, place, lambda ranks: run(output, steps, ranks, resume=resume))
        return str(found[0]) if len(set(found)) == 1 else f"{found}"

    begin = time.monotonic()
    found = {count: by(count, folder / f"run-{count}", 6) for count in (1, 2, 3, 4)}
    by(2, folder / "cut", 2)
    by(4, folder / "cut", 4, resume=True)
    found["2, 4, 1 in turn"] = by(1, folder / "cut", 6, resume=True)  # type: ignore[index]
    report(f"same bytes: {name}", len(set(found.values())) == 1, f"{found}, {time.monotonic() - begin:.0f} s")


# ---------------------------------------------------------------- failures


class Command:
    """A training in the background."""

    def __init__(self, output: Path, data: Path, *words: str, launcher: Sequence[str] = (), devices: int = 0) -> None:
        recipe = [
            w
            for change in (*SMALL, *FULL, *STEPS, "train.steps=60", "train.eval_every=30 steps")
            for w in ("--set", change)
        ]
        own = ["--devices", str(devices)] if devices else []
        head = [*launcher] if launcher else [sys.executable]
        self.output = output
        self.process = subprocess.Popen(
            [*head, "-m", "perceiver_cli", "train", str(data), "-o", str(output), "--continue", *own, *recipe, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )  # fmt: skip

    def saved(self, step: int) -> None:
        """Wait for a saved step."""
        end = time.monotonic() + 240
        while time.monotonic() < end and self.process.poll() is None:
            manifest = self.output / STATE_FOLDER / MANIFEST
            if manifest.exists() and json.loads(manifest.read_text())["states"][0]["step"] >= step:
                return
            time.sleep(0.02)
        raise SystemExit(f"no state of step {step}: {self.process.poll()} {self.process.communicate()[1][-2000:]}")

    def rank(self, number: int) -> int:
        """Return the process of a rank."""
        for path in Path("/proc").iterdir():
            try:
                words = (path / "cmdline").read_bytes().decode(errors="replace") if path.name.isdigit() else ""
                if str(self.output) in words and f"\0RANK={number}\0" in (path / "environ").read_text(errors="replace"):
                    return int(path.name)
            except OSError:
                continue
        raise SystemExit(f"no rank {number}")

    def end(self) -> tuple[int, list[str]]:
        """Return the exit status and the lines on stderr."""
        try:
            _, errors = self.process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return 999, ["still there after 240 s"]
        return self.process.returncode, errors.strip().splitlines()


def kill(number: int) -> Callable[[Command], None]:
    """Return an attack on a rank."""
    return lambda command: os.kill(command.rank(number), signal.SIGKILL)


def hang(command: Command) -> None:
    """Stop rank 1, which never answers again."""
    os.kill(command.rank(1), signal.SIGSTOP)


def kill_in_a_save(command: Command) -> None:
    """Kill rank 0 while the file of a state is not whole yet."""
    rank, end = command.rank(0), time.monotonic() + 60
    while time.monotonic() < end and not any((command.output / STATE_FOLDER).glob("*.tmp")):
        pass
    os.kill(rank, signal.SIGKILL)


def to_group(command: Command) -> None:
    """Send SIGTERM to the whole group."""
    os.killpg(command.process.pid, signal.SIGTERM)


def to_launcher(command: Command) -> None:
    """Send SIGTERM to the launcher alone."""
    command.process.terminate()


def kill_launcher(command: Command) -> None:
    """Kill the launcher alone; its processes save and end."""
    rank = command.rank(0)
    command.process.kill()
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{rank}") and time.monotonic() < end:
        time.sleep(0.05)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
ATTACKS: dict[str, tuple[Callable[[Command], None], tuple[str, ...], int, int, str]] = {
    "rank 1 killed": (kill(1), (), 2, 5, "process 1 of 2 was ended by SIGKILL"),
    "rank 0 killed": (kill(0), (), 2, 5, "process 0 of 2 was ended by SIGKILL"),
    "rank 0 killed in a save": (kill_in_a_save, (), 2, 5, "process 0 of 2 was ended by SIGKILL"),
    "rank 1 of 4 killed": (kill(1), (), 4, 5, "process 1 of 4 was ended by SIGKILL"),
    "rank 1 hangs": (hang, (), 2, 5, "lost the others"),
    "SIGTERM to the group": (to_group, (), 2, -15, "to continue: perceiver train --resume"),
    "SIGTERM to the launcher": (to_launcher, (), 2, -15, "to continue: perceiver train --resume"),
    "launcher killed": (kill_launcher, (), 2, -9, ""),
    "torchrun, rank 1 killed, 2 restarts": (kill(1), (*TORCHRUN, "--max-restarts", "2"), 0, 0, ""),
    "torchrun, rank 0 killed, 2 restarts": (kill(0), (*TORCHRUN, "--max-restarts", "2"), 0, 0, ""),
    "SIGTERM to torchrun": (to_launcher, TORCHRUN, 0, 1, "to continue: perceiver train --resume"),
}


def survives(name: str, data: Path, folder: Path, expected: str) -> None:
    """Print how a run ends after an attack, and whether it goes on to the bytes of an uninterrupted one."""
    attack, launcher, devices, status, words = ATTACKS[name]
    output = folder / re.sub(r"\W+", "-", name)
    begin = time.monotonic()
    command = Command(output, data, "--timeout", "8s", launcher=launcher, devices=devices)
    command.saved(8)
    attack(command)
    code, lines = command.end()
    fine = code == status and any(words in line for line in [*lines, ""])
    took = time.monotonic() - begin
    if code != 0:
        Command(output, data, devices=4 if "rank 0" in name else 1).end()
    found = digest(output)
    report(f"survives: {name}", fine and found == expected, f"status {code}, {found}, {took:.0f} s: {lines[-1:]}")


def listens(port: int) -> bool:
    """Return whether a process of this machine takes connections at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def machines(data: Path, folder: Path, expected: str) -> None:
    """Print how a run of two machines, played by two agents of torchrun, ends after one dies, and after one comes."""
    free = socket.create_server(("localhost", 0))
    port = free.getsockname()[1]
    free.close()
    agent = (
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
        "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}",
        "--rdzv-conf", "last_call_timeout=1",
    )  # fmt: skip
    for name in ("a machine dies", "a machine comes"):
        output, begin = folder / name.replace(" ", "-"), time.monotonic()
        first = Command(output, data, launcher=agent)
        if name == "a machine comes":
            first.saved(4)
        while not listens(port):  # the first holds the meeting point: it must live
            time.sleep(0.1)
        second = Command(output, data, launcher=agent)
        first.saved(8)
        if name == "a machine dies":
            agent_id = second.process.pid  # its processes have groups of their own
            own = Path(f"/proc/{agent_id}/task/{agent_id}/children").read_text().split()
            for number in (agent_id, *map(int, own)):
                os.kill(number, signal.SIGKILL)
        code, lines = first.end()
        others = "" if name == "a machine dies" else f", the other {second.end()[0]}"
        found, took = digest(output), time.monotonic() - begin
        fine = code == 0 and found == expected
        report(f"survives: {name}", fine, f"status {code}{others}, {found}, {took:.0f} s: {lines[-1:]}")


def refusals(data: Path, folder: Path) -> None:
    """Print status and last line of errors that one process meets, each told once."""
    bad = folder / "bad"
    shutil.copytree(data, bad)
    for path in sorted((bad / "train" / "a").iterdir()):
        path.write_bytes(path.read_bytes()[:50])
    held = folder / "held"
    holder = Command(held, data)
    holder.saved(2)
    full = ["--set", "train.steps=20000", "--set", "model.latent_channels=256", "--set", "model.num_latents=64"]
    small = ("bash", "-c", 'ulimit -f 700; exec "$0" "$@"', sys.executable)
    checks = {
        "bad data": (Command(folder / "r1", bad, devices=2), 3, "cannot be read"),
        "divergence": (Command(folder / "r2", data, "--set", "train.lr=1e37", devices=2), 6, "training diverged"),
        "held run folder": (Command(held, data, devices=2), 5, "in use by another training run"),
        "missing data": (Command(folder / "r3", folder / "none", devices=2), 3, "no such folder"),
        "disk full": (Command(folder / "r4", data, *full, launcher=small, devices=2), 5, "cannot write"),
    }
    for name, (command, status, words) in checks.items():
        code, lines = command.end()
        errors = [line for line in lines if line.startswith("perceiver: ")]
        fine = code == status and len(errors) == 1 and words in errors[0]
        report(f"one line: {name}", fine, f"status {code}: {errors}")
    holder.process.kill()
    holder.end()


def report(name: str, fine: bool, facts: Any) -> None:
    """Print one line."""
    print("ok  " if fine else "FAIL", f"{name}: {facts}", flush=True)


def main(place: str, *words: str) -> None:
    """Run the checks whose names have one of the words."""
    torch.set_num_threads(1)
    folder = Path(place)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checks = matrix(folder)

    def wanted(name: str) -> bool:
        return not words or any(word in name for word in words)

    for number, (name, (data, recipe)) in enumerate(checks.items()):
        if wanted(f"same bytes: {name}"):
            (own := folder / f"check-{number}").mkdir()
            try:
                same_bytes(name, data, recipe, own)
            except Exception as error:
                report(f"same bytes: {name}", False, f"{type(error).__name__}: {error}")
    data = checks["images, AdamW"][0]
    attacks = [name for name in ATTACKS if wanted(f"survives: {name}")]
    if attacks or wanted("survives: machine"):
        Command(folder / "whole", data).end()
        expected = digest(folder / "whole")
        for name in attacks:
            survives(name, data, folder, expected)
        if wanted("survives: machine"):
            machines(data, folder, expected)
    if wanted("one line"):
        refusals(data, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
