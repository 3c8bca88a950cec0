"""One piece of advice, and the thresholds and commands that several rules share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

from perceiver_cli.files import perceiver_command, show_path

MOST = 3  # pieces of advice at the end of a command
UNEVEN = 10.0  # a class of this many times the examples of the smallest is advised about
NAMED = 3  # classes in a sentence
WEIGHTS = ("--set", "data.class_weight_power=0.5")


@dataclass(frozen=True)
class Advice:
    """What was seen, and the words of the command that follows from it; no words if there is nothing to run."""

    seen: str
    command: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.seen}: {perceiver_command(self.command)}" if self.command else self.seen

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"seen": self.seen, "command": perceiver_command(self.command) if self.command else ""}


def error_of(share: float, count: int) -> float:
    """Return the standard error of a share that was measured on `count` examples, of at least one example."""
    return max(1 / max(1, count), sqrt(max(0.0, share * (1 - share)) / max(1, count)))


def some(names: Collection[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(show_path, list(names)[:NAMED])) + more


def ratio_of(counts: Iterable[int]) -> float:
    """Return the size of the largest class divided by that of the smallest that has examples; 1 without two."""
    present = [count for count in counts if count]
    return max(present) / min(present) if len(present) > 1 else 1.0
