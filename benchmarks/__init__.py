"""Measurements of this package beside others. Run from the top of the repository; not in the wheel."""
