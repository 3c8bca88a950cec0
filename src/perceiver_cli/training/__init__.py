"""A training run: its plan, its loop and its state on disk."""
