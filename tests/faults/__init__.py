"""Faults injected by force: kills, full disks, flipped bits, lost power, mutants of files. `make faults` runs them all.

Each module here holds rows of one kind (`@row` in table.py), and the table says how many trials of each passed.
"""
