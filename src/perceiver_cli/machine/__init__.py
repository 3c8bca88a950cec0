"""Versions, self-tests and speed on this machine."""
