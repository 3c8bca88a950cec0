"""Windows joined into events."""

from __future__ import annotations

from itertools import count

import pytest

from perceiver_cli.inference.merging import merged
from perceiver_cli.inference.predictor import Prediction

CLASSES = ("cat", "dog", "noise")


def window(start_s: float, answer: str, length_s: float = 1.0, prob: float = 0.8, **more: object) -> Prediction:
    rest = (1 - prob) / (len(CLASSES) - 1)
    probs = tuple(prob if name == answer else rest for name in CLASSES)
    return Prediction("x.wav", CLASSES, probs, start_s=start_s, end_s=start_s + length_s, **more)  # type: ignore[arg-type]


def events(windows: list[Prediction], **options: float) -> list[tuple[float, float, str]]:
    return [(event.start_s, event.end_s, event.label) for event in merged(windows, **options)]


def test_neighbours_of_one_class_are_one_event() -> None:
    found = list(merged([window(s, a) for s, a in zip(count(), ("cat", "cat", "dog", "cat"), strict=False)]))
    assert [(e.start_s, e.end_s, e.label) for e in found] == [(0, 2, "cat"), (2, 3, "dog"), (3, 4, "cat")]
    assert found[0].prob == pytest.approx(0.8)
    assert found[0].to_dict() == {"path": "x.wav", "start_s": 0, "end_s": 2, "label": "cat", "prob": found[0].prob}


def test_windows_that_overlap_are_averaged_where_they_do() -> None:
    # At 1.0 to 1.5 s a sure dog and an unsure cat overlap.
    assert events([window(0, "cat", 1.5, 0.5), window(1, "dog", 1.5, 0.9)]) == [(0, 1, "cat"), (1, 2.5, "dog")]
    # A window at the end of a file begins at any time.
    halves = [window(0, "cat"), window(0.5, "cat"), window(0.7, "dog")]
    assert events(halves) == [(0, 1.5, "cat"), (1.5, 1.7, "dog")]


def test_gaps_are_bridged_and_short_events_are_left_out() -> None:
    rows = [window(n, answer) for n, answer in enumerate(("cat", "cat", "dog", "cat", "noise", "noise", "cat"))]
    assert events(rows, max_gap_s=1) == [(0, 4, "cat"), (2, 3, "dog"), (4, 6, "noise"), (6, 7, "cat")]
    assert events(rows, max_gap_s=1, min_length_s=2) == [(0, 4, "cat"), (4, 6, "noise")]
    assert events(rows, max_gap_s=2) == [(0, 7, "cat"), (2, 3, "dog"), (4, 6, "noise")]
    with_hole = [window(0, "cat"), window(3, "cat")]  # windows with pauses between them
    assert events(with_hole) == [(0, 1, "cat"), (3, 4, "cat")]
    assert events(with_hole, max_gap_s=2) == [(0, 4, "cat")]
    assert next(merged(with_hole, max_gap_s=2)).prob == pytest.approx(0.8)  # of the seconds that were heard


def test_what_is_below_min_prob_is_no_event() -> None:
    rows = [window(0, "cat", min_prob=0.6), window(1, "cat", prob=0.5, min_prob=0.6), window(2, "cat", min_prob=0.6)]
    assert events(rows) == [(0, 1, "cat"), (2, 3, "cat")]


def test_several_labels_have_events_of_their_own() -> None:
    def both(start_s: float, *probs: float) -> Prediction:
        return Prediction("x", CLASSES, probs, start_s=start_s, end_s=start_s + 1, thresholds=(0.5, 0.3, 0.5))

    rows = [both(0, 0.9, 0.1, 0), both(1, 0.8, 0.4, 0), both(2, 0.1, 0.4, 0), both(3, 0.1, 0.1, 0)]
    assert events(rows) == [(0, 2, "cat"), (1, 3, "dog")]


def test_inputs_and_their_errors_stay_apart_and_in_order() -> None:
    rows = [
        window(0, "cat"), window(1, "cat"),
        window(0, "cat"),  # the same file again
        Prediction("bad.wav", CLASSES, error="'bad.wav': cut"),
        Prediction("y.png", CLASSES, (0.8, 0.1, 0.1)),
    ]  # fmt: skip
    *two, bad, still = merged(rows)
    assert [(e.start_s, e.end_s) for e in two] == [(0, 2), (0, 1)]
    assert bad.to_dict() == {"path": "bad.wav", "error": "'bad.wav': cut"}
    assert still.error == "'y.png': no time axis, so no events"


def test_an_event_comes_as_soon_as_it_has_ended() -> None:
    taken = 0

    def stream() -> object:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield window(number, CLASSES[number % 3])

    found = merged(stream())  # type: ignore[arg-type]
    assert next(found).label == "cat"
    assert taken == 3  # the end of the first is known with the second, which ends before the third begins
