"""The code blocks of README.md and docs/, the pages made from the program, and the examples, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.main import get_command

from docs import blocks, make_cli, make_configuration, make_man
from perceiver_cli.cli.app import app
from tests.conftest import Perceive

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PAGES = [page for page in blocks.PAGES if any(block.runs for block in blocks.blocks(page))]


def run(command: list[str | Path], cwd: Path, *programs: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PERCEIVER_MODEL"}
    environment["PATH"] = os.pathsep.join([*map(str, programs), str(BIN), environment["PATH"]])
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, warm_bin: Path) -> Path:
    """A folder with the data and the models that pages need, made once for all processes of the suite."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs-place"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if not folder.exists():
            patch.setenv("PATH", os.pathsep.join([str(warm_bin), str(BIN), os.environ["PATH"]]))
            making = folder.with_suffix(".new")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            blocks.prepare(making)
            making.rename(folder)
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path, warm_bin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, with the program in PATH."""
    monkeypatch.delenv("PERCEIVER_MODEL", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(warm_bin), str(BIN), os.environ["PATH"]]))
    shutil.copytree(prepared, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


def test_every_block_runs_or_says_why_not() -> None:
    for page in blocks.PAGES:
        for block in blocks.blocks(page):
            assert block.runs or re.fullmatch(r"not run: .+", block.rule), f"{page}: {block.text}"
            if copy := re.fullmatch(r"not run: it is the first block of (\S+)", block.rule):
                assert block.text == blocks.blocks(ROOT / copy[1])[0].text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_the_page_shows(place: Path, page: Path) -> None:
    for block in blocks.blocks(page):
        if block.runs:
            fresh = blocks.run_block(block, place)
            assert blocks.without_numbers(fresh) == blocks.without_numbers(block.text), fresh


@pytest.mark.parametrize("made", [make_cli, make_configuration, make_man], ids=lambda made: made.PAGE.name)
def test_pages_made_from_the_program_are_up_to_date(made: object) -> None:
    page: Callable[[], str] = made.page  # type: ignore[attr-defined]
    assert made.PAGE.read_text() == page(), f"renew it: python docs/{made.__name__.rpartition('.')[2]}.py"  # type: ignore[attr-defined]


def test_every_option_of_a_recipe_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in make_configuration.page().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows if len(row[3].strip(" |")) < 3] == []


def test_the_page_of_rooms_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "perceiver_cli").rglob("*.py"):
        if not path.name.startswith("__"):
            assert re.search(rf"`{path.stem}(\.py)?`", text), path


def test_quickstart_and_pipe_examples(tmp_path: Path, warm_bin: Path) -> None:
    done = run(["bash", ROOT / "examples" / "quickstart.sh", "demo", "--steps 25"], tmp_path, warm_bin)
    assert "Everything is in demo/" in done.stderr
    accuracy = re.search(r"test: accuracy ([\d.]+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.3
    assert done.stdout.count('"label"') >= 5
    assert (tmp_path / "demo" / "report" / "confusion.png").exists()
    piped = run(
        ["bash", ROOT / "examples" / "predict_in_a_pipe.sh", "demo/run", "demo/digits/test/1"], tmp_path, warm_bin
    )
    assert '"path": "camera"' in piped.stdout
    assert "status 3" in piped.stdout


def test_train_from_python_example(place: Path) -> None:
    script = ROOT / "examples" / "train_from_python.py"
    done = run(["python", script, "digits", "from-python", "train.steps=20"], place)
    assert "best model: from-python/model.safetensors" in done.stdout
    assert "test: 0." in done.stdout


def test_custom_modality_example(tmp_path: Path, warm_bin: Path) -> None:
    done = run(["python", ROOT / "examples" / "custom_modality.py", tmp_path], tmp_path, warm_bin)
    accuracy = re.search(r"test: accuracy ([\d.]+) of 40", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


@pytest.mark.parametrize("modality", ["image", "audio", "points", "video"])
def test_explain_examples(modality: str, tmp_path: Path, warm_bin: Path) -> None:
    done = run(["python", ROOT / "examples" / "explain.py", modality, "out", "2"], tmp_path, warm_bin)
    assert f"{modality}: " in done.stdout
    assert (tmp_path / "out" / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "out.ply").exists() == (modality == "points")


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it by their full names."""
    yield name, command
    for child in getattr(command, "commands", {}).values():
        yield from commands(f"{name} {child.name}", child)


def documented(command: Any) -> list[Any]:
    """Return a command's arguments and options, except those that Typer itself adds and describes."""
    return [each for each in command.params if each.name not in ("help", "install_completion", "show_completion")]


COMMANDS = dict(commands("perceiver", get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    section = make_cli.PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert section
    for each in documented(COMMANDS[name]):
        argument = each.param_type_name == "argument"
        for shown in [each.metavar or each.name.upper()] if argument else [*each.opts, *each.secondary_opts]:
            assert f"`{shown}`" in section


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_is_a_sentence(name: str) -> None:
    command = COMMANDS[name]
    for text in (command.help, *(each.help for each in documented(command))):
        assert re.fullmatch(r"(?!Of\b)[A-Z0-9].*\.", text or "", re.DOTALL), text


def test_the_list_of_commands_cuts_no_line(perceive: Perceive) -> None:
    listed = perceive("--help", COLUMNS="80").stdout.decode().partition("\nCommands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS["perceiver"].commands)
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []
