"""The package leaves the process that imports it alone; only the command line sets it up."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import perceiver_cli

UNTOUCHED = """
import os, signal, sys
def state():
    return dict(os.environ), [signal.getsignal(number) for number in signal.valid_signals()]
before = state()
import perceiver_cli
import perceiver_cli.malloc as malloc
def refuse():
    raise AssertionError("a malloc setting was changed")
malloc.keep_freed = malloc.give_back_freed = refuse
predictor = perceiver_cli.Predictor(sys.argv[1])
(prediction,) = predictor.predict([sys.argv[2]])
assert prediction.error is None
assert state() == before
"""


def test_importing_and_predicting_changes_nothing_in_the_process(trained: Path, bars: Path) -> None:
    picture = next((bars / "test").rglob("*.png"))
    subprocess.run([sys.executable, "-c", UNTOUCHED, str(trained), str(picture)], check=True)


def test_the_command_line_sets_up_its_process() -> None:
    script = (
        "import os, sys\nfrom perceiver_cli import malloc\nfrom perceiver_cli.__main__ import main\n"
        "called = []\nmalloc.keep_freed = lambda: called.append(1)\nsys.argv = ['perceiver', '--version']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert called == [1] and os.environ['GOMP_SPINCOUNT'] == '2000'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)})


def test_the_version_is_that_of_the_distribution() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perceiver_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"perceiver {perceiver_cli.__version__}\n"


def test_a_checkout_that_is_not_installed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert perceiver_cli.__version__ == "not installed"
    package = Path(str(perceiver_cli.__file__)).parent
    asking = [path.name for path in package.rglob("*.py") if 'version("perceiver-cli")' in path.read_text()]
    assert asking == ["__init__.py"]
