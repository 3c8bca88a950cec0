"""The GPU script, rehearsed on the CPU: its parts, and parts that fail, hang, crash and come too late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_training
from benchmarks.gpu_common import Record, Setting, isolated, judged, row
from benchmarks.gpu_parts import PARTS
from tests.benchmarks.conftest import ROOT

WRITE = "import json, sys; file = open(sys.argv[1], 'a'); print(json.dumps(dict(what='a', value=1, unit='s', verdict='passed')), file=file, flush=True); "  # noqa: E501


def rows_of(part: str, seconds: float = 100.0) -> list[Record]:
    return list(PARTS[part](Setting("cpu", time.monotonic() + seconds)))


def test_the_script_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    """Through the shell, from another folder, parts in the order of their value whatever their order in the command."""
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--out", tmp_path / "out", "nccl", "speed"],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=170,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["part", "what", "value", "unit", "verdict"]
    assert lines[-1].split()[:3] == ["total", "every", "part"]
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert document["passed"]
    assert [part["part"] for part in document["parts"]] == ["speed", "nccl"]
    assert all(part["verdict"] == "passed" and part["seconds"] > 0 for part in document["parts"])
    assert document["failures"] == []
    speed = [r for r in document["rows"] if r["part"] == "speed"]
    assert {(r["trial"]["contender"], r["trial"]["of"], r["trial"]["mode"]) for r in speed if r.get("peak_mib")} >= {
        ("ours", of, mode) for of in ("model", "cross-attend") for mode in ("forward", "train")
    }
    assert any("FlexAttention does not support backward on CPU" in r["verdict"] for r in speed)
    assert len(lines) == 2 + len(document["rows"]) + len(document["parts"])


@pytest.mark.parametrize(
    ("code", "limit_s", "verdict", "rows"),
    [
        (WRITE + "raise ValueError('too small')", 60, "failed: exit status 1", 1),
        (WRITE + "import os, time; os.fork(); time.sleep(600)", 2, "cut at its limit of 2 s", 1),
        (WRITE + "import os; os.kill(os.getpid(), 11)", 60, "failed: killed by SIGSEGV", 1),
        (WRITE + "file.write('{\"what')", 60, "passed", 1),
        ("pass", 60, "failed: 0 of 0 rows", 0),
        (WRITE.replace("passed", "failed: slow"), 60, "failed: 1 of 1 rows", 1),
    ],
    ids=["raises", "hangs", "crashes", "cut row", "no rows", "failed row"],
)
def test_a_part_that_ends_badly(
    code: str, limit_s: float, verdict: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = gpu.run_part("kernels", [sys.executable, "-c", code], limit_s, tmp_path)
    assert (outcome.verdict, len(outcome.rows)) == (verdict, rows)
    assert outcome.seconds < limit_s + 20
    gpu.write_json(tmp_path / "gpu.json", "cpu", [outcome], 1.0)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["passed"] == (verdict == "passed")
    gpu.show_outcome(outcome)
    table = capsys.readouterr().out
    assert verdict in table
    if "raise" in code:
        assert document["failures"][0]["last_lines"][-1] == "ValueError: too small"
        assert "| ValueError: too small" in table


def state_of(pid: str) -> str:
    """Return a process's letter in /proc, or nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def test_children_of_a_part_are_killed_with_it(tmp_path: Path) -> None:
    code = "import os, sys, time; os.fork(); open(sys.argv[1] + '.pid', 'a').write(f'{os.getpid()} '); time.sleep(600)"
    gpu.run_part("kernels", [sys.executable, "-c", code], 2, tmp_path)
    pids = (tmp_path / "kernels.jsonl.pid").read_text().split()
    assert len(pids) == 2
    until = time.monotonic() + 20
    while (alive := [pid for pid in pids if state_of(pid) not in ("", "Z")]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def test_what_the_total_cuts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_part", lambda part, *_: time.sleep(0.2) or gpu.Outcome(part, "passed"))
    monkeypatch.setattr(gpu, "LEAST_S", 0.1)
    outcomes = gpu.run_parts(["machine", "kernels"], "cpu", 0.25 / 60, tmp_path)
    assert [outcome.verdict for outcome in outcomes] == ["passed", "not begun: the 0.00416667 minutes were over"]
    assert not json.loads((tmp_path / "gpu.json").read_text())["passed"]


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.missing_packages() == []
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("PIL", "tomli_w") else object())
    assert gpu.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"gpu.sh: missing in {sys.executable}: tomli-w, pillow\n"
    with pytest.raises(SystemExit):
        gpu.main(["nothing"])


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    problem = gpu.device_problem("cuda")
    assert problem.startswith("--device cuda: ")
    assert problem.endswith("0 GPUs; use --device cpu")


def working(kind: str) -> Iterator[Record]:
    yield row("before")
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hang":
        time.sleep(600)
    elif kind == "raise":
        raise ValueError("too\nlong")


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("fine", ""),
        ("crash", "failed: killed by SIGKILL"),
        ("hang", "cut after 12 s"),
        ("raise", "failed: ValueError: too"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_work_in_a_process_of_its_own(kind: str, verdict: str) -> None:
    rows = list(isolated("work", 12 if kind == "hang" else 60, working, kind))
    assert [r["what"] for r in rows] == ["before", "work"][: 1 if kind == "fine" else 2]
    assert rows[-1]["verdict"] == verdict


def test_a_number_that_is_none_fails() -> None:
    assert judged("error", 1e-5, 1e-4)["verdict"] == "passed"
    assert judged("error", float("nan"), 1e-4)["verdict"].startswith("failed")


@pytest.mark.parametrize("part", ["machine", "kernels", "equality", "tests"])
def test_parts_that_check(part: str) -> None:
    rows = rows_of(part)
    assert not [r for r in rows if r.get("verdict", "").startswith("failed")]
    assert any(r.get("verdict") == "passed" for r in rows)


def test_part_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, resuming, and a real `perceiver train` under a limit of memory."""
    monkeypatch.setenv("PYTHONPATH", gpu.PYTHONPATH)
    rows = rows_of("precisions")
    assert [r["what"].split(":")[0] for r in rows] == [
        "image, bf16", "image, bf16", "a batch that cannot fit", "tiny-image, bf16"
    ]  # fmt: skip
    assert [r["verdict"] for r in rows] == ["passed"] * 4


@pytest.mark.parametrize("modality", ["points", "video"])
def test_files_of_other_modalities_can_be_trained_on(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_training, "FILES", 4)
    setting = Setting("cpu", time.monotonic() + 100)
    assert list(gpu_training._write(tmp_path / modality, modality)) == []
    trainer = gpu_training._trainer(setting, tmp_path / modality, tmp_path / "run", modality, "fp32")
    assert list(trainer.plan.catalog.modalities) == [modality]
    assert len(next(trainer.plan.reader.batches(trainer.new_run().tasks(1))).examples) == 16


@pytest.mark.parametrize("part", ["compile", "loader"])
def test_parts_that_time_training(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    # A compilation takes a minute of a CPU: here the call is made, and compiles nothing.
    monkeypatch.setattr(torch, "compile", lambda call: call)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    rows = rows_of(part)
    assert not [r for r in rows if r["verdict"].startswith("failed")]
    assert all(r["value"] > 0 for r in rows)
