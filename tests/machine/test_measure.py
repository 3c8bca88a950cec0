"""How things are measured: times, and processes of their own."""

from __future__ import annotations

import gc
import os
import time

import pytest
import torch

from perceiver_cli.errors import ResourceError
from perceiver_cli.machine.measure import in_new_process, time_calls


def test_a_call_is_timed_as_a_program_would_make_it() -> None:
    seen = set()

    def call() -> None:
        seen.add((torch.get_num_threads(), gc.isenabled()))
        time.sleep(0.01)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        times = time_calls(call, 0.1)
    finally:
        torch.set_num_threads(before)
    assert seen == {(2, True)}
    assert 0.01 <= times.median < 0.1
    assert times.mean >= 0.01


def test_a_call_longer_than_the_time_is_made_twice() -> None:
    calls = []

    def call() -> None:
        calls.append(time.sleep(0.02))

    assert time_calls(call, 0.01).median >= 0.02
    assert len(calls) == 2  # one of them a warm-up


def test_a_measurement_has_a_process_of_its_own() -> None:
    with pytest.raises(ResourceError, match="measuring a model that is too large died, most likely out of memory"):
        in_new_process("a model that is too large", os._exit, 1)
    assert in_new_process("seconds", abs, -3) == 3
