"""Whole commands in real pipes: records from one to the next, readers that leave, writers that die, memory."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.records.format import Facts, Header
from perceiver_cli.records.npy import npy_bytes
from perceiver_cli.records.stream import Writer, pack
from tests.conftest import SMALL, Perceive

PROGRAM = Path(sys.executable).parent / "perceiver"
SETS = " ".join(f"--set '{change}'" for change in SMALL)


def shell(script: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which `perceiver` is the command under test."""
    environment = {k: v for k, v in os.environ.items() if k != "PERCEIVER_MODEL"}
    environment["PATH"] = f"{PROGRAM.parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, timeout=timeout, check=False
    )


@pytest.fixture
def here(trained: Path, bars: Path, tmp_path: Path) -> Path:
    """A folder with data and a model trained on it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(trained)
    (tmp_path / "data").symlink_to(bars)
    return tmp_path


@pytest.mark.slow
def test_the_issues_pipelines(here: Path) -> None:
    """What the project promises to people of the shell, as it is written there."""
    done = shell(
        "set -eo pipefail\n"
        f"find data/ -name '*.png' -print0 | perceiver preprocess --files-from - -0 --label-from parent"
        f" | perceiver train - -o a {SETS} --steps 5 >/dev/null\n"
        f"perceiver preprocess data/ | tee train.tar | perceiver predict -m a - > predictions.jsonl\n"
        f"perceiver preprocess data/ -o 'shards/train-%06d.tar' --shard-size 100k --workers 2\n"
        f"perceiver preprocess data/test -o a.tar\n"
        f"cat a.tar a.tar | perceiver evaluate - --json | jq .num_examples\n"
        "tar xOf train.tar 00000042.image.npy | python3 -c "
        "'import sys,io,numpy; print(numpy.load(io.BytesIO(sys.stdin.buffer.read())).shape)'\n"
        f"perceiver predict - < data/test/left/000.png --stdin-name mine.png | jq -r .path\n",
        here,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split("\n") == ["60", "(12, 12, 1)", "mine.png", ""]
    assert b"of records, copied to '" in done.stderr
    answers = [json.loads(line) for line in (here / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 150
    assert all(Path(here / answer["path"]).exists() for answer in answers)
    assert not list(here.glob("**/*.tmp"))


def test_a_model_refuses_what_was_prepared_otherwise(here: Path) -> None:
    done = shell("perceiver preprocess data --set inputs.image.size=16 | perceiver predict -", here)
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"inputs.image.size = [16, 16], but the model has [12, 12]; prepare it as the model does" in done.stderr


@pytest.mark.parametrize(
    ("command", "reader"),
    [
        ("predict", "true"),
        ("predict --workers 2", "head -1"),
        ("preprocess", "true"),
        ("preprocess --workers 2", "head -c1"),
    ],
)
def test_a_reader_that_leaves_ends_it_quietly(here: Path, command: str, reader: str) -> None:
    script = f"perceiver {command} data -m runs/latest 2>err | {reader} >/dev/null; echo ${{PIPESTATUS[0]}}"
    assert shell(script, here).stdout == b"141\n"
    assert (here / "err").read_bytes() == b""


def test_processes_end_with_the_one_that_made_them(here: Path) -> None:
    names = " ".join(["data"] * 60)
    command = [PROGRAM, "preprocess", *names.split(), "--workers", "2"]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(100_000)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    everyone = [int(child) for child in children]
    assert len(everyone) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in everyone) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in everyone)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_writer_that_dies_is_noticed_by_every_consumer(here: Path, perceive: Perceive) -> None:
    data = perceive("preprocess", "data", cwd=here).stdout
    for command in ("predict -", "evaluate -", "train - -o new"):
        done = perceive(*command.split(), cwd=here, stdin=data[: len(data) // 2])
        assert done.returncode == 7, command
        (line,) = [line for line in done.stderr.splitlines() if b"cut short" in line]
        assert line.startswith(b"perceiver: 'stdin': the stream was cut short after ")
        count = int(line.split(b"after ")[1].split()[0])
        assert len(done.stdout.splitlines()) == (count if command == "predict -" else 0)
    assert not (here / "new").exists()


@pytest.mark.slow
def test_a_writer_that_is_killed_at_random_points_is_always_noticed(here: Path) -> None:
    from perceiver_cli.errors import IntegrityError, PerceiverError
    from perceiver_cli.records.shards import spooled

    rng = random.Random(0)
    command = [PROGRAM, "preprocess", *["data"] * 10, "-m", "runs/latest"]
    cut = 0
    for _ in range(6):
        process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.peek(1)  # type: ignore[attr-defined]  # it has begun
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        with process.stdout as stdout:
            try:
                assert len(spooled(stdout, "stdin")) == 1500  # type: ignore[arg-type]
            except IntegrityError as error:
                assert "cut short after" in str(error)  # noqa: PT017
                cut += 1
            except PerceiverError as error:
                pytest.fail(str(error))
        process.wait()
    assert cut


def test_bad_inputs_have_a_line_and_the_status_is_3(here: Path, bars: Path) -> None:
    (here / "data").unlink()
    shutil.copytree(bars / "test", here / "data")
    (here / "data" / "left" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (here / "data" / "left" / "\x1b[31m.png").write_bytes(b"")
    script = "perceiver preprocess data -m runs/latest | perceiver predict - | wc -l; echo ${PIPESTATUS[@]}"
    done = shell(script, here)
    assert done.stdout == b"31\n3 3 0\n"
    assert done.stderr.count(b"perceiver: '") == 4  # two of each command, in the form of every error
    assert not re.search(rb"perceiver [a-z]+: ", done.stderr)
    assert b"\x1b" not in done.stderr
    assert b"prepared 31 inputs, 2 of them unreadable: their records hold the error" in done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_records(here: Path, tmp_path: Path) -> None:
    peaks = []
    script = (
        "import sys\nfrom perceiver_cli.cli.app import app\nfrom perceiver_cli.malloc import peak_bytes\n"
        "try: app(['predict', '-', '-m', 'runs/latest', '--batch-size', '32'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "open(sys.argv[1], 'w').write(str(peak_bytes()))"
    )
    spec = json.loads(shell("perceiver preprocess data -m runs/latest | tar xO __perceiver__/header", here).stdout)
    header = Header({"image": ImageSpec.model_validate(spec["inputs"]["image"])})
    image = npy_bytes(np.zeros((12, 12, 1), np.uint8))
    for count in (500, 12_000):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "peak")],
            cwd=here,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as process:
            assert process.stdin is not None
            writer = Writer(process.stdin.write, header)
            for number in range(count):
                writer.packed(pack(Facts(f"{number}.png", f"{number}.png"), {"image": image}, number, header))
            writer.close()
            process.stdin.close()
        peaks.append(int((tmp_path / "peak").read_text()))
    assert peaks[1] - peaks[0] < 12 << 20  # the stream itself is 30 MB


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
@pytest.mark.parametrize("command", ["bench growth --seconds 60", "preprocess data data data data data --workers 2"])
def test_a_killed_command_leaves_no_process(here: Path, command: str) -> None:
    """A process pool's children wait for work for ever when nobody tells them that their parent is gone."""
    # Nobody reads what it writes: records fill the pipe and wait there.
    with subprocess.Popen(
        [PROGRAM, *command.split()], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        found: list[str] = []
        while not found:
            time.sleep(0.1)
            found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    end = time.monotonic() + 20
    while any(Path("/proc", child).exists() for child in found):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_resident_predictor_answers_a_path_while_the_pipe_stays_open(here: Path, warm_bin: Path) -> None:
    """The shell function of docs/predict.md; it would wait for ever for a batch that is never full."""
    done = shell(
        f"coproc PERCEIVER {{ {warm_bin}/perceiver predict --files-from -; }}\n"
        'classify() { printf "%s\\n" "$1" >&"${PERCEIVER[1]}"; read -r -u "${PERCEIVER[0]}" answer; }\n'
        'for file in data/test/left/00[0-2].png data/none.png; do classify "$file"; echo "$answer"; done\n'
        'pid=$PERCEIVER_PID; eval "exec ${PERCEIVER[1]}>&-"; wait "$pid"; echo "status $?"\n',
        here,
        timeout=60,
    )
    *lines, status = done.stdout.decode().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer.get("label") for answer in answers] == ["left", "left", "left", None]
    assert "No such file" in answers[3]["error"]
    assert status == "status 3"


def test_rows_of_json_are_answered_one_by_one_and_a_bad_one_takes_no_other(here: Path, warm_bin: Path) -> None:
    done = shell(
        f"coproc PERCEIVER {{ {warm_bin}/perceiver predict - --pass from; }}\n"
        'row() { printf \'{"path": "data/test/left/%s.png", "from": {"camera": 1}}\\n\' "$1"; }\n'
        'row 000 >&"${PERCEIVER[1]}"; read -r -u "${PERCEIVER[0]}" answer; echo "$answer"\n'  # the pipe is still open
        '{ printf "%s\\n" "{oops" "[1]"; row 001; } >&"${PERCEIVER[1]}"; eval "exec 3<&${PERCEIVER[0]}"\n'
        'pid=$PERCEIVER_PID; eval "exec ${PERCEIVER[1]}>&-"; cat <&3; wait "$pid"; echo "status $?"\n',
        here,
        timeout=60,
    )
    *lines, status = done.stdout.decode().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["path"] for answer in answers] == [
        "data/test/left/000.png", "row 2", "row 3", "data/test/left/001.png"
    ]  # fmt: skip
    assert [answer.get("label") for answer in answers] == ["left", None, None, "left"]
    assert answers[3]["from"] == '{"camera": 1}'
    assert "column 2" in answers[1]["error"]
    assert "not an object" in answers[2]["error"]
    assert status == "status 3"


def test_a_manifest_arrives_on_stdin(here: Path, perceive: Perceive) -> None:
    paths = [f"data/test/{name}/00{n}.png" for name in ("left", "right") for n in range(3)]
    rows = [{"path": path, "label": path.split("/")[2]} for path in paths]
    table = "\n".join(["path,label", *(",".join(row.values()) for row in rows)]) + "\n"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (here / "m.csv").write_text(table)
    expected = json.loads(perceive("evaluate", "m.csv", "--json", cwd=here).stdout)
    for manifest in (table, lines, table.replace("\n", "\r\n")):
        piped = perceive("evaluate", "-", "--json", cwd=here, stdin=manifest.encode())
        assert piped.returncode == 0, piped.stderr
        assert json.loads(piped.stdout)["accuracy"] == expected["accuracy"]
        answers = perceive("predict", "-", cwd=here, stdin=manifest.encode()).stdout.splitlines()
        assert [json.loads(answer)["path"] for answer in answers] == paths
    trained = shell(f"perceiver train - -o run {SETS} --steps 1 < m.csv; perceiver lint - --json < m.csv", here)
    assert trained.stdout.startswith(b"run/model.safetensors"), trained.stderr
    renamed = table.replace("path,label", "where,kind")
    named = ("--path-column", "where", "--label-column", "kind")
    piped = perceive("evaluate", "-", "--json", *named, cwd=here, stdin=renamed.encode())
    assert b"note: path from 'where', label from 'kind'\n" in piped.stderr
    assert piped.returncode == 0


@pytest.mark.parametrize(
    ("script", "message", "status"),
    [
        (
            "perceiver predict --files-from m.csv",
            "a manifest, not a list of paths; leave out --files-from: pass 'm.csv'",
            2,
        ),
        ("perceiver predict --files-from - < m.csv", "a manifest, not a list of paths", 2),
        ("perceiver predict -0 m.csv", "-0 has no effect without --files-from; pass --files-from - -0", 2),
        ("mkfifo p.png; perceiver predict p.png", "a pipe, not a regular file; pipe the bytes in and pass -", 3),
        ("mkfifo p; perceiver evaluate p", "a pipe, not a regular file; pipe the bytes in and pass -", 3),
        ("ls data/test/left | perceiver evaluate -", "'stdin': not records; expected a stream from", 3),
        ("perceiver predict a.wav b.wav --format srt", "--format srt holds the events of one input", 2),
        ("perceiver predict a.png --format json", "'--format': 'json' is not one of 'auto'", 2),
    ],
)
def test_what_people_of_the_shell_get_wrong(here: Path, warm_bin: Path, script: str, message: str, status: int) -> None:
    (here / "m.csv").write_text("path,label\ndata/test/left/000.png,left\n")
    done = shell(f"PATH={warm_bin}:$PATH; {script}", here)
    assert message in done.stderr.decode()
    assert done.returncode == status


def test_a_list_is_counted(here: Path, perceive: Perceive) -> None:
    names = [f"data/test/left/00{n}.png" for n in range(3)]
    made = perceive("preprocess", *names, "-o", "x.tar", "--label-from", "parent", cwd=here)
    assert b"\nall 3 files are used\n" in made.stderr
    header = perceive("predict", "--files-from", "-", "--format", "csv", "--top-k", "1", cwd=here, stdin=b"")
    assert header.stdout == b"path,label,prob,error\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interrupted_command_says_what_goes_on(here: Path, warm_bin: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(["data/test/left/000.png"] * 5000) + "\n")
    list_ = ["predict", "--files-from", "list.txt", "--batch-size", "1"]
    shards = ["preprocess", *["data"] * 60, "-m", "runs/latest", "-o", "s/x-%d.tar", "--shard-size", "100k"]
    for command in (list_, shards):
        with subprocess.Popen(
            [warm_bin / "perceiver", *command], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            if command is shards:
                while not (here / "s").exists() or not any((here / "s").iterdir()):
                    time.sleep(0.02)
            else:
                first = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGINT)
            answers = process.stdout.read().splitlines()
            said = process.stderr.read().decode().splitlines()
        assert process.returncode == -signal.SIGINT
        if command is list_:
            done = int(said[-2].removeprefix("stopped after ").removesuffix(" inputs"))
            assert 0 <= len(first) + len(answers) - done <= 1  # a signal may come right after a line
            rest = "perceiver predict --files-from - --batch-size 1"
            assert said[-1] == f"to continue: tail -n +{done + 1} list.txt | {rest}"
        else:
            assert said[-1].startswith("to continue: perceiver preprocess data data ")
            assert said[-1].endswith(" -o s/x-%d.tar --shard-size 100k --resume")


def test_terminals_get_help_instead_of_silence(here: Path) -> None:
    main, terminal = os.openpty()
    for command in ("train", "evaluate", "predict", "preprocess"):
        done = subprocess.run([PROGRAM, command, "-"], stdin=terminal, capture_output=True, cwd=here, check=False)
        assert done.returncode == 2, command
        assert b"stdin is a terminal; pipe data in: " in done.stderr
    os.close(terminal)
    os.close(main)
