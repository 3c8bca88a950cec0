"""`--devices N`: processes of this machine, one voice, one status. The processes here are small ones without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from perceiver_cli.errors import DataError, PerceiverError, ResourceError
from perceiver_cli.training import launch as launching

REPORT = (
    "import json, os\n"
    "def report(lost, message, status):\n"
    "    path = os.path.join(os.environ['PERCEIVER_LAUNCHED'], 'failed-' + os.environ['RANK'])\n"
    "    facts = {'status': status, 'message': message, 'hint': '', 'lost': lost, 'at': 0.0}\n"
    "    open(path, 'w').write(json.dumps(facts))\n"
    "    raise SystemExit(status)\n"
)


def launched(monkeypatch: pytest.MonkeyPatch, *codes: str) -> int:
    """Return the status of a launch whose processes run these codes instead of a command."""
    process = launching._process

    def instead(rank: int, count: int, words: Any, folder: str) -> dict[str, Any]:
        return {**process(rank, count, words, folder), "args": [sys.executable, "-SE", "-c", REPORT + codes[rank]]}

    monkeypatch.setattr(launching, "_process", instead)
    monkeypatch.setattr(launching, "GRACE_S", 0.5)
    return launching.launch(len(codes), [])


def test_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code = "print(os.environ['RANK'], os.environ['WORLD_SIZE'])"
    assert launched(monkeypatch, code, code) == 0
    assert capfd.readouterr().out == "0 2\n"


def test_the_error_of_the_one_that_failed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has only lost it, and a third waits for ever."""
    codes = ("report(True, 'lost', 5)", "report(False, 'bad.png: no image', 3)", "import time; time.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"bad\.png: no image"):
        launched(monkeypatch, *codes)
    assert time.monotonic() - begin < 30


def test_a_killed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="process 1 of 2 was ended by SIGKILL, most likely for lack of memory"):
        launched(monkeypatch, "report(True, 'lost', 5)", "os.kill(os.getpid(), 9)")


def test_a_status_without_an_error_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, "raise SystemExit(3)", "") == 3


def test_a_bug_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PerceiverError) as raised:
        launched(monkeypatch, "report(False, 'this is a bug', 1)", "")
    assert raised.value.exit_code == 1


def test_a_signal_reaches_each_process_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of torchrun, SLURM and Ctrl-C; all end by it."""
    code = (
        "import signal, time\n"
        f"log = open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w')\n"
        "def note(number, frame):\n"
        "    log.write('got'); log.flush(); time.sleep(0.3)\n"
        "    signal.signal(number, signal.SIG_DFL); os.kill(os.getpid(), number)\n"
        "signal.signal(signal.SIGTERM, note); log.write('ready '); log.flush(); time.sleep(60)\n"
    )

    def send() -> None:
        while not all((tmp_path / n).exists() and (tmp_path / n).read_text() for n in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    assert launched(monkeypatch, code, code) == -signal.SIGTERM
    assert [(tmp_path / n).read_text() for n in "01"] == ["ready got"] * 2


def test_processes_of_a_launch_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "machine_cores", lambda: 8)
    assert [launching._process(0, n, [], "x")["env"]["OMP_NUM_THREADS"] for n in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's word
    assert launching._process(0, 4, [], "x")["env"]["OMP_NUM_THREADS"] == "5"
    assert launching._process(1, 2, [], "x")["stdout"] == subprocess.DEVNULL
