"""The benchmarks stand above the package: they use its public names, and it knows nothing of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import benchmarks
import perceiver_cli

HERE, PACKAGE = (Path(str(module.__file__)).parent for module in (benchmarks, perceiver_cli))


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.py")), ids=lambda path: path.name)
def test_only_public_names_are_used(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = [(node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names]  # fmt: skip
    for module, name in imported:
        assert not name.startswith("_"), (module, name)
    own = {alias for module, alias in imported if str(module).startswith(("perceiver_cli", "benchmarks"))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
            assert not node.attr.startswith("_"), f"{node.value.id}.{node.attr}"


def test_the_package_imports_no_benchmark() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "benchmarks" not in path.read_text(), path
