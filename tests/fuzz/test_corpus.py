"""The corpus of fuzzing: each input gives a sound value or an error of the program, as it did when it was found."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import CORPUS, TARGETS

MAX_BYTES = 200_000


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_is_answered(name: str) -> None:
    paths = sorted((CORPUS / name).iterdir())
    assert paths
    for path in paths:
        TARGETS[name](path.read_bytes())


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= MAX_BYTES
