"""From a path to batches: list, split, decode and batch a data set."""
