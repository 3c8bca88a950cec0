"""Names as they are shown; outputs whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver_cli.errors import ResourceError
from perceiver_cli.files import atomic_write, show_path, similar_path, write_text

HOSTILE = [
    b"\xff.png", b"[red]x[/]", b"[/]", b"\x1b]0;owned\x07", b"a\nb", b"a\rb", "a\u202eb".encode(), b"-rf", b"=cmd()",
    b"a'b", b"back\\slash", b"x" * 255, "z\u200bw".encode(), b"\x00".replace(b"\x00", b"\x01"), "café".encode(),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_shown_names_are_one_printable_line(name: bytes) -> None:
    shown = show_path(os.fsdecode(name))
    assert shown[0] == shown[-1] == "'"
    assert len(shown) <= 210
    assert all(char.isprintable() for char in shown)
    shown.encode("utf-8")  # no surrogate is left


def test_shown_names_keep_what_is_harmless() -> None:
    assert show_path("dir/café 1.png") == "'dir/café 1.png'"


@pytest.mark.parametrize("nameless", [True, False])
def test_atomic_write_replaces_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    if not nameless:  # as on systems and file systems without such files
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    target = tmp_path / "new" / "file"
    write_text(target, "old")

    def fail_half_way() -> None:
        with atomic_write(target) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert target.read_text() == "old"
    write_text(target, "new")
    assert target.read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["file"]


def test_outputs_have_the_users_mode(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "below", Path("/proc/nothing/here")):
        with pytest.raises(ResourceError, match="cannot write"):
            write_text(target, "x")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the write fails half way."""
    script = (
        "import resource, signal, sys; from perceiver_cli.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "write_text(sys.argv[1], 'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(sys.argv[1], 'x' * 5000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "f"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ResourceError")
    assert (tmp_path / "f").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no files without a name here")
def test_a_killed_process_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from perceiver_cli.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 100_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "f"], capture_output=True, check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_missing_path_may_have_a_similar_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "commands\n").mkdir()
    assert similar_path("runs/frist") == ", perhaps 'runs/first'"
    assert similar_path("rums/first/model.safetensors") == ", perhaps 'runs'"
    assert similar_path("rums/first") == ", perhaps 'runs/first'"
    assert similar_path("comands") == ", perhaps 'commands\\n'"
    assert similar_path(tmp_path / "runs" / "other") == ""
    assert similar_path("/nowhere at all") == ""
