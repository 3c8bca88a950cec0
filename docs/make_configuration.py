"""Write docs/configuration.md from the tables of options and their comments: python docs/make_configuration.py"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from perceiver_cli import preprocess
from perceiver_cli.config import DataConfig, ModelConfig, TrainConfig
from perceiver_cli.preprocess.spec import Limits

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Written from the program's own tables by `python docs/make_configuration.py`.

A recipe is a TOML file with the tables below. `perceiver presets show NAME` prints one. Give your own with
`--config FILE`, or change one option with `--set TABLE.OPTION=VALUE`: `--set train.lr=0.002`,
`--set inputs.image.size=[96,96]`. An unknown option is an error that names the nearest one. Every run writes its recipe
to `config.toml`.

Durations are text: `"500 steps"`, `"3 epochs"`, `"5%"` of the run.
"""


def page() -> str:
    """Return the page: a table of options for each TOML table."""
    tables: list[tuple[str, type[BaseModel]]] = [("model", ModelConfig), ("train", TrainConfig), ("data", DataConfig)]
    tables += [("data.limits", Limits)]
    for name in sorted(preprocess.names()):
        spec = preprocess.spec_type(name)
        assert spec is not None
        tables.append((f"inputs.{name}", spec))
    return HEAD + "".join(_section(name, table) for name, table in tables)


def _section(name: str, table: type[BaseModel]) -> str:
    first = (table.__doc__ or "").strip().splitlines()[0]
    comments = _comments(table)
    rows = [
        f"| `{key}` | {_kind(field.annotation)} | {_default(field)} | {comments.get(key, '')} |\n"
        for key, field in table.model_fields.items()
        if key not in ("modality", "limits")
    ]
    return f"\n## [{name}]\n\n{first}\n\n| option | type | default | meaning |\n|---|---|---|---|\n{''.join(rows)}"


def _comments(table: type[BaseModel]) -> dict[str, str]:
    """Return each option's comment: the one at the end of its line, or the lines before it."""
    comments: dict[str, str] = {}
    for cls in reversed([base for base in table.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]):
        lines = inspect.getsource(cls).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign):
                comment = "".join(_comment_of(lines, node.lineno - 1, (node.end_lineno or node.lineno) - 1))
                if comment:
                    comments[node.target.id] = comment.replace("|", "\\|")  # type: ignore[union-attr]
    return comments


def _comment_of(lines: list[str], first: int, last: int) -> Iterator[str]:
    _, mark, trailing = lines[last].partition("  # ")
    if mark and not trailing.startswith("type:"):
        yield _sentence(trailing)
        return
    above: list[str] = []
    while first > 0 and lines[first - 1].strip().startswith("# "):
        first -= 1
        above.insert(0, lines[first].strip()[2:])
    if above:
        yield _sentence(" ".join(above))


def _sentence(text: str) -> str:
    text = text.split("  # type:")[0].strip()
    return (
        (text[0].upper() if text[0].islower() and not text.startswith(("tanh", "auto")) else text[0])
        + text[1:].rstrip(".")
        + "."
    )


def _kind(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(annotation) is typing.Annotated:
        return _kind(arguments[0])
    if typing.get_origin(annotation) is tuple:
        return "list of " + " and ".join(dict.fromkeys(_kind(value) for value in arguments if value is not Ellipsis))
    if arguments:
        return " or ".join(_kind(value) for value in arguments if value is not type(None))
    return {"int": "integer", "float": "number", "str": "text", "bool": "true, false"}.get(annotation.__name__, "text")


def _default(field: Any) -> str:
    if field.default in (None, PydanticUndefined):
        return "unset"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
