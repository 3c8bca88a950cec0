"""Comparisons of this package with others. Run from the top of the repository; not in the wheel."""
