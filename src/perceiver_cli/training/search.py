"""The values that a sweep tries: a grid, random draws, or those of Optuna (extra `[sweep]`), which learns from runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import exp, log, prod
from typing import Any, Literal

import numpy as np

from perceiver_cli.config import parse_value
from perceiver_cli.errors import UsageError
from perceiver_cli.training.several import RunEntry

DEFAULT_RUNS = 10  # of a sweep whose number of runs nothing else sets
DIGITS = 3  # of a drawn number: precise enough, and short in a command
MAX_GRID = 10_000  # runs
RANGE = re.compile(r"(log|lin):([^:]+):([^:]+)")
Search = Literal["auto", "grid", "random", "tpe"]
Values = dict[str, Any]


@dataclass(frozen=True)
class Vary:
    """One option and its values: a list, or a range on a line or on a logarithmic scale."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False  # both ends are integers

    def at(self, share: float) -> Any:
        """Return the value at a share, from 0 to 1, of the list or range."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.is_log:
            value = exp(log(self.low) + share * (log(self.high) - log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.is_whole else self.short(value)

    def short(self, value: float) -> float:
        """Return a drawn number with few digits, inside the range."""
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))


def parse_vary(text: str) -> Vary:
    """Return the option and values of KEY=A,B,C or KEY=log:LOW:HIGH or KEY=lin:LOW:HIGH. Raises UsageError."""
    key, equals, rest = text.partition("=")
    key, rest = key.strip(), rest.strip()
    if not equals or not key or not rest:
        raise UsageError(f"--vary {text}: expected KEY=A,B,C or KEY=log:LOW:HIGH", "such as train.lr=log:1e-4:1e-2")
    if match := RANGE.fullmatch(rest):
        try:
            low, high = float(match[2]), float(match[3])
        except ValueError:
            raise UsageError(f"--vary {text}: LOW and HIGH of a range must be numbers") from None
        if not (low < high and (match[1] == "lin" or low > 0)):
            raise UsageError(f"--vary {text}: expected LOW below HIGH, and with log both above 0")
        whole = all(re.fullmatch(r"-?\d+", end.strip()) for end in match.groups()[1:])
        return Vary(key, (), low, high, match[1] == "log", bool(whole))
    values = tuple(parse_value(part) for part in re.split(r",(?![^\[]*\])", rest))
    return Vary(key, tuple(dict.fromkeys(values)) if all(map(_is_plain, values)) else values)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, list | dict)


def settled(search: Search, vary: Sequence[Vary], runs: int | None) -> tuple[Literal["grid", "random", "tpe"], int]:
    """Return the search and the number of runs. auto: the grid if runs cover it, else Optuna's if it is installed.

    Raises UsageError for a grid of ranges, or Optuna's search without it.
    """
    if not vary:
        raise UsageError("nothing to vary", "pass --vary KEY=A,B,C, such as --vary train.lr=log:1e-4:1e-2")
    if len({one.key for one in vary}) < len(vary):
        raise UsageError("--vary names an option twice", "give all its values at once: KEY=A,B,C")
    size = prod(len(one.values) for one in vary)  # 0 with a range
    if search == "grid" and not size:
        raise UsageError("a grid needs lists of values, not ranges", "pass --search random")
    has_optuna = find_spec("optuna") is not None
    if search == "tpe" and not has_optuna:
        raise UsageError("--search tpe needs optuna", "pip install 'perceiver-cli[sweep]', or pass --search random")
    if size > MAX_GRID and runs is None:
        raise UsageError(f"a grid of {size:,} runs, expected {MAX_GRID:,} at most", "pass --runs N")
    count = runs if runs is not None else size or DEFAULT_RUNS
    if search == "grid" or (search == "auto" and size and count >= size):
        return "grid", min(count, size)
    if search == "tpe" or (search == "auto" and has_optuna):
        return "tpe", count
    return "random", min(count, size) if size else count


def proposer(search: str, vary: Sequence[Vary], runs: int, seed: int) -> Callable[[Sequence[RunEntry]], Values | None]:
    """Return a function from the runs so far to the values of the next one; None after the last.

    Values of a grid and random draws depend only on the seed and the number of the run, so a resumed sweep is the same.
    """

    def propose(members: Sequence[RunEntry]) -> Values | None:
        place = len(members)
        if place >= runs:
            return None
        if search == "tpe":
            return _asked(vary, members, seed)
        size = prod(len(one.values) for one in vary)
        if size:
            rows = range(size) if search == "grid" else np.random.default_rng(seed).permutation(size).tolist()
            return _row(vary, rows[place]) if place < size else None
        rng = np.random.default_rng([seed, place])
        return {one.key: one.at(rng.random()) for one in vary}

    return propose


def _row(vary: Sequence[Vary], place: int) -> Values:
    """Return the values at a place of the grid; the last option changes first."""
    chosen = []
    for one in reversed(vary):
        place, index = divmod(place, len(one.values))
        chosen.append((one.key, one.values[index]))
    return dict(reversed(chosen))


def _asked(vary: Sequence[Vary], members: Sequence[RunEntry], seed: int) -> Values:
    """Return the values that Optuna's TPE proposes after the runs so far; a failed run counts as the worst."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds: dict[str, Any] = {}
    for one in vary:
        if one.values:  # by its place, because Optuna takes no lists as values
            kinds[one.key] = optuna.distributions.CategoricalDistribution(list(range(len(one.values))))
        elif one.is_whole:
            kinds[one.key] = optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.is_log)
        else:
            kinds[one.key] = optuna.distributions.FloatDistribution(one.low, one.high, log=one.is_log)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about experimental parts of Optuna
        # A new seed for each run: with one seed all first draws would be the same.
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(members)))
        for member in members:
            own = {one.key: one.values.index(v) if one.values else v for one in vary if (v := member.values[one.key])
                   is not None or one.values}  # fmt: skip
            score = 0.0 if member.score is None else member.score
            study.add_trial(optuna.trial.create_trial(params=own, distributions=kinds, value=score))
        asked = study.ask(kinds).params

    def value_of(one: Vary) -> Any:
        found = asked[one.key]
        return one.values[found] if one.values else found if one.is_whole else one.short(found)

    return {one.key: value_of(one) for one in vary}
