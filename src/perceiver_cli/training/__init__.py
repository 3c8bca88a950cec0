"""A run: its plan, its loop, its state on disk."""
