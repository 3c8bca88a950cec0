"""What a process keeps and has used. Each case has a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

from perceiver_cli.malloc import check_room

FAULTS = (
    "import resource, sys\nimport numpy as np\nfrom perceiver_cli.malloc import give_back_freed, keep_freed\n"
    "keep_freed()\n{then}\nnp.ones(20 << 20, np.uint8)\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    "for _ in range(20): np.ones(20 << 20, np.uint8)\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
)

COPIES = (
    "import resource, torch\nfrom perceiver_cli.model.encoding import Segment\n"
    "from perceiver_cli.malloc import keep_freed\n"
    "keep_freed()\nsegment = Segment(torch.zeros(30 << 20, dtype=torch.uint8))\ncopy = segment.clone()\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nfor _ in range(20): copy = segment.clone()\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
)


def printed(script: str) -> int:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_is_freed_is_used_again_until_it_is_to_be_given_back() -> None:
    assert printed(FAULTS.format(then="")) < 20
    assert printed(FAULTS.format(then="give_back_freed()")) > 20 * 10  # of 2 MiB where pages are huge


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_copies_of_batches_take_turns_in_the_same_memory() -> None:
    assert printed(COPIES) < 10_000  # the second copy's, once; 20 fresh ones are 150,000


@pytest.mark.skipif(sys.platform != "linux", reason="the peak begins at the parent's elsewhere")
def test_the_peak_is_this_process_own() -> None:
    held = np.ones(300 << 20, np.uint8)
    assert printed("from perceiver_cli.malloc import peak_bytes; print(peak_bytes())") < len(held)


def test_no_room_is_a_lack_of_memory() -> None:
    check_room(1 << 20)
    with pytest.raises(MemoryError, match="no room for"):
        check_room(1 << 60)
