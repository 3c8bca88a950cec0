"""The rules of code blocks in README.md and docs/, the pages made from the program, and help texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from docs import blocks, make_cli, make_configuration, make_man
from perceiver_cli.cli.app import app
from tests.conftest import Perceive

ROOT = Path(__file__).parent.parent


def test_every_block_runs_or_says_why_not() -> None:
    for page in blocks.PAGES:
        for block in blocks.blocks(page):
            assert block.runs or re.fullmatch(r"not run: .+", block.rule), f"{page}: {block.text}"
            if copy := re.fullmatch(r"not run: it is the first block of (\S+)", block.rule):
                assert block.text == blocks.blocks(ROOT / copy[1])[0].text


@pytest.mark.parametrize("made", [make_cli, make_configuration, make_man], ids=lambda made: made.PAGE.name)
def test_pages_made_from_the_program_are_up_to_date(made: object) -> None:
    page: Callable[[], str] = made.page  # type: ignore[attr-defined]
    assert made.PAGE.read_text() == page(), f"renew it: python docs/{made.__name__.rpartition('.')[2]}.py"  # type: ignore[attr-defined]


def test_pictures_of_pages_exist_and_the_gallery_is_small() -> None:
    for page in blocks.PAGES:
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / path).is_file(), f"{page}: {path}"
    pictures = [*(ROOT / "docs" / "gallery").iterdir(), *(ROOT / "docs").glob("explain-*.jpg")]
    assert sum(file.stat().st_size for file in pictures) < 600_000
    assert not [
        file for file in pictures if file.suffix == ".svg" and "url(" in re.sub(r"url\(#", "", file.read_text())
    ]


def test_every_option_of_a_recipe_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in make_configuration.page().splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows if len(row[3].strip(" |")) < 3] == []


def test_the_page_of_rooms_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "perceiver_cli").rglob("*.py"):
        if not path.name.startswith("__"):
            assert re.search(rf"`{path.stem}(\.py)?`", text), path


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it by their full names."""
    yield name, command
    for child in getattr(command, "commands", {}).values():
        yield from commands(f"{name} {child.name}", child)


def documented(command: Any) -> list[Any]:
    """Return a command's arguments and options, except hidden ones and those that Typer itself adds and describes."""
    of_typer = ("help", "install_completion", "show_completion")
    return [each for each in command.params if each.name not in of_typer and not getattr(each, "hidden", False)]


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
