"""Progress for a person who waits: a bar on a terminal, elsewhere a line at times; and what Ctrl-C prints."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from perceiver_cli.cli import terminal
from perceiver_cli.files import show_command

PLAIN_EVERY_S = 30.0  # between lines of progress where there is no terminal
BESIDE_AFTER_S, BESIDE_EVERY_S = 1.0, 0.1  # a bar beside data on a terminal: its first and its next drawing


class Counter:
    """A bar, or a line every PLAIN_EVERY_S where stderr is no terminal. Call it with how much is done, and the whole.

    beside_data: data goes to stdout meanwhile. On a terminal only calls draw such a bar, no thread does, and it is
    erased before each line of data.
    """

    def __init__(self, description: str, *, beside_data: bool = False) -> None:
        self.by_hand = beside_data and terminal.is_terminal()
        self.description = description
        self.bar = terminal.bar("{task.fields[facts]}", by_hand=self.by_hand)
        self.task = self.bar.add_task(description, total=None, facts="")
        self.began = self.said = time.monotonic()
        self.drawn = self.began + BESIDE_AFTER_S - BESIDE_EVERY_S
        if not self.by_hand:
            self.bar.start()

    def __call__(self, done: float, total: float | None = None, facts: str | None = None) -> None:
        """Show that `done` of `total` is done, with `facts` beside it [default: the rate]."""
        now, rate = time.monotonic(), done / self.seconds
        facts = f"{rate:,.{0 if rate >= 10 else 1}f}/s" if facts is None else facts
        self.bar.update(self.task, completed=done, total=total, facts=facts)
        if self.bar.disable and now - self.said > PLAIN_EVERY_S:
            self.said = now
            share = f"{done:,.0f}" if total is None else f"{done:,.0f} of {total:,.0f}"
            left = "" if total is None or rate <= 0 else f", about {terminal.clock((total - done) / rate)} left"
            terminal.say(f"{self.description}: {share}  {facts}{left}")
        elif self.by_hand and now - self.drawn > BESIDE_EVERY_S:
            self.drawn = now
            self.bar.start()
            self.bar.refresh()

    @property
    def seconds(self) -> float:
        """Seconds since it began, above 0."""
        return max(time.monotonic() - self.began, 1e-3)

    def erase(self) -> None:
        """Remove the bar from the screen, until it is drawn again."""
        self.bar.stop()


@contextmanager
def counting(
    description: str, *, beside_data: bool = False, last_words: Callable[[], Iterable[str]] = tuple
) -> Iterator[Counter]:
    """Yield a Counter for the `with`. last_words: lines for a person who ends it by Ctrl-C."""
    counter = Counter(description, beside_data=beside_data)

    def at_end() -> None:
        counter.erase()
        terminal.say_lines(last_words())

    with terminal.at_signal(at_end), terminal.before_data(counter.erase if counter.by_hand else None):
        try:
            yield counter
        finally:
            counter.erase()


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show for the `with` that a step without parts goes on, and since when."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    with terminal.drawn(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        progress.add_task(description, total=None)
        with terminal.at_signal(progress.stop):
            yield


def this_command(*more: str) -> str:
    """Return the command that runs, as it can be typed again, with more words unless they are there."""
    words = sys.argv[1:]
    return show_command(["perceiver", *words, *(word for word in more if word not in words)])
