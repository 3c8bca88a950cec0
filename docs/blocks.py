"""Find, run and renew the code blocks of README.md and docs/: `python docs/blocks.py [PAGE ...]` renews their outputs.

A comment stands before every block of sh, python and console: `<!-- run -->`, or `<!-- not run: REASON -->`. A console
block holds commands after `$ ` and what they print, errors and progress included; a line `...` stands for any lines.
The blocks of a page run in order in a folder of their own, which `prepare` fills: digits/ (labelled pictures), tones/
(labelled sounds), runs/digits and runs/tones (models). tests/test_pages.py runs them all and compares what is printed,
with any number alike.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<rule>[^\n]*) -->\n)?```(?P<language>sh|python|console)\n(?P<text>.*?)```", re.DOTALL)
ELLIPSIS = "..."
PREPARED = (
    ("python", str(ROOT / "examples" / "write_digits.py"), "digits"),
    ("python", str(ROOT / "examples" / "write_tones.py"), "tones"),
    ("perceiver", "train", "tones", "-o", "runs/tones", "--steps", "40"),
    ("perceiver", "train", "digits", "-o", "runs/digits", "--steps", "40"),  # the last run is runs/latest
)


@dataclass(frozen=True)
class Block:
    """A code block of a page. `rule` is the comment before it, `start` and `end` are where its text lies."""

    page: Path
    rule: str
    language: str
    text: str
    start: int
    end: int

    @property
    def runs(self) -> bool:
        return self.rule == "run"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of sh, python and console of a page."""
    return [
        Block(page, match["rule"] or "", match["language"], match["text"], match.start("text"), match.end("text"))
        for match in FENCE.finditer(page.read_text())
    ]


def prepare(place: Path) -> None:
    """Fill a folder with the data and the models that the blocks need."""
    for command in PREPARED:
        run(list(command), place)


def run(command: list[str], place: Path) -> str:
    """Return what a command prints, errors and progress included. Raises AssertionError if it fails."""
    done = subprocess.run(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def run_block(block: Block, place: Path) -> str:
    """Return the text of a block as it is now: a console block with fresh outputs, others as they are, once run."""
    if block.language == "python":
        run(["python", "-c", block.text], place)
    elif block.language == "sh":
        run(["bash", "-e", "-c", block.text], place)
    else:
        return "".join(
            f"$ {command}\n{shown(run(['bash', '-c', command], place), old)}" for command, old in entries(block)
        )
    return block.text


def entries(block: Block) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block with its output as the page shows it."""
    for entry in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = entry.partition("\n")
        yield command, output


def shown(output: str, old: str) -> str:
    """Return an output cut as the page cuts it: lines at the beginning and at the end, around a line `...`."""
    lines, old_lines = output.splitlines(keepends=True), old.splitlines()
    if ELLIPSIS not in old_lines:
        return output
    first = old_lines.index(ELLIPSIS)
    last = len(old_lines) - first - 1
    return "".join([*lines[:first], f"{ELLIPSIS}\n", *lines[len(lines) - last :]])


def without_numbers(text: str) -> str:
    """Return a text in which numbers, the width of columns and the marks of best steps no longer differ."""
    return re.sub(r"[ 0]+", " ", re.sub(r"\d[\d,.:]*", "0", text.replace("*", ""))).replace(" \n", "\n")


def main(pages: list[Path]) -> None:
    """Renew the outputs that the pages show."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared")
        prepared.mkdir()
        prepare(prepared)
        for number, page in enumerate(pages):
            place = shutil.copytree(prepared, Path(folder, str(number)), symlinks=True)
            text = page.read_text()
            fresh = [(block, run_block(block, place)) for block in blocks(page) if block.runs]
            for block, new in reversed(fresh):
                text = text[: block.start] + new + text[block.end :]
            page.write_text(text)
            print(f"{page}: {len(fresh)} blocks", file=sys.stderr)


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    main([Path(name).resolve() for name in sys.argv[1:]] or PAGES)
