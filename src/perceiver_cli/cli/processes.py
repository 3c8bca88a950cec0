"""Commands as several processes: those that `--devices` starts here, or that torchrun and srun have started."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from perceiver_cli.cli import options, terminal
from perceiver_cli.errors import UsageError
from perceiver_cli.hardware import LAUNCHED, Place, place

if TYPE_CHECKING:
    from perceiver_cli.model.ranks import Ranks

WATCH_S = 0.5  # between looks at the parent


def shared(devices: str | None, timeout: str | None, inputs: Sequence[str | None] = ()) -> Ranks:
    """Return the place of this process among those of the command; all but the first print only errors.

    With `--devices` this process starts the others, waits for them, and ends with their status. Raises UsageError if
    one of `inputs` is stdin, which several processes cannot share.
    """
    started(devices, inputs)
    return joined(timeout)


def joined(timeout: str | None) -> Ranks:
    """Return the place of this process, connected to the others; imports torch, so that checks come before it."""
    timeout_s = options.seconds(timeout, "--timeout")
    from perceiver_cli.model import ranks

    return ranks.joined(ranks.TIMEOUT_S if timeout_s is None else timeout_s)


def started(devices: str | None, inputs: Sequence[str | None] = ()) -> Place:
    """Return what `shared` does, but without torch: the processes are not connected to each other."""
    count = 1 if devices is None or LAUNCHED in os.environ else count_of(devices)
    if "-" in inputs and max(count, place().size) > 1:
        raise UsageError("several processes cannot share stdin", "write it to a file first")
    if count > 1:
        if place().size > 1:
            raise UsageError(
                "--devices within torchrun or srun, which has started the processes already", "leave it out"
            )
        raise typer.Exit(run(count))
    here = place()
    if here.rank:
        terminal.hush()
    if LAUNCHED in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return here


def run(count: int) -> int:
    """Run this command as `count` processes; return their exit status. A signal ends this process too."""
    from perceiver_cli.training.launch import launch

    status = launch(count, sys.argv[1:], terminal.stderr_number())
    if status < 0:
        terminal.end_by_signal(-status)
    return status


def count_of(devices: str) -> int:
    """Return the number of processes that `--devices` asks for. Raises UsageError."""
    if devices.isdecimal() and int(devices) > 0:
        return int(devices)
    if devices != "all":
        raise UsageError(f"--devices {devices}: expected a number of processes, or all for one per GPU")
    import torch

    if not (count := torch.cuda.device_count()):
        raise UsageError("--devices all: found no GPU", "pass a number of processes, such as --devices 2")
    return count


def _end_with(parent: int) -> None:
    """End this process as by SIGTERM, which saves a run, when its launcher is gone."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)
