"""Write docs/configuration.md from the tables of options and their comments: python docs/make_configuration.py"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from perceiver_cli.cli.configuration import Option, options_of, shown
from perceiver_cli.config import option_tables

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

Written from the program's own tables by `python docs/make_configuration.py`. `perceiver options WORD` shows the same on
a terminal; `perceiver options --run RUN` shows the values of a run, and who chose each.

A recipe is a TOML file with the tables below. `perceiver presets NAME` prints one. Give your own with
`--config FILE`, or change one option with `--set TABLE.OPTION=VALUE`: `--set train.lr=0.002`,
`--set inputs.image.size=[96,96]`. An unknown option is an error that names the nearest one. Every run writes its recipe
to `config.toml`.

Durations are text: `"500 steps"`, `"3 epochs"`, `"5%"` of the run.
"""


def page() -> str:
    """Return the page: a table of options for each TOML table."""
    return HEAD + "".join(_section(name, table) for name, table in option_tables().items())


def _section(name: str, table: type[BaseModel]) -> str:
    first = (table.__doc__ or "").strip().splitlines()[0]
    rows = "".join(map(_row, options_of(name, table)))
    return f"\n## [{name}]\n\n{first}\n\n| option | type | default | meaning |\n|---|---|---|---|\n{rows}"


def _row(option: Option) -> str:
    default = "unset" if option.default is None else f"`{shown(option.default)}`"
    meaning = option.meaning.replace("|", "\\|")
    return f"| `{option.key.rpartition('.')[2]}` | {option.kind} | {default} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
