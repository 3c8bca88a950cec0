"""The command `options`: every option of a recipe with its meaning, read from the tables that validate it."""

import ast
import difflib
import inspect
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perceiver_cli.cli import completion, options
from perceiver_cli.cli.tables import emit_facts
from perceiver_cli.cli.terminal import emit, emit_json, wrapped
from perceiver_cli.errors import UsageError
from perceiver_cli.files import show_text

if TYPE_CHECKING:
    from pydantic import BaseModel

    from perceiver_cli.config import Config

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}  # pydantic's names


@dataclass(frozen=True)
class Option:
    """One option of a recipe. key: as in --set; kind: its type and limits in words; default: None if it is unset."""

    key: str
    kind: str
    default: Any
    meaning: str


def show_options(
    word: Annotated[str | None, typer.Argument(help="Show only options with this word [default: all].")] = None,
    run: Annotated[
        str | None, typer.Option(autocompletion=completion.models, help="Show the values of this run or model file.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Explain the options of a recipe. To change one: --set KEY=VALUE.

    --run shows the values of a run, and who chose each: the default, the preset, the data or the user.
    """
    chosen = {} if run is None else values_of(run)
    every = [option for option in all_options() if run is None or option.key in chosen]
    rows = [option for option in every if word is None or _names(option, word.lower())]
    if not rows:
        near = difflib.get_close_matches(
            str(word), [option.key.rpartition(".")[2] for option in every], n=1, cutoff=0.5
        )
        advice = f"did you mean {near[0]}" if near else "perceiver options lists all"
        raise UsageError(f"no option has the word {word}", advice)
    if json:
        facts = [vars(option) for option in rows]
        if chosen:
            facts = [row | {"value": chosen[row["key"]][0], "from": chosen[row["key"]][1]} for row in facts]
        emit_json({"options": facts})
        return
    for option in rows:
        value, who = chosen.get(option.key, (option.default, "default"))
        emit_facts([f"{option.key} = {show_text(shown(value))}", f"({who}; {option.kind})"], indent="    ")
        emit(f"{wrapped(option.meaning, '    ')}\n")


def _names(option: Option, word: str) -> bool:
    return word in option.key.lower() or word in option.meaning.lower()


def values_of(run: str) -> dict[str, tuple[Any, str]]:
    """Return each option's value in a run, and who chose it: "default", "preset NAME", "data" or "user"."""
    from perceiver_cli.config import load_preset, tiny_config
    from perceiver_cli.model.checkpoint import read_info
    from perceiver_cli.presets import preset_names
    from perceiver_cli.run_folder import find_model

    config = read_info(find_model(run)).config
    named = f"preset {config.name}"
    if config.name in preset_names():
        given = flat(load_preset(config.name))
    elif config.name.startswith("tiny-"):  # a combination of tiny presets
        given = flat(tiny_config(config.inputs))
    else:
        given, named = {}, "user"
    own, chosen = flat(config), {}
    for option in all_options():
        if option.key in own:
            value, preset = own[option.key], given.get(option.key, option.default)
            who = "default" if value == option.default else named if value == preset else "user"
            chosen[option.key] = value, "data" if preset == "auto" and value != preset else who
    return chosen


def flat(config: "Config") -> dict[str, Any]:
    """Return the values of a configuration by key, such as "train.lr"."""
    tables = config.to_dict()
    sections = {name: tables[name] for name in ("model", "train", "data")}
    sections["data.limits"] = sections["data"].pop("limits")
    sections |= {f"inputs.{name}": table for name, table in tables["inputs"].items()}
    return {f"{name}.{key}": value for name, table in sections.items() for key, value in table.items()}


def all_options() -> list[Option]:
    """Return every option, in the order of the tables."""
    from perceiver_cli.config import option_tables

    return [option for name, table in option_tables().items() for option in options_of(name, table)]


def options_of(name: str, table: "type[BaseModel]") -> list[Option]:
    """Return the options of one table; their meanings are the comments in its source."""
    from pydantic_core import PydanticUndefined, to_jsonable_python

    from perceiver_cli.config import NOT_OPTIONS

    comments = _comments(table)
    rows = []
    for key, field in table.model_fields.items():
        if key not in NOT_OPTIONS:
            default = None if field.default is PydanticUndefined else to_jsonable_python(field.default)
            kind = " ".join(filter(None, (_kind(field.annotation), _bounds(field.metadata))))
            rows.append(Option(f"{name}.{key}", kind, default, comments.get(key, "")))
    return rows


def shown(value: Any) -> str:
    """Return a value as in --set; "unset" for None."""
    if value is None:
        return "unset"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comments(table: "type[BaseModel]") -> dict[str, str]:
    """Return each option's comment: the one at the end of its line, or the lines before it."""
    from pydantic import BaseModel

    comments: dict[str, str] = {}
    for cls in reversed([base for base in table.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]):
        lines = inspect.getsource(cls).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign):
                comment = "".join(_comment_of(lines, node.lineno - 1, (node.end_lineno or node.lineno) - 1))
                if comment:
                    comments[node.target.id] = comment  # type: ignore[union-attr]
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
    keep = text.startswith(("tanh", "auto")) or not text[0].islower()
    return (text[0] if keep else text[0].upper()) + text[1:].rstrip(".") + "."


def _kind(annotation: Any) -> str:
    """Return a type in words, with its limits."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin is typing.Annotated:
        return " ".join(filter(None, (_kind(arguments[0]), _bounds(arguments[1:]))))
    if origin is tuple:
        return "list of " + " and ".join(dict.fromkeys(_kind(value) for value in arguments if value is not Ellipsis))
    if origin is dict:
        return "table"
    if arguments:
        return " or ".join(_kind(value) for value in arguments if value is not type(None))
    return {"int": "integer", "float": "number", "str": "text", "bool": "true, false"}.get(annotation.__name__, "text")


def _bounds(metadata: Iterable[Any]) -> str:
    """Return the limits in the metadata of a type, such as ">= 0, < 1"."""
    found: dict[str, Any] = {}
    for each in metadata:
        for limits in (each, *getattr(each, "metadata", ())):  # pydantic's Field holds them in its own metadata
            found |= {name: getattr(limits, name) for name in BOUNDS if getattr(limits, name, None) is not None}
    return ", ".join(f"{BOUNDS[name]} {found[name]}" for name in BOUNDS if name in found)
