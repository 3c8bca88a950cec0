"""The way of a picture from the command to the tensor: how often its file is opened, through how many files it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Run in a process of its own: an audit hook cannot be taken away again.
OPENS = """
import json, sys
opened = []
def hook(event, arguments):
    if event == "open" and arguments[0] == sys.argv[-1]:
        opened.append(event)
sys.addaudithook(hook)
from perceiver_cli.__main__ import main
sys.argv = ["perceiver", "predict", "-m", sys.argv[1], "--format", "jsonl", sys.argv[2]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(len(opened)))
"""

# At every call between the command and the model: which of our files are on the stack.
STACKS = """
import json, sys
from perceiver_cli.__main__ import main
ways = set()
def hook(frame, event, argument):
    if event != "call" or not frame.f_globals.get("__name__", "").startswith("perceiver_cli.preprocess"):
        return
    way = []
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        is_import = frame.f_code.co_name == "<module>"
        if name.startswith("perceiver_cli.") and name not in way and not is_import:
            way.append(name)
        frame = frame.f_back
    if "perceiver_cli.cli.predict" in way and not any(".model." in name for name in way):
        way = way[: way.index("perceiver_cli.cli.predict") + 1]  # not what starts the command
        ways.add(tuple(reversed(way)))
sys.setprofile(hook)
sys.argv = ["perceiver", "predict", "-m", sys.argv[1], "--format", "jsonl", sys.argv[2]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
sys.setprofile(None)
print(json.dumps(sorted(ways, key=len)))
"""


def last_line(script: str, run: Path, picture: Path) -> object:
    done = subprocess.run([sys.executable, "-c", script, run, picture], capture_output=True, text=True, check=True)
    prediction, found = done.stdout.splitlines()
    assert json.loads(prediction)["path"] == str(picture)
    return json.loads(found)


def test_the_file_of_a_picture_is_opened_at_most_twice(trained: Path, bars: Path) -> None:
    opened = last_line(OPENS, trained, next((bars / "test").rglob("*.png")))
    assert opened in (1, 2)


def test_the_way_to_a_picture_is_short(trained: Path, bars: Path) -> None:
    ways = last_line(STACKS, trained, next((bars / "test").rglob("*.png")))
    assert isinstance(ways, list)
    assert any("perceiver_cli.preprocess.image" in way for way in ways)
    assert len(ways[-1]) <= 8, ways[-1]
