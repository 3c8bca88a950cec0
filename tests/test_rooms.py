"""Who may import whom: downward only, deferred imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import perceiver_cli

ROOT = Path(perceiver_cli.__file__).parent
# Lowest first: a room imports from those before it, and never from one after it.
ORDER = [
    "errors", "files", "hardware", "malloc", "run_folder", "presets", "preprocess", "config",
    "model", "records", "data", "advice", "inference", "report", "training", "machine", "cli", "__main__",
]  # fmt: skip
RANK = {room: rank for rank, room in enumerate(ORDER)}
WITH_TORCH = ("model", "data.loader", "inference", "training", "report", "machine")
WITHOUT_TORCH = ("checkpoint", "cost", "describe")  # of the model's room: `info` answers at once


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            # `from perceiver_cli.model import kernels` names a module; `from perceiver_cli.errors import X` is in one.
            names |= {
                full if (full := f"{module}.{a.name}").removeprefix("perceiver_cli.") in MODULES else module
                for a in node.names
            }
    return names


def arrows(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    return {name.removeprefix("perceiver_cli.") for name in imported(path) if name.startswith("perceiver_cli.")}


def test_every_room_has_its_place() -> None:
    assert {room_of(module) for module in MODULES} - {""} == set(ORDER)


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_down(module: str) -> None:
    for target in arrows(MODULES[module]):
        assert RANK[room_of(target)] <= RANK[room_of(module)], f"{module} imports {target}"


def test_torch_is_imported_only_where_it_computes() -> None:
    light = [f"perceiver_cli.{m}" for m in MODULES if m and not m.startswith(WITH_TORCH)]
    light += [f"perceiver_cli.model.{m}" for m in WITHOUT_TORCH]
    script = (
        "import sys, importlib\nfor name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n    assert 'torch' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", script, *light], check=True)


def test_only_the_command_line_uses_rich_and_prints() -> None:
    for module, path in MODULES.items():
        names = {name.split(".")[0] for name in imported(path)}
        assert room_of(module) == "cli" or "rich" not in names, module
        assert "click" not in names, module
        assert "pickle" not in names, module
        if room_of(module) != "cli":
            calls = [
                n.func.id
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            ]
            assert not {"print", "exit", "input", "eval", "exec"} & set(calls), module


# ---------------------------------------------------------------- names and sizes

TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60


def test_imports_make_no_circle() -> None:
    graph = {module: arrows(path) - {module} for module, path in MODULES.items() if module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_is_read_in_one_sitting(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= MAX_FILE_LINES


def is_command(function: ast.AST) -> bool:
    """A command's signature is its documentation: each option with its help text."""
    return "typer" in ast.unparse(function.args) if isinstance(function, ast.FunctionDef) else False


def test_a_function_fits_on_a_screen() -> None:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                # Of a command only the body counts.
                first = node.body[0].lineno if is_command(node) else node.lineno
                assert (node.end_lineno or 0) - first < MAX_FUNCTION_LINES, f"{module}.{node.name}"


def test_no_class_stands_in_two_modules() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_private_names_stay_in_their_file() -> None:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("perceiver_cli"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module


# ---------------------------------------------------------------- the package


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
        "import sys; from perceiver_cli.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert 'info' in sys.argv or 'numpy' not in sys.modules, 'numpy was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
