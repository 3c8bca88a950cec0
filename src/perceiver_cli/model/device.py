"""The device and the precision of a computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from perceiver_cli.errors import UsageError
from perceiver_cli.hardware import cores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device and a precision ("fp32", "bf16" or "fp16") that it can do."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which matrix products run in the chosen precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    @property
    def default_workers(self) -> int:
        """Number of data workers: 0 on a CPU, whose cores the model needs; up to 8, one per spare core, with a GPU."""
        return 0 if self.device.type == "cpu" else min(8, max(1, cores() - 1))


def choose_compute(device: str = "auto", precision: str = "auto") -> Compute:
    """Return the Compute of a device and a precision; "auto" means the GPU if there is one, and bf16 if it can.

    Raises UsageError if the device is missing or unsupported, or for fp16 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: not a device", "expected auto, cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {device}: found {torch.cuda.device_count()} GPUs", "use --device cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {device}: no Apple GPU on this machine", "use --device cpu")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {device}: not supported", "expected auto, cpu, cuda or mps")
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and chosen.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU", "use bf16 or fp32")
    return Compute(chosen, precision)
