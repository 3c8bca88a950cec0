"""What modalities share: windows of a sequence that comes in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from perceiver_cli.errors import DataError, ResourceError
from perceiver_cli.preprocess.base import cut_windows
from perceiver_cli.preprocess.source import Source, as_data_errors

SECONDS = st.integers(1, 60).map(lambda tenths: tenths / 10)


@given(st.lists(st.integers(0, 70), max_size=12), SECONDS, SECONDS)
def test_windows_are_where_they_should_be_whatever_the_blocks(blocks: list[int], window_s: float, hop_s: float) -> None:
    rate, total = 10.0, sum(blocks)
    whole = np.arange(total)
    parts = np.split(whole, np.cumsum(blocks)[:-1]) if blocks else []
    windows = list(cut_windows(parts, rate, window_s, hop_s))
    size, hop = round(window_s * rate), round(hop_s * rate)
    if total <= size:
        assert [(start, window.tolist()) for start, window in windows] == ([(0.0, whole.tolist())] if total else [])
        return
    starts = list(range(0, total - size + 1, hop))
    if total - (starts[-1] + size) > 0.1 * hop:
        starts.append(total - size)
    assert [start for start, _ in windows] == [first / rate for first in starts]
    assert all(np.array_equal(window, whole[first:][:size]) for first, (_, window) in zip(starts, windows, strict=True))


def test_hops_shorter_than_a_sample_still_go_on() -> None:
    assert [start for start, _ in cut_windows([np.arange(5)], 1.0, 3.0, 0.01)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_a_lack_of_memory_is_no_fault_of_the_file(error: Exception) -> None:
    """Else a good file would be left out of training, or stored as unreadable."""
    message = "^out of memory while decoding the picture 'a.png'; pass"
    with pytest.raises(ResourceError, match=message), as_data_errors(Source("a.png"), "picture"):
        raise error


def test_other_errors_of_a_decoder_are_the_files() -> None:
    with pytest.raises(DataError, match="cannot decode the picture"), as_data_errors(Source("a.png"), "picture"):
        raise ValueError("out of range")
