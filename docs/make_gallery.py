"""Make the pictures of docs/gallery.md: `python docs/make_gallery.py [terminal|report|plots|explain ...]`, else all.

Terminals are what commands print on a pseudo-terminal, as SVG. Pages need Chromium and are left out without it. The
explanations train five small models, which takes some ten minutes on two cores.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

DOCS = Path(__file__).parent
GALLERY = DOCS / "gallery"
EXAMPLES = DOCS.parent / "examples"
THEMES = {
    "light": TerminalTheme(
        (255, 255, 255), (30, 30, 30),
        [(0, 0, 0), (205, 49, 49), (0, 128, 0), (148, 120, 0), (4, 81, 165), (188, 5, 188), (5, 120, 150),
         (85, 85, 85)],
    ),
    "dark": TerminalTheme(
        (12, 12, 12), (204, 204, 204),
        [(12, 12, 12), (231, 72, 86), (22, 198, 12), (249, 241, 165), (59, 120, 255), (180, 0, 158), (97, 214, 214),
         (242, 242, 242)],
    ),
}  # fmt: skip
# No font is loaded: a page of documentation asks no other host for anything.
SVG = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
TRAIN = "perceiver train digits -o runs/{name} --steps {steps} --set train.eval_every='2 epochs' {more}"
SCREENS = (  # name, columns, command
    ("train", 80, TRAIN.format(name="plain", steps=100, more="--lr 0.004")),
    ("train", 120, TRAIN.format(name="short", steps=60, more="--lr 0.004 --seed 1")),
    *(
        (name, columns, command)
        for columns in (80, 120)
        for name, command in (
            ("predict", "perceiver predict digits/test/3/0*5.png -m runs/plain"),
            ("compare", "perceiver compare runs/plain runs/short"),
            ("lint", "perceiver lint digits --labels runs/plain"),
        )
    ),
    ("evaluate", 80, "perceiver evaluate digits -m runs/plain"),
    ("options", 80, "perceiver options crop"),
    ("info", 80, "perceiver info runs/plain"),
)
LIVE = re.compile(r"training ━.* ([67]\d)%")  # the bar of a run in the middle
PHONE, DESKTOP = 390, 1280
REPORT_HEIGHTS = {DESKTOP: 1500, PHONE: 1500}
SHOWN_WIDTH, SHOWN_PAGE = 640, 480  # pixels of a picture in the gallery, and of a tall page of explain
ENDS = ("in May", "by the sea", "on Sunday", "at noon", "last year", "with friends")
TEXTS = {
    "praise": ("a lovely meal", "warm bread and kind people", "we loved the soup", "fresh fish, lovely view"),
    "complaint": ("a cold meal", "stale bread and rude people", "we hated the soup", "old fish, awful view"),
}


class Screen:
    """The rows of a terminal as rich writes to it: whole rows are erased and written again."""

    def __init__(self) -> None:
        self.rows, self.place, self.rest = [""], 0, ""

    def write(self, text: str) -> None:
        """Apply text and control sequences."""
        parts = re.split(r"(\x1b\[\??[\d;]*[A-Za-z]|\n|\r)", self.rest + text)
        self.rest = parts.pop()
        cut = self.rest.rfind("\x1b")
        if cut < 0:
            parts.append(self.rest)
            self.rest = ""
        for part in parts:
            if part == "\n":
                self.place += 1
                self.rows += [""] * (self.place == len(self.rows))
            elif part.endswith("A") and part.startswith("\x1b["):
                self.place = max(0, self.place - int(part[2:-1] or 1))
            elif part == "\x1b[2K":
                self.rows[self.place] = ""
            elif part != "\r" and not part.startswith("\x1b[?"):
                self.rows[self.place] += part

    def text(self) -> str:
        """Return all rows with their colours."""
        return "\n".join(self.rows).rstrip()


def screens(command: str, columns: int) -> Iterator[str]:
    """Yield what a command has printed so far on a terminal, each time that it prints more."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    words = shlex.split(command)
    files = [str(name) for word in words for name in (sorted(Path().glob(word)) if "*" in word else [word])]
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "PERCEIVER_MODEL")}
    process = subprocess.Popen(
        [sys.executable, "-m", "perceiver_cli", *files[1:]], stdin=terminal, stdout=terminal, stderr=terminal,
        env=environment | {"TERM": "xterm-256color"}, close_fds=True,
    )  # fmt: skip
    os.close(terminal)
    screen = Screen()
    try:
        while data := os.read(main, 1 << 16):
            screen.write(data.decode("utf-8", "replace"))
            yield screen.text()
    except OSError:  # Linux: the process has closed the terminal
        pass
    finally:
        os.close(main)
    if process.wait():
        raise SystemExit(f"{command} ended with {process.returncode}:\n{screen.text()}")


def save_screen(name: str, command: str, columns: int, printed: str) -> None:
    """Write a terminal as an SVG for each theme."""
    shown = Text.from_ansi(f"\x1b[1m$ {command.strip()}\x1b[0m\n{printed}")
    for theme, colours in THEMES.items():
        console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, highlight=False)
        for line in shown.split("\n", allow_blank=True):
            for piece in line.divide(range(columns, len(line), columns)):  # as a terminal wraps: anywhere
                console.print(piece, no_wrap=True, crop=False)
        path = GALLERY / f"{name}-{columns}-{theme}.svg"
        console.save_svg(str(path), title="", theme=colours, code_format=SVG, unique_id=path.stem)


def terminals() -> None:
    """Run the commands; draw what they print, and a run while it trains."""
    for name, columns, command in SCREENS:
        last = live = ""
        for last in screens(command, columns):
            live = last if LIVE.search(Text.from_ansi(last).plain) else live
        save_screen(name, command, columns, last)
        if live:
            save_screen(f"{name}-live", command, columns, live)


def run(*words: str | Path) -> None:
    """Run a command of this program."""
    subprocess.run([sys.executable, "-m", "perceiver_cli", *words], check=True)


def models() -> None:
    """Train the model of the pages and plots unless `terminals` has."""
    if not Path("runs/plain").exists():
        run("train", "digits", "-o", "runs/plain", "--steps", "100", "--lr", "0.004", "-q")


def shrunk(picture: Image.Image, path: Path) -> None:
    """Write a picture in the gallery's width: as JPEG, or as PNG of a few colours."""
    most = SHOWN_PAGE if path.suffix == ".jpg" else SHOWN_WIDTH
    if picture.width > most:
        picture = picture.resize((most, round(picture.height * most / picture.width)), Image.Resampling.LANCZOS)
    if path.suffix == ".jpg":
        picture.convert("RGB").save(path, quality=60, optimize=True, progressive=True)
    else:
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def photograph(page: Path, width: int, theme: str) -> Image.Image:
    """Return the beginning of a page as Chromium shows it at a width; its own windows are 500 pixels wide at least."""
    height = REPORT_HEIGHTS[width]
    frame = Path("frame.html").resolve()
    frame.write_text(
        f"<body style='margin:0'><iframe src='{page.resolve().as_uri()}' width={width} height={height} frameborder=0>"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    size = f"--window-size={max(500, width)},{height}"
    chromium = ["chromium", *options, *dark, size, "--screenshot=frame.png", frame.as_uri()]
    subprocess.run(chromium, check=True, capture_output=True)
    return Image.open("frame.png").crop((0, 0, width, height))


def reports() -> None:
    """Photograph the report of an evaluation and the page of suspect labels, if there is a browser."""
    models()
    run("evaluate", "digits", "-m", "runs/plain", "-o", "report", "-q")
    run("lint", "digits", "--labels", "runs/plain", "-o", "labels.html", "-q")
    if shutil.which("chromium") is None:
        print("no chromium: the pages are not drawn", file=sys.stderr)
        return
    for theme in THEMES:
        for width in REPORT_HEIGHTS:
            picture = photograph(Path("report/report.html"), width, theme)
            shrunk(picture, GALLERY / f"report-{width}-{theme}.png")
    shrunk(photograph(Path("labels.html"), DESKTOP, "light").crop((0, 0, DESKTOP, 900)), GALLERY / "labels.png")


def plots() -> None:
    """Draw the plots of lr-find and compare, and a confusion matrix."""
    models()
    if not Path("runs/short").exists():
        run("train", "digits", "-o", "runs/short", "--steps", "60", "--lr", "0.004", "--seed", "1", "-q")
    run("evaluate", "digits", "-m", "runs/short", "-o", "short", "-q")
    run("lr-find", "digits", "-o", "lr-find.png")
    run("compare", "runs/plain", "runs/short", "-o", "compare.png")
    for name in ("lr-find", "compare"):
        shrunk(Image.open(f"{name}.png"), GALLERY / f"{name}.png")
    shrunk(Image.open("short/confusion.png"), GALLERY / "confusion.png")


def explanations() -> None:
    """Explain a picture, a sound, a cloud and a film of examples/explain.py, and a text."""
    for modality in ("image", "audio", "points", "video"):
        if not Path(modality, "out.png").exists():
            subprocess.run([sys.executable, EXAMPLES / "explain.py", modality, modality], check=True)
        shrunk(Image.open(f"{modality}/out.png"), DOCS / f"explain-{modality}.jpg")
    with open("texts.csv", "w", newline="") as file:
        rows = [(f"{words}, {end}", label) for label, own in TEXTS.items() for words in own for end in ENDS]
        csv.writer(file).writerows([("review", "label"), *rows])
    run("train", "texts.csv", "--column", "review=text", "-o", "runs/texts", "--steps", "60", "-q")
    run("explain", "--row", "review=stale bread and a lovely view, by the sea", "-m", "runs/texts", "-o", "text.png")
    shrunk(Image.open("text.png"), DOCS / "explain-text.jpg")


PARTS = {"terminal": terminals, "report": reports, "plots": plots, "explain": explanations}

if __name__ == "__main__":
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(os.environ.get("GALLERY_PLACE", folder))  # a folder that is kept spares the training of a second try
        if not Path("digits").exists():
            subprocess.run([sys.executable, EXAMPLES / "write_digits.py", "digits"], check=True)
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
    pages = (DOCS / "gallery.md").read_text() + (DOCS.parent / "README.md").read_text()
    for file in GALLERY.iterdir():
        if file.name not in pages:
            file.unlink()
    print(f"{sum(file.stat().st_size for file in GALLERY.iterdir()):,} bytes in {GALLERY}", file=sys.stderr)
