"""Tables on a terminal of 80 columns: names are cut, figures stay whole, no line is wider. In a pipe nothing is cut."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from perceiver_cli.cli import answers, plan, tables, terminal
from perceiver_cli.training.events import StepDone

NAMES = ("short", "a class of which the name is much longer than a terminal is wide, " * 2, "猫" * 60)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    for module in (tables, terminal):
        monkeypatch.setattr(module, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


def test_a_table_fits_a_terminal(narrow: None, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    tables.emit_table(["class", "count", "interval"], [[name, "12,345", "0.123-0.456"] for name in NAMES])
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert all(line.endswith("12,345  0.123-0.456") for line in lines[1:])
    assert max(map(cell_len, lines[1:])) <= 80
    assert "…" in lines[2]


def test_a_pipe_gets_whole_names(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    names = [*NAMES, "n" * 1200]
    tables.emit_table(["class", "count"], [[name, "1"] for name in names])
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["class", *(name.strip() for name in names)]


def test_answers_fit_a_terminal(narrow: None) -> None:
    table = answers.AnswerTable(["start_s", "end_s"])
    others = [f"class-{k} 0.12{k}" for k in range(9)]
    for name in NAMES:
        row = table.row(name, {"start_s": "1.0", "end_s": "2.0"}, name, "0.123", others)
        assert row.count("\n") == 1
        assert cell_len(row.rstrip()) <= 80
        assert "class-0 0.120" in row
        assert not row.rstrip().endswith(",")
    whole = table.row("file", {"start_s": "1.0", "end_s": "2.0"}, "label", "0.123", others, whole=True)
    assert all(other in whole for other in others)
    assert max(map(len, whole.splitlines())) <= 80


def test_facts_break_between_facts(narrow: None, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    facts = [f"figure {k} 0.1234" for k in range(9)]
    tables.emit_facts(facts, indent="  ")
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert "  ".join(line.strip() for line in lines) == "  ".join(facts)


def test_a_run_that_ends_by_time_shows_the_time_that_is_left() -> None:
    step = StepDone(7, 9, 0.1, 2.0, 1e-3, 5.0, elapsed_s=12.0)
    assert plan.done_of(step, None) == (7, 9)
    assert plan.done_of(step, 60.0) == (12.0, 60.0)
