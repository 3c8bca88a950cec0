"""Checks that take minutes, as scripts: `python -m tests.slow.scale`."""
