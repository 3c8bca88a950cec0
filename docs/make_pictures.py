"""Draw docs/train.svg (a run in a terminal) and docs/report.png (the report of a run): python docs/make_pictures.py

The report needs Chromium; without it only the run is drawn.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from perceiver_cli import Trainer
from perceiver_cli.cli import terminal
from perceiver_cli.cli.train import _Display
from perceiver_cli.training.events import StepDone

DOCS = Path(__file__).parent
STEPS = 240
SHOWN_STEP = 180  # the run is drawn in the middle of this step
COMMAND = f"perceiver train digits -o runs/digits --steps {STEPS}"
WIDTH, HEIGHT = 1100, 1000  # pixels of the report


def draw_run() -> None:
    """Train a model on digits/ and draw the terminal at one of the last steps."""
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True, highlight=False, markup=False)
    terminal.talk = lambda: console  # type: ignore[assignment]
    terminal.stderr_is_terminal = lambda: True
    console.print(Text(f"$ {COMMAND}", style="bold"))
    display = _Display()
    options = [f"train.steps={STEPS}", "train.eval_every='2 epochs'"]
    for event in Trainer("digits", "runs/digits", overrides=options).fit():
        display.show(event)
        if isinstance(event, StepDone) and event.step == SHOWN_STEP:
            console.print(display.bar.get_renderable())
            console.save_svg(str(DOCS / "train.svg"), title="perceiver")


def draw_report(chromium: str) -> None:
    """Evaluate the model and photograph the first screen of its report."""
    perceiver = [sys.executable, "-m", "perceiver_cli"]
    subprocess.run([*perceiver, "evaluate", "digits", "-m", "runs/digits", "-o", "report", "-q"], check=True)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
    page = Path("report", "report.html").resolve().as_uri()
    subprocess.run([chromium, *options, f"--screenshot={DOCS / 'report.png'}", page], check=True, capture_output=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        subprocess.run([sys.executable, DOCS.parent / "examples" / "write_digits.py", "digits"], check=True)
        draw_run()
        browser = shutil.which("chromium")
        if browser:
            draw_report(browser)
