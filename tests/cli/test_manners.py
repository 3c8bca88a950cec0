"""Manners: hostile names, terminals, colours, -q and -v, what libraries say, completion; through the real command."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from perceiver_cli.advice.base import Advice
from perceiver_cli.cli import completion, terminal
from perceiver_cli.cli.configuration import all_options
from perceiver_cli.config import Flag, load_preset
from perceiver_cli.errors import UsageError, counted
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.stream import Feed, read_records
from tests.conftest import SMALL, Perceive, at_least, write_images

PROGRAM = Path(sys.executable).parent / "perceiver"
SETS = [part for change in SMALL for part in ("--set", change)]

# Forty names that have broken programs: not UTF-8, line ends, terminal commands, markup, bidi, options, quotes.
HOSTILE = [
    b"\xff", b"\xc3\x28", b"a\xf0\x9f", b"\x80\x80", b"caf\xe9",
    b"a\nb", b"a\rb", b"a\r\nb", b"\n", b"a\tb", b"a\x0bb", b"a\x0cb",
    b"\x1b[31mred", b"\x1b]0;owned\x07", b"\x1b[2J", b"\x1bPq", b"\x9b31m", b"\x07", b"\x08\x08", b"\x7f", b"\x01\x02",
    b"[red]x", b"[[]", b"[bold", b"[link=a]b", b":smile:",
    "a\u202eb".encode(), "\u200bzero".encode(), "a\u2028b".encode(), "\ufeffbom".encode(), "\u0085next".encode(),
    b"-rf", b"--help", b"=1+1", b"@x", b"'quote\"", b"a,b;c", b"%s{}$(x)`y`", b"\\x41\\n", b" lead and trail ",
]  # fmt: skip
assert len(set(HOSTILE)) == 40


def control(data: bytes) -> list[int]:
    return [byte for byte in data if byte < 0x20 and byte != 0x0A]


@pytest.mark.parametrize("command", ["export", "info"])
@pytest.mark.parametrize("option", ["-m", "--model"])
def test_a_model_as_an_option_where_it_is_the_argument_is_told(command: str, option: str, perceive: Perceive) -> None:
    done = perceive(command, option, "my run")
    told = f"-m 'my run': {command} takes the model as its argument; type: perceiver {command} 'my run'"
    assert (done.returncode, done.stderr.decode()) == (2, f"perceiver: {told}\n")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, perceive: Perceive) -> Path:
    """A folder with data/ of two classes, each name once readable and once cut, and a run that learned from it."""
    here = tmp_path_factory.mktemp("hostile")
    write_images(here / "plain", {"a": 40, "b": 40})
    for name in "ab":
        (here / "data" / name).mkdir(parents=True)
        for k, given in enumerate(HOSTILE):
            image = (here / "plain" / name / f"{k:03d}.png").read_bytes()
            folder = os.fsencode(here / "data" / name)
            Path(os.fsdecode(folder + b"/" + given + b".png")).write_bytes(image)
            if name == "a":
                Path(os.fsdecode(folder + b"/cut" + given + b".png")).write_bytes(image[:60])
    done = perceive("train", "data", "-o", b"run\x1b[31m\xff", "--max-bad", "1", "-v", *SETS, "--steps", "1", cwd=here)
    assert done.returncode == 0, done.stderr
    assert b"done: 1 step in " in done.stderr
    assert done.stdout == b"run\x1b[31m\xff/model.safetensors\n"
    assert not control(done.stderr)
    os.rename(os.fsencode(here) + b"/run\x1b[31m\xff", here / "run")
    return here


def all_names(prefix: bytes = b"") -> set[bytes]:
    return {prefix + name + b".png" for name in HOSTILE}


def test_train_keeps_every_name_in_its_split(hostile: Path) -> None:
    lines = [json.loads(line) for line in (hostile / "run" / "split.jsonl").read_bytes().splitlines()[1:-1]]
    found = {os.fsencode(line["path"]) for line in lines}
    assert found == all_names(b"a/") | all_names(b"b/") | all_names(b"a/cut")


def test_too_many_unreadable_ones_are_listed_safely(hostile: Path, perceive: Perceive) -> None:
    done = perceive("train", "data", "-o", "other", *SETS, "--steps", "3", cwd=hostile)
    assert done.returncode == 3
    assert b"40 of 120 files cannot be read" in done.stderr
    assert not control(done.stderr)


def test_evaluate_keeps_every_name(hostile: Path, perceive: Perceive) -> None:
    done = perceive("evaluate", "data", "-m", "run", "--split", "all", "-o", "report", "--json", cwd=hostile)
    assert done.returncode == 3
    assert not control(done.stdout + done.stderr)
    records = [json.loads(line) for line in (hostile / "report" / "predictions.jsonl").read_bytes().splitlines()]
    assert {os.fsencode(record["id"]) for record in records} == all_names(b"a/") | all_names(b"b/")
    assert {os.fsencode(row["path"]) for row in json.loads(done.stdout)["bad"]} == all_names(b"data/a/cut")


@pytest.mark.parametrize("style", ["jsonl", "csv"])
def test_predict_keeps_every_name(hostile: Path, perceive: Perceive, style: str) -> None:
    given = sorted(b"data/a/" + name for name in all_names() | all_names(b"cut"))
    command = ["predict", "-m", "run", "--files-from", "-", "-0", "--format", style]
    done = perceive(*command, cwd=hostile, stdin=b"\0".join(given))
    assert done.returncode == 3
    assert not control(done.stderr)
    assert done.stderr.count(b"\n") == 40
    if style == "jsonl":
        found = [json.loads(line)["path"] for line in done.stdout.splitlines()]
    else:
        text = done.stdout.decode("utf-8", "surrogateescape")
        rows = csv.reader(io.StringIO(text, newline=""))
        found = [row[0] for row in rows][1:]
    assert [os.fsencode(path) for path in found] == given


@pytest.mark.parametrize("listed", [False, True])
def test_preprocess_keeps_every_name(hostile: Path, perceive: Perceive, listed: bool) -> None:
    given = sorted(f"data/{name}".encode() + b"/" + file for name in "ab" for file in all_names())
    given += sorted(b"data/a/" + file for file in all_names(b"cut"))
    how = ["--files-from", "-", "-0", "--label-from", "parent"] if listed else ["data"]
    done = perceive("preprocess", *how, "-m", "run", cwd=hostile, stdin=b"\0".join(given) if listed else None)
    assert done.returncode == 3
    assert not control(done.stderr)
    assert done.stderr.count(b"image file is truncated") == 40
    feed = Feed(io.BytesIO(done.stdout), "'x'")
    facts = [record.facts for _, record in read_records(feed, Limits(), feed.take)]
    assert {os.fsencode(each.path) for each in facts if not each.error} == set(given[:80])
    assert {os.fsencode(each.path) for each in facts if each.error} == set(given[80:])
    assert len(facts) == 120
    assert {each.labels for each in facts} == {("a",), ("b",)}


def test_lint_keeps_every_name(hostile: Path, perceive: Perceive) -> None:
    done = perceive("lint", "data", "--json", cwd=hostile)
    assert done.returncode == 3
    assert {os.fsencode(row["path"]) for row in json.loads(done.stdout)["unreadable"]} == all_names(b"a/cut")
    table = perceive("lint", "data", cwd=hostile)
    assert not control(table.stdout + table.stderr + done.stderr)


@pytest.mark.parametrize("command", ["train", "lint", "nothing"])
def test_hostile_arguments_come_back_escaped(perceive: Perceive, tmp_path: Path, command: str) -> None:
    for arguments in ([b"\x1b[31mx\xff", b"\x1b[2Jy"], [b"--no\x1b[31m"], [b"--limit", b"\x1b=1"], [b"-m", b"\x07"]):
        done = perceive(command, *arguments, cwd=tmp_path)
        assert done.returncode in (2, 3), (arguments, done.stderr)
        assert done.stderr
        assert not control(done.stdout + done.stderr), arguments


# ---------------------------------------------------------------- terminals


def on_terminal(
    *command: str | Path, cwd: Path, streams: tuple[str, ...], stdin: bytes = b"", timeout: float = 60, **env: str
) -> tuple[int, bytes]:
    """Run a command with some of its streams on a terminal of 80 columns; return status and what the terminal got."""
    main, terminal = pty.openpty()
    given = {name: terminal if name in streams else subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PERCEIVER_MODEL")} | {
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        **env,
    }
    process = subprocess.Popen([PROGRAM, *command], cwd=cwd, env=environment, start_new_session=True, **given)  # type: ignore[call-overload]
    os.close(terminal)
    for name in {"stdout", "stderr"} - set(streams):
        os.set_blocking(getattr(process, name).fileno(), False)
    if process.stdin is not None:
        process.stdin.write(stdin)
        process.stdin.close()
    shown = b""
    while True:
        ready, _, _ = select.select([main], [], [], timeout)
        assert ready, "nothing for a minute: it hangs"
        try:
            chunk = os.read(main, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    for name in {"stdout", "stderr"} - set(streams):
        getattr(process, name).close()
    status = process.wait(timeout=timeout)
    os.close(main)
    return status, shown


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "-m", "run", "-"],
        ["predict", "-m", "run", "--files-from", "-"],
        ["preprocess", "-", "-o", "x.tar"],
        ["preprocess", "--files-from", "-", "-o", "x.tar"],
        ["train", "-"],
        ["evaluate", "-", "-m", "run"],
        ["lint", "-"],
    ],
)
def test_stdin_that_is_a_terminal_gets_help(hostile: Path, command: list[str]) -> None:
    status, shown = on_terminal(*command, cwd=hostile, streams=("stdin", "stderr"))
    assert status == 2
    assert b"stdin is a terminal; pipe data in: " in b" ".join(shown.split())


STYLE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
COLOR = re.compile(rb"\x1b\[[0-9;]*(?<![0-9])(3[0-9]|4[0-9]|9[0-7]|10[0-7])[0-9;]*m")


def test_names_on_a_terminal(hostile: Path, perceive: Perceive) -> None:
    names = [os.fsdecode(b"data/a/" + name + b".png") for name in HOSTILE]
    for style in ("table", "csv"):
        status, shown = on_terminal(
            "predict", "-m", "run", "--format", style, *names, cwd=hostile, streams=("stdout", "stderr")
        )
        assert status == 0
        assert not control(STYLE.sub(b"", shown.translate(None, b"\r\t"))), style
        assert b"\x1b]" not in shown
        assert b"\x1b[2J" not in shown
        assert b"\x1b[31m" not in shown
    status, shown = on_terminal("lint", "data", cwd=hostile, streams=("stdout", "stderr"))
    assert status == 3
    assert not control(STYLE.sub(b"", shown.translate(None, b"\r")))
    assert b"\x1b[31m" not in shown


def test_bars_and_colours_are_for_terminals(hostile: Path) -> None:
    status, shown = on_terminal("lint", "plain", cwd=hostile, streams=("stdout", "stderr"))
    assert status == 0
    assert b"checking" in shown
    _, shown = on_terminal("lint", "plain", cwd=hostile, streams=("stdout", "stderr"), NO_COLOR="1")
    assert not COLOR.search(shown)
    _, shown = on_terminal("lint", "-q", "plain", cwd=hostile, streams=("stderr",))
    assert shown == b""


# ---------------------------------------------------------------- quiet and verbose, libraries


def test_quiet_says_errors_only(hostile: Path, perceive: Perceive, tmp_path: Path) -> None:
    done = perceive("train", "plain", "-q", "-o", tmp_path / "r", *SETS, "--steps", "2", cwd=hostile)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"/r/model.safetensors\n")
    done = perceive("evaluate", "plain", "-q", "-m", "run", cwd=hostile)
    assert (done.returncode, done.stderr) == (0, b"")
    files = ["plain/a/000.png", "none.png"]
    shutil.copytree(hostile / "run", tmp_path / "runs" / "latest")
    loud = perceive("predict", *(hostile / name for name in files), cwd=tmp_path)
    done = perceive("predict", "-q", *(hostile / name for name in files), cwd=tmp_path)
    assert loud.stderr.splitlines()[0] == b"using 'runs/latest/model.safetensors'"
    assert loud.stderr.splitlines()[1:] == done.stderr.splitlines()
    assert b"none.png': cannot read" in done.stderr
    assert done.stdout == loud.stdout
    done = perceive("lint", "-q", "data", cwd=hostile)
    assert (done.returncode, done.stderr) == (3, b"")  # what it found is data


@pytest.fixture
def tiff(tmp_path: Path) -> Path:
    """A picture of which libtiff itself has something to say on stderr."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "x.tiff", compression="tiff_lzw")
    data = bytearray((tmp_path / "x.tiff").read_bytes())
    data[8:40] = bytes(32)  # what is compressed
    (tmp_path / "x.tiff").write_bytes(data)
    return tmp_path / "x.tiff"


def test_what_libraries_say_is_heard_with_verbose_only(perceive: Perceive, tiff: Path) -> None:
    script = "import sys; from PIL import Image\ntry: Image.open(sys.argv[1]).load()\nexcept Exception: pass"
    raw = subprocess.run([sys.executable, "-c", script, tiff], capture_output=True, check=True).stderr
    assert raw  # otherwise there is nothing to test
    (tiff.parent / "d" / "a").mkdir(parents=True)
    (tiff.parent / "d" / "b").mkdir()
    for i in range(70):
        shutil.copy(tiff, tiff.parent / "d" / "ab"[i % 2] / f"{i}.tiff")
    for workers in ("0", "2"):
        done = perceive("lint", "d", "--workers", workers, "--json", cwd=tiff.parent)
        assert b"library: " not in done.stderr
        assert raw.splitlines()[0] not in done.stderr
        assert len(json.loads(done.stdout)["unreadable"]) + len(json.loads(done.stdout)["duplicates"]) > 0
        done = perceive("lint", "d", "--workers", workers, "-v", cwd=tiff.parent)
        assert raw.splitlines()[0].split(b":")[0] in done.stderr
        assert all(line.startswith((b"library: ", b"next: ")) for line in done.stderr.splitlines())
    done = perceive("--debug", "lint", "d", "--workers", "0", cwd=tiff.parent)
    assert raw.splitlines()[0] in done.stderr


def test_stderr_that_is_closed_is_no_reason_to_fail(hostile: Path, tmp_path: Path) -> None:
    script = f"exec '{PROGRAM}' predict -m run plain/a/000.png nothing.png "
    for redirection in ("2>&-", "2>/dev/full"):
        done = subprocess.run(["bash", "-c", script + redirection], cwd=hostile, capture_output=True, check=False)
        assert done.returncode == 3, done.stderr
        assert len(done.stdout.splitlines()) == 2


def test_an_unexpected_oserror_is_a_bug_in_one_line() -> None:
    script = (
        "from perceiver_cli.cli.terminal import guarded\n"
        "def app(): raise PermissionError(13, 'Permission denied')\n"
        "guarded(app)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.startswith(b"perceiver: this is a bug: PermissionError: [Errno 13]")


# ---------------------------------------------------------------- flags and plurals


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (Flag("--lr -1.0", "train.lr", -1.0), "--lr -1.0: Input should be greater than 0, found -1.0"),
        (Flag("--seed 9", "train.seed", 1 << 63), "--seed 9: Input should be less than"),
        (Flag("--limit faces=1.5", "data.limits.faces", 1.5), "--limit faces=1.5: Input should be a valid integer"),
        ("train.lr=-1", "--set train.lr=-1: Input should be greater than 0, found -1"),
        ("data.limits={faces='x'}", "--set data.limits={faces='x'}: data.limits.faces: Input should be a valid"),
        ("train.lrr=1", "options: unknown key train.lrr, did you mean train.lr"),
        ("model.latent_channels=15", "options: model: latent_channels 15 is not a multiple"),
    ],
)
def test_errors_name_what_was_typed(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("tiny-image").override(["train.steps=3", assignment])
    assert str(caught.value).startswith(message)


def test_errors_of_flags_name_the_flag(perceive: Perceive, bars: Path) -> None:
    done = perceive("train", bars, "--lr", "-1", "--set", "train.steps=3")
    assert (done.returncode, done.stderr) == (2, b"perceiver: --lr -1.0: Input should be greater than 0, found -1.0\n")
    done = perceive("train", bars, "--batch-size", "0")
    assert done.returncode == 2
    fault = b"Input should be greater" if at_least("typer", "0.29") else b"0 is not in the range x>=1"
    assert b"'--batch-size': " + fault in done.stderr


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "step", "1 step"), (0, "file", "0 files"), (2000, "class", "2,000 classes"), (1, "class", "1 class")],
)
def test_one_is_not_many(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


# ---------------------------------------------------------------- completion


def completions(line: str, cwd: Path) -> list[str]:
    words = line.split(" ")
    env = {**os.environ, "_PERCEIVER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([PROGRAM], cwd=cwd, env=env, capture_output=True, check=False)
    assert done.stderr == b""
    return done.stdout.decode().split()


def test_the_shell_completes_presets_runs_and_models(tmp_path: Path) -> None:
    for run in ("runs/a", "runs/b", "else/c", "runs/x\x1b[31m"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "model.safetensors").touch()
    (tmp_path / "runs" / "not").mkdir()
    (tmp_path / "runs" / "begun" / "last").mkdir(parents=True)
    (tmp_path / "m.safetensors").touch()
    assert completions("perceiver train --preset tiny-a", tmp_path) == ["tiny-audio", "tiny-av"]
    assert "imagenet" in completions("perceiver presets ", tmp_path)
    assert completions("perceiver predict -m ", tmp_path) == ["m.safetensors", "runs/a", "runs/b"]
    assert completions("perceiver evaluate x --model else/", tmp_path) == ["else/c"]
    assert completions("perceiver train x --resume -o runs/b", tmp_path) == ["runs/b", "runs/begun"]
    assert completions("perceiver info m", tmp_path) == ["modelnet40", "m.safetensors"]
    assert completions("perceiver li", tmp_path) == ["lint"]


def test_the_shell_completes_keys_of_options(tmp_path: Path) -> None:
    assert completions("perceiver train x --set train.lr", tmp_path) == ["train.lr="]
    assert completions("perceiver preprocess x --set inputs.image.si", tmp_path) == ["inputs.image.size="]
    assert completions("perceiver sweep x --vary data.limits.image_p", tmp_path) == ["data.limits.image_pixels="]
    assert [f"{option.key}=" for option in all_options()] == completion.settings("")


@pytest.mark.parametrize(
    ("words", "heavy"),
    [("perceiver predict -m r", ["torch", "numpy", "PIL"]), ("perceiver train x --set train.l", ["torch"])],
)
def test_completing_imports_no_torch(tmp_path: Path, words: str, heavy: list[str]) -> None:
    env = {
        **os.environ,
        "_PERCEIVER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    script = (
        "import sys; from perceiver_cli.cli.app import app\n"
        "try: app(prog_name='perceiver')\n"
        "except SystemExit: pass\n"
        "assert not set(sys.argv[1:]) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, *heavy], env=env, cwd=tmp_path, check=True)


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish")])
def test_completion_installs(tmp_path: Path, shell: str, file: str) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([PROGRAM, "--install-completion", shell], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / file).exists()


@pytest.mark.parametrize("cause", ["torch.empty(1 << 50)", "exec('raise torch.OutOfMemoryError')", "bytes(1 << 60)"])
def test_memory_that_runs_out_is_one_line(cause: str) -> None:
    script = f"import torch; from perceiver_cli.cli.terminal import guarded; guarded(lambda: {cause})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr == "perceiver: out of memory; try a smaller --batch-size, or --recompute in training\n"


# ---------------------------------------------------------------- paths and streams


def one_line(done: subprocess.CompletedProcess[bytes], status: int, words: bytes) -> None:
    assert done.returncode == status, done
    assert words in done.stderr.splitlines()[-1], done.stderr
    assert b"Traceback" not in done.stderr
    assert b"bug" not in done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("train BAD", 3), ("train --resume -o BAD", 3), ("train DATA -o BAD", 5), ("evaluate DATA -m BAD", 3),
        ("info BAD", 3), ("compare BAD BAD", 3),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_one_line_with_its_cause(
    perceive: Perceive, bars: Path, tmp_path: Path, command: str, status: int
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for bad, words in (("x" * 300, b"File name too long"), ("loop/x", b"Too many levels of symbolic links")):
        named = [str(bars) if word == "DATA" else bad if word == "BAD" else word for word in command.split()]
        one_line(perceive(*named, cwd=tmp_path), status, words)


def test_a_fifo_is_refused_at_once(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    (tmp_path / "run/last").mkdir(parents=True)
    os.mkfifo(tmp_path / "recipe.toml")
    os.mkfifo(tmp_path / "run/last/MANIFEST.json")
    one_line(perceive("train", bars, "--config", tmp_path / "recipe.toml"), 2, b"not a regular file")
    one_line(perceive("train", "--resume", "-o", tmp_path / "run"), 3, b"not a regular file")


def test_help_ends_by_the_signal_when_its_reader_leaves(warm_bin: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([warm_bin / "perceiver", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE
    assert done.stderr == b""


def test_a_deleted_working_folder_is_named(tmp_path: Path) -> None:
    command = f'mkdir gone; cd gone; rmdir ../gone; exec "{sys.executable}" -m perceiver_cli info tiny-image'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    one_line(done, 2, b"the current folder was deleted")


@pytest.mark.slow
def test_matplotlib_is_quiet_where_home_cannot_be_written(trained: Path, bars: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "perceiver_cli",
        "evaluate",
        str(bars),
        "-m",
        str(trained),
        "-o",
        str(tmp_path / "o"),
    ]
    names = {"MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    (tmp_path / "tmp").mkdir()
    for own in ({"HOME": "/dev/null"}, {"MPLCONFIGDIR": "/dev/null/none"}):
        own["TMPDIR"] = str(tmp_path / "tmp")
        done = subprocess.run([*words, "-q", "--device", "cpu"], env=environment | own, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        assert not list((tmp_path / "tmp").iterdir())  # no folder stays behind


def test_a_command_that_does_not_fit_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(terminal, "say", said.append)
    monkeypatch.setattr(terminal, "stderr_is_terminal", lambda: True)
    monkeypatch.setattr(terminal, "talk", lambda: Console(width=60))
    command = ("perceiver", "evaluate", "data", "-m", "runs/one", "-o", "runs/one/report")
    terminal.say_advice([Advice("short", command[:3]), Advice("to see its mistakes", command)])
    assert said == [
        "next: short: perceiver evaluate data",
        "next: to see its mistakes:",
        "  perceiver evaluate data -m runs/one -o runs/one/report",
    ]
