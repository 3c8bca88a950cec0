"""Each rule speaks where it should and is silent elsewhere. That following it helps: tests/slow/test_advice.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from perceiver_cli.advice.base import Advice, error_of, ratio_of, some
from perceiver_cli.advice.data import after_import, after_lr_find, after_preprocess
from perceiver_cli.advice.evaluation import Measured, after_evaluation
from perceiver_cli.advice.training import Trained, after_training
from perceiver_cli.cli import terminal
from perceiver_cli.config import Config, tiny_config
from perceiver_cli.data.survey import DataFacts
from perceiver_cli.files import perceiver_command

EVEN = {"cat": 100, "dog": 100}
RISING = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.9, 0.9, 0.9]


def log(scores: list[float], losses: list[float] | None = None, every: int = 50) -> list[dict[str, Any]]:
    losses = losses or [1 - score for score in scores]
    pairs = enumerate(zip(scores, losses, strict=True), start=1)
    return [{"step": every * n, "val_accuracy": score, "val_loss": loss} for n, (score, loss) in pairs]


def trained(scores: list[float], **changes: Any) -> Trained:
    config = tiny_config(["image"]).override(changes.pop("overrides", []))
    facts = changes.pop("facts", DataFacts(EVEN, has_val=True))
    return replace(Trained("data", "runs/a", config, facts, 200, log(scores)), **changes)


def said(advice: list[Advice], words: str) -> str:
    """Return the command of the advice with these words, "" if there is none."""
    found = [each for each in advice if words in each.seen]
    return str(found[0]).rpartition(": ")[2] if found else ""


def test_a_good_run_is_evaluated_and_nothing_else() -> None:
    (only,) = after_training(trained(RISING))
    assert str(only) == "to see its mistakes: perceiver evaluate data -m runs/a -o runs/a/report"
    (only,) = after_training(trained(RISING, facts=DataFacts(EVEN, has_val=True, has_test=True)))
    assert only.seen == "to measure it on test"
    assert after_training(trained(RISING, data="-")) == []
    assert len(after_training(trained([], log=[]))) == 1  # without a validation split


@pytest.mark.parametrize(
    ("given", "words", "command"),
    [
        (trained([0.5] * 9), "no better", "perceiver lr-find data --config runs/a/config.toml"),
        (
            trained([0.5] * 3),
            "150 steps are few",
            "perceiver train --resume -o runs/a --steps 500",
        ),
        (
            trained([0.5, 0.9, 0.7, 0.9, 0.6, 0.8, 0.6, 0.9, 0.7]),
            "falls by 0.233",
            "perceiver train data --config runs/a/config.toml --lr 0.0005",
        ),
        (
            trained([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]),
            "still improving, 0.750 to 0.875",
            "perceiver train --resume -o runs/a --steps 900",
        ),
        (
            trained([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9], overrides=["train.max_time_s=60"]),
            "still improving",
            "perceiver train --resume -o runs/a --max-time 120",
        ),
        (
            trained(
                [0.6, 0.8, 0.78], facts=DataFacts({"cat": 42, "dog": 28, "emu": 1}), overrides=["train.max_time_s=60"]
            ),
            "enough for 150 steps",
            "perceiver train --resume -o runs/a --max-time 120",
        ),
        (
            trained(RISING, facts=DataFacts({"cat": 420, "dog": 10})),
            "42 times",
            "perceiver train data --config runs/a/config.toml --set data.class_weight_power=0.5",
        ),
        (
            trained(RISING, facts=DataFacts(EVEN, shared_folders=7), init_from="runs/b"),
            "7 folders are in both",
            "config.toml --init-from runs/b --set data.split=none --group-by parent",
        ),
        (trained([0.9, 1.0, 1.0]), "no copies", "perceiver lint data"),
        (trained(RISING, num_bad=3), "3 files could not be read", "perceiver lint data"),
    ],
)  # fmt: skip
def test_a_run_with_a_fault_hears_of_it(given: Trained, words: str, command: str) -> None:
    advice = after_training(given)
    assert command in said(advice, words)
    assert len(advice) <= 3
    assert advice[-1].command[1] == "evaluate"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (trained(RISING, facts=DataFacts({"cat": 420, "dog": 60})), "times the files"),
        (trained(RISING, facts=DataFacts({"cat": 420, "dog": 10}), overrides=["data.class_weight_power=0.5"]), "times"),
        (trained([0.5, 0.8, 0.83, 0.84, 0.85, 0.85, 0.86, 0.85, 0.86]), "still improving"),
        (
            trained([], log=log([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9], [1.0] * 8 + [1.2])),
            "still improving",  # validation loss rises: longer would learn by heart
        ),
        (trained([0.7, 0.72, 0.7, 0.72, 0.7, 0.72, 0.7, 0.72]), "again and again"),  # within chance on 200 examples
        (trained([0.5, 0.9, 0.6, 0.9, 0.95, 0.95, 0.95, 0.94, 0.95]), "again and again"),  # calm in the end
        (trained([0.9, 1.0, 1.0], num_val=20), "no copies"),
        (trained([0.5, 0.7, 0.8, 0.9], overrides=["train.max_time_s=60"]), "enough for"),  # 200 steps
        (trained([0.5, 0.7, 0.8]), "enough for"),  # as many steps as were asked for
        (trained([0.5, 1.0, 1.0], overrides=["train.max_time_s=60"]), "enough for"),  # nothing is left to learn
        (trained([0.5, 1.0, 1.0], num_val=4), "no better"),
    ],
)
def test_a_run_without_a_fault_does_not(given: Trained, words: str) -> None:
    assert not [each for each in after_training(given) if words in each.seen]


# ---------------------------------------------------------------- evaluation


def report(counts: dict[str, tuple[int, int, int]], **changes: Any) -> dict[str, Any]:
    """Return an evaluation of classes with (count, right, answers)."""
    rows = {
        name: {"count": count, "precision": right / answers if answers else None, "accuracy": right / max(1, count)}
        for name, (count, right, answers) in counts.items()
    }
    total = sum(count for count, _, _ in counts.values())
    facts = {
        "per_class": rows, "accuracy": sum(right for _, right, _ in counts.values()) / total, "num_examples": total,
        "ece": 0.01, "intervals_95": {"accuracy": [0.6, 0.8], "ece": [0.0, 0.02]}, "split": "test",
    }  # fmt: skip
    return facts | changes


UNEVEN = report({"cat": (60, 55, 68), "dog": (20, 15, 20), "owl": (4, 0, 0)})


def measured(figures: dict[str, Any] = UNEVEN, config: Config | None = None, **changes: Any) -> Measured:
    given = Measured(
        "data", "runs/a", config or tiny_config(["image"]), figures, "runs/a", 0.81, DataFacts(has_val=True)
    )
    return replace(given, **changes)


def test_a_class_that_is_never_answered_gets_weight() -> None:
    advice = after_evaluation(measured())
    words, mistakes = (
        "'owl' is never answered, 4 files",
        "perceiver evaluate data -m runs/a --split test -o runs/a/report",
    )
    again = "perceiver train data --config runs/a/config.toml --set data.class_weight_power="
    assert said(advice, words) == f"{again}0.5"
    assert said(advice, "to see the 14 mistakes") == mistakes
    half = tiny_config(["image"]).override(["data.class_weight_power=0.5"])
    assert said(after_evaluation(measured(config=half)), words) == f"{again}1"
    moved = after_evaluation(measured(run=None, model="x.safetensors"))
    assert said(moved, words).startswith("perceiver train data --init-from x.safetensors")
    even = measured(facts=DataFacts({"cat": 50, "dog": 50, "owl": 50}))  # training files are as many of each
    assert not said(after_evaluation(replace(measured(), facts=even.facts)), words)
    assert after_evaluation(measured(data="-")) == []


def test_a_score_far_below_validation_suggests_groups() -> None:
    low = UNEVEN | {"intervals_95": {"accuracy": [0.5, 0.7]}}
    words = "0.810 on the run's validation files, 0.833 here"
    assert "a column of a manifest" in after_evaluation(measured(low))[1].seen
    folders = DataFacts(has_val=True, shared_folders=9)
    assert said(after_evaluation(measured(low, facts=folders)), words).endswith(
        "--set data.split=none --group-by parent"
    )
    assert not said(after_evaluation(measured()), words)
    assert not said(after_evaluation(measured(low | {"split": "val"})), words)
    mix = DataFacts({"cat": 400, "dog": 10})
    even = low | {"per_class": report({"cat": (20, 20, 40), "dog": (20, 0, 0)})["per_class"]}
    assert len([each for each in after_evaluation(measured(even, facts=mix)) if "validation files" in each.seen]) == 0


def test_probabilities_that_are_off_are_calibrated() -> None:
    off = UNEVEN | {"ece": 0.2, "intervals_95": {"accuracy": [0.6, 0.9], "ece": [0.15, 0.25]}}
    words = "probabilities are off by 0.20"
    assert said(after_evaluation(measured(off)), words) == "perceiver evaluate data -m runs/a --calibrate"
    assert not said(after_evaluation(measured(off, is_calibrated=True)), words)
    assert not said(after_evaluation(measured(off, facts=DataFacts())), words)  # no validation split


def test_a_perfect_answer_needs_nothing() -> None:
    assert after_evaluation(measured(report({"cat": (5, 5, 5), "dog": (5, 5, 5)}))) == []
    assert after_evaluation(measured(has_report=True, facts=DataFacts({"cat": 5}))) == []


# ---------------------------------------------------------------- other commands


def test_records_are_read_by_the_command_that_fits() -> None:
    def command(output: str, model: str | None, *, labelled: bool) -> str:
        return " ".join(str(each) for each in after_preprocess(output, labelled=labelled, model=model))

    assert command("a.tar", None, labelled=True).endswith("perceiver train a.tar")
    assert command("s/x-%06d.tar", None, labelled=True).endswith("perceiver train 's/x-*.tar'")
    assert command("a.tar", "runs/a", labelled=True).endswith("perceiver evaluate a.tar -m runs/a")
    assert command("a.tar", "runs/a", labelled=False).endswith("perceiver predict a.tar -m runs/a")
    assert command("-", None, labelled=True) == ""
    assert command("a.tar", None, labelled=False) == ""


def test_a_range_test_that_ended_early_is_made_longer() -> None:
    command = ["perceiver", "lr-find", "data"]
    (longer,) = after_lr_find(command, 100, fell=True, fell_to_the_end=True)
    assert str(longer).endswith("perceiver lr-find data --steps 300")
    (look,) = after_lr_find(command, 100, fell=False, fell_to_the_end=False)
    assert str(look).endswith("perceiver lint data")
    (few,) = after_lr_find(command, 20, fell=False, fell_to_the_end=False)
    assert str(few).endswith("perceiver lr-find data --steps 60")
    assert after_lr_find(command, 100, fell=True, fell_to_the_end=False) == []


def test_an_imported_model_predicts_and_learns() -> None:
    assert [each.command[1] for each in after_import("m.safetensors")] == ["predict", "train"]


def test_helpers() -> None:
    assert ratio_of([10, 0, 2]) == 5.0
    assert ratio_of([3]) == 1.0
    assert some(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 more"
    assert error_of(1.0, 50) == 0.02
    assert str(Advice("look")) == "look"
    assert Advice("run", ("a b", "c")).to_dict() == {"seen": "run", "command": "'a b' c"}


def test_a_command_needs_the_plugins_of_the_one_that_advises_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "say", print)
    monkeypatch.setattr("perceiver_cli.files.plugins", ["my curve.py"])
    terminal.say_advice([Advice("look"), Advice("to train", ("perceiver", "train", "data"))])
    assert capsys.readouterr().out == "next: look\nnext: to train: perceiver train data --plugin 'my curve.py'\n"


def test_a_printed_command_names_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that trains the best run of a sweep, or goes on, did not: copied, it knew no such modality."""
    monkeypatch.setattr("perceiver_cli.files.plugins", ["my waves.py"])
    advice = Advice("to train", ("perceiver", "train", "d"))
    assert advice.to_dict()["command"] == "perceiver train d --plugin 'my waves.py'"
    typed = ("perceiver", "train", "d", "--plugin", "my waves.py")
    assert perceiver_command(typed) == "perceiver train d --plugin 'my waves.py'"
