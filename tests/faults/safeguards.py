"""Break safeguards one at a time in a copy of the package, and show that the table of faults notices each.

python tests/faults/safeguards.py [NAME ...]        prints a row for each: noticed, or missed; status 1 if one is missed
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Safeguard:
    """A piece of the package that protects, what it is replaced by, and the row of the table that must fail then."""

    name: str
    file: str
    text: str
    broken: str
    row: str


FOLDED = """\
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, block.fold(block.queries(self.latents.unsqueeze(0))))
        return self._folded[1]
"""  # of a model, which forgets them; broken, they are kept beside it
SAFEGUARDS = [
    Safeguard(
        "the model's checksum is compared", "model/checkpoint.py",
        "    if actual != stated:\n", "    if False:\n", "flipped bit in a model file",
    ),
    Safeguard(
        "a record's digests are compared", "records/format.py",
        "if self.digests and digests(", "if not self.digests and digests(", "flipped bit in a tar",
    ),
    Safeguard(
        "an index's digest is compared", "records/shards.py",
        'facts.pop("digest") != _index_digest(facts, columns)', 'not facts.pop("digest")', "flipped bit in an index",
    ),
    Safeguard(
        "a file takes its name once it is whole", "files.py",
        "handle, nameless = _opened(folder, temporary)",
        "handle, nameless = _opened(folder, temporary) if new else "
        "(os.open(temporary := target, os.O_CREAT | os.O_TRUNC | os.O_RDWR), False)",
        "killed at each call of a save",
    ),
    Safeguard(
        "a file is synced before it takes its name", "files.py",
        "            os.fsync(file.fileno())\n", "", "lost power",
    ),
    Safeguard(
        "a folder that cannot be listed is an error", "data/listing.py",
        "os.walk(folder, onerror=unlisted)", "os.walk(folder)", "read-only and permission",
    ),
    Safeguard(
        "links in a run folder are refused", "run_folder.py",
        "        if (run / name).is_symlink():\n", "        if False:\n", "foreign run folders",
    ),
    Safeguard(
        "a lack of memory is not a file's fault", "preprocess/source.py",
        "if is_out_of_memory(error):", "if False:", "low memory",
    ),
    Safeguard(
        "a worker's death is noticed", "data/workers.py",
        "        with watched(processes):\n", "        if True:\n", "workers killed or stopped",
    ),
    Safeguard(
        "nothing that is not finite is saved", "training/loop.py",
        "if broken := not_finite(tensors):", "if broken := []:", "NaN",
    ),
    Safeguard(
        "folded queries are forgotten when weights may change", "model/perceiver.py",
        "self._folded, self._steady = None, ", "self._steady = ", "every logged figure",
    ),
    Safeguard(
        "a stream on stdin is spooled without a name", "records/shards.py",
        "tempfile.TemporaryFile()", 'tempfile.NamedTemporaryFile(prefix="perceiver-")', "stdin is spooled",
    ),
    Safeguard(
        "a run folder has one owner", "run_folder.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN", "concurrent runs",
    ),
]  # fmt: skip


def noticed(guard: Safeguard, folder: Path) -> str:
    """Return how the table notices that a safeguard is broken: the first failed trial; nothing if it does not."""
    copy = folder / "perceiver_cli"
    shutil.copytree(ROOT / "src" / "perceiver_cli", copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / guard.file).read_text()
    assert guard.text in source, f"{guard.name}: {guard.file} does not hold the safeguard"
    (copy / guard.file).write_text(source.replace(guard.text, guard.broken))
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.faults", guard.row]
    for sample in (["--sample"], []):  # all trials only where a few do not show it
        done = subprocess.run(
            [*command, *sample], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        failed = [line for line in done.stderr.splitlines() if ", trial " in line]
        if done.returncode and failed:
            return failed[0]
        assert done.returncode == 0, done.stderr
    return ""


def main(names: list[str]) -> int:
    """Break each safeguard in turn, print what notices it and return the exit status."""
    missed = 0
    print("| safeguard | noticed by | s |\n|---|---|---|", flush=True)
    for guard in SAFEGUARDS:
        if names and not any(name in guard.name for name in names):
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            how = noticed(guard, Path(folder))
        missed += not how
        verdict = " ".join(how.replace("|", " ").split())[:110] if how else "**missed**"
        print(f"| {guard.name} | {verdict} | {time.monotonic() - begun:.0f} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
