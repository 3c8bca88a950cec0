"""The account of a data set: what became of every path. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from perceiver_cli.errors import counted
from perceiver_cli.files import show_path

NAMED = 3  # paths that are shown for each reason
REASONS = 5  # reasons that a summary shows
FLAT = "in no class folder"


@dataclass
class Paths:
    """A number of paths, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, path: str, count: int = 1) -> None:
        """Count a path, or the `count` paths of a folder and of all that lies in it."""
        self.count += count
        if len(self.first) < NAMED:
            self.first.append(path)

    def __str__(self) -> str:
        return ", ".join(map(show_path, self.first)) + (", ..." if self.count > len(self.first) else "")


@dataclass
class Account:
    """What became of every path of a data set: each is in one of the groups below.

    paths: what `find` counts below a data folder, itself included; of a manifest the files that it names. linked: paths
    behind links to folders, which `find -L` counts too. inside: members of archives, cells of tables, records. absent:
    files that metadata names but that are not below the folder, or that it names twice.

    folders: folders, archives and tables that were listed. used: files by split. passed_over: paths by reason.
    unreadable, unlabelled: files.
    """

    paths: int = 0
    linked: int = 0
    inside: int = 0
    absent: int = 0
    folders: int = 0
    used: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, Paths] = field(default_factory=dict)
    unreadable: Paths = field(default_factory=Paths)
    unlabelled: Paths = field(default_factory=Paths)

    def pass_over(self, reason: str, path: str, count: int = 1) -> None:
        """Count a path that is not read; `reason` completes the sentence "it is ..."."""
        self.passed_over.setdefault(reason, Paths()).add(path, count)

    def add(self, other: Account) -> None:
        """Add the account of another input."""
        self.paths += other.paths
        self.linked += other.linked
        self.inside += other.inside
        self.absent += other.absent
        self.folders += other.folders
        for split, count in other.used.items():
            self.used[split] = self.used.get(split, 0) + count
        pairs = [(self.unreadable, other.unreadable), (self.unlabelled, other.unlabelled)]
        pairs += [(self.passed_over.setdefault(name, Paths()), own) for name, own in other.passed_over.items()]
        for mine, own in pairs:
            mine.count += own.count
            mine.first += own.first[: NAMED - len(mine.first)]

    def leave(self, reason: str | None, path: str) -> None:
        """Count a path without a row: passed over for a reason or, if that is None, without a label."""
        if reason is None:
            self.unlabelled.add(path)
        else:
            self.pass_over(reason, path)

    def use(self, split: str, example: str, files: Collection[str], *, fault: str | None = None) -> None:
        """Count the files of an example of a split. fault: "unreadable", "unlabelled", or why it is passed over."""
        for file in files:
            shown = example if len(files) == 1 else file
            if fault is None:
                self.used[split] = self.used.get(split, 0) + 1
            elif fault == "unreadable":
                self.unreadable.add(shown)
            else:
                self.leave(None if fault == "unlabelled" else fault, shown)

    @property
    def num_used(self) -> int:
        """The number of used files."""
        return sum(self.used.values())

    @property
    def num_passed_over(self) -> int:
        """The number of paths that were passed over."""
        return sum(paths.count for paths in self.passed_over.values())

    @property
    def found(self) -> int:
        """The number of all paths, of every kind."""
        return self.paths + self.linked + self.inside + self.absent

    @property
    def total(self) -> int:
        """The sum of the groups; it is `found`, unless a path was lost."""
        groups = self.num_used + self.num_passed_over + self.unreadable.count + self.unlabelled.count
        return self.folders + groups

    def _ranked(self) -> list[tuple[str, Paths]]:
        """Return why paths were passed over, the most common reason first."""
        return sorted(self.passed_over.items(), key=lambda pair: (-pair[1].count, pair[0]))

    def _lost(self) -> tuple[tuple[str, Paths], ...]:
        return ("unreadable", self.unreadable), ("without a label", self.unlabelled)

    def brief(self) -> list[str]:
        """Return a summary of one to three lines."""
        files = self.found - self.folders
        if not files:
            return ["there is no file"]
        if self.num_used == files:
            return [f"all {counted(files, 'file')} are used" if files > 1 else f"{counted(files, 'file')} is used"]
        reasons = [f"{paths.count:,} {reason}" for reason, paths in self._ranked()]
        reasons = reasons[:REASONS] + (["..."] if len(reasons) > REASONS else [])
        total = f"{self.num_passed_over:,}: " if len(reasons) > 1 else ""
        over = f"; passed over {total}{', '.join(reasons)}" if reasons else ""
        lines = [f"{self.num_used:,} of {counted(files, 'file')} {'is' if files == 1 else 'are'} used{over}"]
        return lines + [f"{paths.count} {word}: {paths}" for word, paths in self._lost() if paths.count]

    def lines(self) -> list[str]:
        """Return the account as lines; the numbers below the first add up to it."""
        found = f"{self.paths} paths"
        found += f", {self.linked} behind links" if self.linked else ""
        found += f", {self.inside} in archives and tables" if self.inside else ""
        found += f", {self.absent} named again or not found" if self.absent else ""
        rows = [(self.folders, "folders, archives and tables" if self.inside else "folders")]
        rows += [(count, f"used in {split}") for split, count in sorted(self.used.items())]
        rows += [(paths.count, f"passed over, {reason}: {paths}") for reason, paths in self._ranked()]
        rows += [(paths.count, f"{word}: {paths}") for word, paths in self._lost()]
        return [found, *(f"{count:>10} {text}" for count, text in rows if count)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "paths": self.paths,
            "linked": self.linked,
            "inside": self.inside,
            "absent": self.absent,
            "folders": self.folders,
            "used": dict(sorted(self.used.items())),
            "passed_over": {reason: vars(paths) for reason, paths in sorted(self.passed_over.items())},
            "unreadable": vars(self.unreadable),
            "unlabelled": vars(self.unlabelled),
        }
