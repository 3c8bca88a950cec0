"""Text: bytes, cuts, n-grams, and files that are no text."""

from __future__ import annotations

import numpy as np
import pytest

from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.text import MODALITY, TextSpec, hashes

SMALL = TextSpec(max_bytes=16, patch=(4,), ngrams=(3,), ngram_vectors=50)


def load(data: bytes, spec: TextSpec = SMALL, name: str = "a.txt") -> tuple[bytes, list[str]]:
    """Return the bytes of a decoded text, and the notes."""
    source = Source(name, data)
    return MODALITY.load(source, spec, Limits()).tobytes(), source.notes


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"two words\r\n", "two words"),
        (b"\xef\xbb\xbfmark", "mark"),
        ("breit ü".encode("utf-16"), "breit ü"),
        ("u\u0308ber".encode(), "über"),
        ("caf\xe9".encode("cp1252"), "café"),
    ],
)
def test_a_text_is_the_same_in_any_encoding(data: bytes, text: str) -> None:
    kept, notes = load(data)
    assert kept == text.encode()
    assert notes == (["not UTF-8: read as Windows-1252"] if b"\xe9" in data else [])


@pytest.mark.parametrize(
    ("keep", "data", "kept"),
    [
        ("head", b"one two three four five", b"one two three"),
        ("head", b"x" * 40, b"x" * 16),
        ("head", "ü".encode() * 20, "ü".encode() * 8),
        ("head", ("xé" * 20).encode(), ("xé" * 5 + "x").encode()),
        ("ends", b"firsts second third lasted", b"firsts\nlasted"),
        ("ends", "ü".encode() * 20, "üüü\nüüü".encode()),
    ],
)
def test_a_long_text_is_cut_between_words_or_characters(keep: str, data: bytes, kept: bytes) -> None:
    cut, notes = load(data, SMALL.model_copy(update={"keep": keep}))
    assert cut == kept
    assert notes == [f"kept {len(kept)} of {len(data)} bytes, see inputs.text.max_bytes"]


@pytest.mark.parametrize("data", [b"  \n ", b"\x7fELF\x00\x00", "a\x00b".encode("utf-16"), b"\xff\xfe\x00"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        load(data)


def test_a_text_over_the_limit_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(LimitError, match="text_bytes"):
        MODALITY.load(Source("a.txt", b"x" * 100), SMALL, Limits(text_bytes=99))


def test_a_file_is_text_only_if_it_is_asked_for() -> None:
    with pytest.raises(DataError):
        detected(Source("a.txt", b"some words"))
    assert detected(Source("a.txt", b"some words"), "text").kinds == ("text",)
    with pytest.raises(DataError):
        detected(Source("a.csv", b"text,label\nsome words,a\n"), "text")  # a manifest
    with pytest.raises(DataError):
        detected(Source("a.txt", b"\x00\x01\x02"), "text")


def test_inputs_are_codes_and_weights_of_bytes_and_n_grams() -> None:
    raw = np.frombuffer(b"abcdef", np.uint8)
    values = MODALITY.prepare(raw, SMALL, None).values
    layout = MODALITY.layout(SMALL)
    assert values.shape == layout.prepared_shape == (4, 16)
    codes, weights = values[:, :8], values[:, 8:]
    assert codes[0, :4].tolist() == [97, 98 + 256, 99 + 512, 100 + 768]  # a byte, in its place of the patch
    assert codes[:2, 4:].ravel()[:6].tolist() == (1024 + hashes(raw, 3) % 50).tolist()
    assert codes.max() < layout.codes == 1024 + 50
    # Two bytes of the second patch; nothing behind.
    assert weights.tolist() == [[1.0] * 8, [1, 1, 0, 0] * 2, [0.0] * 8, [0.0] * 8]


def test_n_grams_have_one_hash_anywhere_and_in_any_case() -> None:
    one, other = (hashes(np.frombuffer(text, np.uint8), 3) for text in (b"the cat", b"a big CAT"))
    assert one[-1] == other[-1]
    assert len(set(one.tolist())) == 7
    assert hashes(np.frombuffer(b"cat", np.uint8), 3).tolist() == [754392316, 1275712322, 739175806]  # models know them


def test_training_hides_some_inputs_and_never_all() -> None:
    spec = SMALL.model_copy(update={"drop": 0.9})
    raw = np.frombuffer(b"sixteen letters.", np.uint8)
    counts = []
    for seed in range(50):
        values = MODALITY.prepare(raw, spec, np.random.default_rng(seed)).values
        counts.append(int((values[:, 8:] != 0).any(axis=1).sum()))
    assert min(counts) == 1
    assert max(counts) < 4
    assert (MODALITY.prepare(raw, spec, None).values[:, 8:] == 1).all()


def test_the_training_texts_settle_the_length() -> None:
    sources = [Source("a", b"x" * size) for size in (*range(1, 99), 5000)]
    auto = TextSpec(max_bytes="auto")
    assert MODALITY.resolve(auto, sources, Limits()).max_bytes == 96
    assert MODALITY.resolve(auto, [Source("a", b"x" * 5000)], Limits()).max_bytes == 1024
    assert MODALITY.resolve(auto, [], Limits()).max_bytes == 1024
    with pytest.raises(UsageError, match="still 'auto'"):
        MODALITY.layout(auto)


def test_words_are_the_parts_of_a_text() -> None:
    raw = np.frombuffer(b"ab cdefg", np.uint8)
    parts = MODALITY.parts(raw, SMALL)
    assert parts.names == ["ab", "cdefg"]
    # The first patch is "ab c": a third of its heat is the second word's.
    assert parts.shares(np.array([0.6, 0.4, 0.0, 0.0])).tolist() == pytest.approx([0.4, 0.6])
