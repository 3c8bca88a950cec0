"""The list of commands, in the order of `--help`. Each parses, calls one public function and prints the result.

torch is imported only inside the bodies that need it, so that `--help` is immediate. For the same reason no file of
commands imports `annotations` from `__future__`: Typer would compile every annotation four times.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from perceiver_cli.cli import configuration, data, models, options, predict, runs, sweep, terminal, train

app = typer.Typer(
    name="perceiver",
    help="Classify images, sound, video and point clouds with the Perceiver (Jaegle et al., 2021).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import perceiver_cli

        terminal.emit(f"perceiver {perceiver_cli.__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    terminal.begin(debug)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "evaluate": predict.evaluate,
    "predict": predict.predict,
    "explain": predict.explain,
    "preprocess": data.preprocess,
    "lint": data.lint,
    "import": models.import_weights,
    "export": models.export,
    "info": models.info,
    "compare": runs.compare,
    "sweep": sweep.sweep,
    "lr-find": train.lr_find,
    "options": configuration.show_options,
    "presets": models.presets,
    "doctor": models.doctor,
    "bench": models.bench,
}


def _with_plugins(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the option --plugin, which runs the named files first."""

    @wraps(command)
    def run(*, plugin: list[str] | None = None, **given: Any) -> None:
        if plugin:
            from perceiver_cli.preprocess.plugins import load_plugin

            for path in plugin:
                load_plugin(path)
        command(**given)

    signature = inspect.signature(command)
    added = inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=options.Plugin)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "plugin": options.Plugin}
    return run


for name, command in COMMANDS.items():
    app.command(name)(_with_plugins(command))
