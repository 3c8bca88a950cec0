"""Prepared examples as a tar, in a pipe and on disk."""
