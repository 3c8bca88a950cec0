"""Text: the UTF-8 bytes as the byte array, as Perceiver IO reads language (Jaegle et al. 2022, arXiv 2107.14795).

An input is one byte or a patch of neighbours: the sum of learned vectors, one for each byte and its place in the patch,
and one for each n-gram of bytes that ends there, by a hash (as in the Byte Latent Transformer, arXiv 2412.09871): a
cross-attend alone sees no order of neighbours. Inputs behind the end of a text are hidden from attention.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydantic import Field

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess import register
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Modality, Parts, Rng, check_contract
from perceiver_cli.preprocess.source import Source, probed
from perceiver_cli.preprocess.spec import InputSpec, Limits, Size


class TextSpec(InputSpec):
    """Text as UTF-8 bytes (Perceiver IO): learned vectors of bytes and of n-grams, and their position."""

    modality: Literal["text"] = "text"
    # Bytes of a text that are read; a longer one is cut. "auto": those of 95 % of the training texts, rounded up.
    max_bytes: Annotated[int, Field(ge=1, le=1 << 20)] | Literal["auto"] = 2048
    max_auto_bytes: Size = 1024  # see max_bytes
    # What is kept of a longer text: its beginning, or as much of the beginning as of the end. Words stay whole.
    keep: Literal["head", "ends"] = "head"
    embedding_channels: Size = 256  # width of the learned vectors
    # Lengths of the n-grams of bytes that have vectors too; case does not count in ASCII. Empty: bytes alone.
    ngrams: Annotated[tuple[Annotated[int, Field(ge=2, le=16)], ...], Field(max_length=8)] = ()
    ngram_vectors: Size = 1 << 14  # vectors of n-grams, which share them by a hash
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0  # training: share of inputs that are hidden


# Suffixes of tables, which are text too, but rarely meant to be read as one.
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
# UTF-32 first: its mark for little endian begins with UTF-16's.
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
NOTE_CP1252 = "not UTF-8: read as Windows-1252"
CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters that no text has; ESC colours logs
WORD = re.compile(rb"\S+")
WHOLE = 0.25  # share of the kept bytes up to which a cut moves back to the end of a word
MOST = 0.95  # share of the training texts that max_bytes = "auto" keeps whole
STEP_BYTES = 32  # max_bytes = "auto" is a multiple of it
BLANK = 32  # the byte before the first
MIXERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD))  # odd multipliers (Knuth; MurmurHash3)


class TextModality(Modality[TextSpec]):
    """Text files, and cells of a table."""

    name = "text"
    formats = "text in UTF-8, UTF-16 or Windows-1252, if it is asked for"
    suffixes = frozenset({".txt", ".text", ".md"})
    precedence = 8
    probes = 1000
    cells = ("text",)
    decides = ("max_bytes", "keep")
    preparation = (
        "NFC, line ends as LF, UTF-8; cut to max_bytes; for each patch the codes of its bytes and n-grams, then "
        "as many weights: 1, or 0 behind the end (perceiver_cli/preprocess/text.py has the hash of an n-gram)"
    )

    def sniff(self, head: bytes, name: str) -> bool:
        return False  # anything can be text: it is read if the user asks for it

    def may_read(self, head: bytes, name: str) -> bool:
        if name.lower().endswith(TABLES):
            return False
        with_mark = head.startswith(tuple(mark for mark in MARKS if mark != codecs.BOM_UTF8))
        return with_mark or CONTROLS.search(head.decode("utf-8", "replace")) is None

    def of_cells(self, cells: Sequence[tuple[str, str, Any]]) -> bytes | None:
        """Return the texts of a row, each on its own line."""
        return "\n".join(text for _, _, cell in cells if (text := as_text(cell))).encode("utf-8", "replace") or None

    def load(self, source: Source, spec: TextSpec, limits: Limits) -> Array:
        """Return the bytes (n,) uint8 of a text in UTF-8, at most `spec.max_bytes`. A cut is noted."""
        with source.open(limits) as file:
            data = file.read(limits.text_bytes + 1)
        source.check_limit(len(data), "bytes", "text_bytes", limits)
        text = unicodedata.normalize("NFC", _decoded(source, data)).replace("\r\n", "\n").strip()
        if CONTROLS.search(text):
            raise DataError(f"{source.shown}: not a text: it has control characters", "expected UTF-8")
        whole = text.encode("utf-8", "replace")
        kept = _cut(whole, spec.keep, _most(spec))
        if len(kept) < len(whole):
            source.note(f"kept {len(kept):,} of {len(whole):,} bytes, see inputs.text.max_bytes")
        return check_contract(source, np.frombuffer(kept, np.uint8), "text")

    def resolve(self, spec: TextSpec, sources: Sequence[Source], limits: Limits) -> TextSpec:
        """Return `spec` with max_bytes for `sources`, else `max_auto_bytes`. Raises DataError if no source is text."""
        if spec.max_bytes != "auto":
            return spec
        longest = spec.model_copy(update={"max_bytes": spec.max_auto_bytes})
        sizes = [spec.max_auto_bytes]
        if sources:
            sizes = list(
                probed(sources, lambda source: len(self.load(source, longest, limits)), "inputs.text.max_bytes")
            )
        enough = math.ceil(float(np.quantile(sizes, MOST)) / STEP_BYTES) * STEP_BYTES
        return spec.model_copy(update={"max_bytes": min(enough, spec.max_auto_bytes)})

    def loaded(self, spec: TextSpec) -> tuple[str, tuple[int | None, ...]]:
        return "uint8", (None,)

    def in_words(self, spec: TextSpec) -> str:
        lengths = " and ".join(filter(None, [", ".join(map(str, spec.ngrams[:-1])), *map(str, spec.ngrams[-1:])]))
        return f"{_most(spec):,} bytes" + (f" with n-grams of {lengths} bytes" if lengths else "")

    def layout(self, spec: TextSpec) -> Layout:
        """Return a grid of max_bytes // patch inputs; codes, then weights, of a patch's bytes and n-grams."""
        (patch,) = spec.patch
        slots = patch * (1 + len(spec.ngrams))
        codes = 256 * patch + (spec.ngram_vectors if spec.ngrams else 0)
        return Layout.of_grid(spec, (-(-_most(spec) // patch),), 2 * slots, stem="embed", codes=codes,
                              presence=slots, stem_channels=spec.embedding_channels)  # fmt: skip

    def prepare(self, raw: Array, spec: TextSpec, rng: Rng | None) -> ByteArray:
        """Return (M, 2 slots) float32: the codes of each input's bytes and n-grams, then their weights, 0 or 1."""
        (patch,) = spec.patch
        count = -(-_most(spec) // patch)
        size = min(len(raw), _most(spec))
        columns = [raw[:size].astype(np.int64) + 256 * (np.arange(size) % patch)]
        columns += [256 * patch + hashes(raw[:size], length) % spec.ngram_vectors for length in spec.ngrams]
        values = np.zeros((2, len(columns), count * patch), np.float32)
        values[0, :, :size], values[1, :, :size] = np.stack(columns), 1.0
        # (2, n, M p) -> (M, 2 n p)
        values = values.reshape(2, len(columns), count, patch).transpose(2, 0, 1, 3).reshape(count, 2, -1)
        if rng is not None and spec.drop:
            used = -(-size // patch)
            hidden = rng.random(used) < spec.drop
            hidden[rng.integers(used)] = False
            values[:used][hidden, 1] = 0.0
        return ByteArray(values.reshape(count, -1))

    def parts(self, raw: Array, spec: TextSpec) -> Parts:
        """Return the words."""
        (patch,) = spec.patch
        words = list(WORD.finditer(raw.tobytes()))
        owners = np.full(-(-len(raw) // patch) * patch, -1)
        for number, word in enumerate(words):
            owners[word.start() : word.end()] = number
        return Parts([word[0].decode("utf-8", "replace") for word in words], owners.reshape(-1, patch))


def as_text(cell: Any) -> str:
    """Return a cell of CSV or JSON as text without blanks around it; "" for none, or for a list or an object."""
    return "" if cell is None or isinstance(cell, list | dict) else str(cell).strip()


MODALITY = TextModality()
register(MODALITY)


def marked(data: bytes) -> str | None:
    """Return the encoding that the byte order mark of a text says, or None without a mark."""
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), None)


def _decoded(source: Source, data: bytes) -> str:
    """Return bytes as text by their mark, as UTF-8, or else as Windows-1252, which is noted."""
    encoding = marked(data) or "utf-8"
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DataError(f"{source.shown}: damaged {encoding.upper()}: {error.reason}") from error
        source.note(NOTE_CP1252)
        return data.decode("cp1252", "replace")


def _most(spec: TextSpec) -> int:
    return spec.known("max_bytes", spec.max_bytes, "bytes")


def _cut(data: bytes, keep: str, most: int) -> bytes:
    """Return at most `most` bytes of UTF-8, by `TextSpec.keep`."""
    if len(data) <= most:
        return data
    if keep == "head" or most < 4:
        return _head(data, most)
    half = (most - 1) // 2
    return _head(data, half) + b"\n" + _tail(data, half)


def _head(data: bytes, most: int) -> bytes:
    """Return the beginning of UTF-8, up to the end of a word or, within a long one, of a character."""
    end = max(data.rfind(b" ", 0, most + 1), data.rfind(b"\n", 0, most + 1))
    if end >= most * (1 - WHOLE):
        return data[:end]
    end = most
    while end and data[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return data[:end]


def _tail(data: bytes, most: int) -> bytes:
    """Return the end of UTF-8, from the beginning of a word or, within a long one, of a character."""
    first = len(data) - most
    starts = [place for blank in (b" ", b"\n") if (place := data.find(blank, first - 1)) >= 0]
    if starts and min(starts) < first + most * WHOLE:
        return data[min(starts) + 1 :]
    while first < len(data) and data[first] & 0xC0 == 0x80:
        first += 1
    return data[first:]


def hashes(data: Array, length: int) -> NDArray[np.int64]:
    """Return a hash below 2^31 of the n-gram of `length` bytes that ends at each byte (n,); ASCII case is folded."""
    folded = np.where((data >= 65) & (data <= 90), data + 32, data).astype(np.uint64)
    windows = sliding_window_view(np.concatenate([np.full(length - 1, BLANK, np.uint64), folded]), length)
    mixed = np.full(len(data), length, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(length):
            mixed = (mixed ^ windows[:, place]) * MIXERS[0]
            mixed ^= mixed >> np.uint64(29)
        mixed *= MIXERS[1]
    return (mixed >> np.uint64(33)).astype(np.int64)
