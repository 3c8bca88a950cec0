"""Who may import whom: downward only, deferred imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perceiver_cli

ROOT = Path(perceiver_cli.__file__).parent
# Lowest first; rooms on one line may import those before them on the same line.
ORDER = [
    "errors", "files", "memory", "config",
    "preprocess.base", "preprocess.rows", "preprocess",
    "preprocess.image", "preprocess.container", "preprocess.video", "preprocess.audio", "preprocess.points",
    "draw", "stream", "encoding", "cost",
    "kernels",
    "linear", "attention", "device", "model", "optim",
    "manifest", "folders", "pairing", "shards", "catalog", "splits", "decoding", "lint", "data",
    "intervals", "calibration", "checkpoint",
    "predict", "explain", "embeddings", "evaluate", "recipes", "records", "pretrained", "export",
    "events", "scalars", "runs", "loop", "card", "train",
    "charts", "report", "compare",
    "bench", "throughput", "peers", "contest", "lr_find", "doctor",
    "console", "completion",
    "cli",
    "__main__",
]  # fmt: skip
RANK = {room: rank for rank, room in enumerate(ORDER)}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ROOMS = {room_of(path): path for path in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            # `from perceiver_cli import console` names a room; `from perceiver_cli.data import Reader` is in one.
            names |= {f"{module}.{a.name}" if module == "perceiver_cli" else module for a in node.names}
    return names


def test_every_room_has_its_place() -> None:
    assert set(ROOMS) - {""} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_down(room: str) -> None:
    for name in imported(ROOMS[room]):
        if name.startswith("perceiver_cli."):
            target = name.removeprefix("perceiver_cli.")
            assert RANK[target] < RANK[room], f"{room} imports {target}"


@pytest.mark.parametrize(
    "room",
    [
        room
        for room in ORDER
        if room.startswith("preprocess")
        or room in ORDER[: ORDER.index("preprocess.base")]
        or room in ORDER[ORDER.index("manifest") : ORDER.index("data")]
        or room in ("cost", "draw", "stream")
    ],
)
def test_preprocessing_and_below_never_see_torch(room: str) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported(ROOMS[room]))


def test_only_the_console_uses_rich_and_prints() -> None:
    for room, path in ROOMS.items():
        names = {name.split(".")[0] for name in imported(path)}
        assert room == "console" or "rich" not in names, room
        assert "click" not in names, room
        assert "pickle" not in names, room
        if RANK.get(room, 0) < RANK["console"]:
            calls = [
                n.func.id
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            ]
            assert not {"print", "exit", "input", "eval", "exec"} & set(calls), room


def test_names_of_the_package_are_what_they_say() -> None:
    for name in perceiver_cli.__all__:
        assert getattr(perceiver_cli, name).__name__ == {"load": "load_model"}.get(name, name)
    assert perceiver_cli.__all__ == sorted(perceiver_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        perceiver_cli.nothing  # noqa: B018


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["compare", "--help"], ["presets"], ["info", "imagenet"], ["--version"]],
)
def test_light_commands_do_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from perceiver_cli.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert 'info' in sys.argv or 'numpy' not in sys.modules, 'numpy was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
