"""From a path to batches: what a data set holds, how it is split, decoded and put together."""
