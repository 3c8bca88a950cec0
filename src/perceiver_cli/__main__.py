"""`perceiver` and `python -m perceiver_cli`."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from perceiver_cli.cli.app import app
    from perceiver_cli.cli.terminal import guarded

    guarded(app)


if __name__ == "__main__":
    main()
