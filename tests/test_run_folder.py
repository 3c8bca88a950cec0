"""Run folders, also those from a stranger: nothing outside changes, and only own names are removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perceiver_cli.errors import IntegrityError, PerceiverError, UsageError
from perceiver_cli.files import remove_leftovers, write_text
from perceiver_cli.run_folder import append_log, begin_run, claim_run, cut_log, read_log

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no links here")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder outside of the run, with files that a link could lead to."""
    (tmp_path / "precious").mkdir()
    for name in ("file", "MANIFEST.json", "step-00000001.safetensors", "own.txt"):
        (tmp_path / "precious" / name).write_text(name)
    (tmp_path / "run").mkdir()
    return tmp_path / "precious"


def unchanged(precious: Path) -> bool:
    texts = {path.name: path.read_text() for path in precious.iterdir()}
    return len(texts) == 4 and all(name == text for name, text in texts.items())


def test_a_flipped_bit_of_a_log_is_found(tmp_path: Path) -> None:
    records = [{"step": step, "val_loss": 1 / step, "best": step == 2} for step in (1, 2, 3)]
    for record in records:
        append_log(tmp_path, record)
    assert read_log(tmp_path) == records
    log = tmp_path / "metrics.jsonl"
    whole = log.read_bytes()
    for place in range(len(whole) - 1):
        log.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            found = read_log(tmp_path)
            assert [{name: each[name] for name in records[0]} for each in found] == records  # it is in the name "crc32"
        except IntegrityError as error:
            assert "remove the damaged line" in str(error)  # noqa: PT017
    log.write_bytes(b'{"step": 1, "val_loss": 0.5}\n' + whole + b'{"step": 4')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 1, 2, 3]  # an older line, and one not complete
    cut_log(tmp_path, 2)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 1, 2]


@pytest.mark.parametrize(("name", "target"), [(".lock", "file"), ("last", ""), ("tensorboard", "")])
def test_a_link_where_a_run_writes_is_refused(precious: Path, name: str, target: str) -> None:
    run = precious.parent / "run"
    (run / name).symlink_to(precious / target)
    with pytest.raises(UsageError, match="a link"), claim_run(run, resume=False, replace=True):
        pass
    assert unchanged(precious)


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "config.toml", "split.jsonl", "README.md"])
def test_links_to_files_are_replaced_and_not_followed(precious: Path, name: str) -> None:
    run = precious.parent / "run"
    (run / name).symlink_to(precious / "file")
    with claim_run(run, resume=False, replace=True):
        begin_run(run, "", fresh=True)
        for each in ("model.safetensors", "config.toml", "split.jsonl", "README.md"):
            write_text(run / each, "new")
        cut_log(run, 0)
        append_log(run, {"step": 1})
    assert unchanged(precious)
    assert not (run / name).is_symlink()


def test_the_log_is_never_written_through_a_link(precious: Path) -> None:
    (precious.parent / "run" / "metrics.jsonl").symlink_to(precious / "file")
    with pytest.raises(PerceiverError, match=r"metrics\.jsonl': cannot write"):
        append_log(precious.parent / "run", {"step": 1})
    assert unchanged(precious)


def test_replacing_a_run_removes_its_own_names_only(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    for name in ("last/step-00000007.safetensors", "last/MANIFEST.json", "last/notes.txt", "model.safetensors", "mine"):
        (tmp_path / name).write_text("")
    begin_run(tmp_path, "", fresh=True)
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "last", "metrics.jsonl", "mine"]
    assert os.listdir(tmp_path / "last") == ["notes.txt"]


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_kept(tmp_path: Path) -> None:
    import fcntl

    dead, living, others = ".a.0123456789abcdef.tmp", ".b.0123456789abcdef.tmp", [".c.tmp", "d.0123456789abcdef.tmp"]
    for name in (dead, living, *others):
        (tmp_path / name).write_text("")
    with (tmp_path / living).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([living, *others])
        write_text(tmp_path / "new", "")
    write_text(tmp_path / "new", "")
    assert sorted(os.listdir(tmp_path)) == sorted(["new", *others])
