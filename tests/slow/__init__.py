"""Tests and scripts that take minutes: `make slow`."""
