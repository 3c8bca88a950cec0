"""Tools of every measurement: a timer, peak memory, a new process for each model, and the facts about the machine."""

from __future__ import annotations

import gc
import multiprocessing
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.benchmark import Measurement, Timer

from perceiver_cli.data.workers import end_with_parent
from perceiver_cli.errors import ResourceError
from perceiver_cli.hardware import cores
from perceiver_cli.malloc import peak_bytes
from perceiver_cli.model.device import Compute

CPU = torch.device("cpu")
T = TypeVar("T")
R = TypeVar("R")


def time_calls(call: Callable[[], object], seconds: float, device: torch.device = CPU) -> Measurement:
    """Return the times of a call, repeated for `seconds` after a warm-up: `.median` and `.mean` are seconds per call.

    On a GPU each time includes the work that the call left running. The call keeps this process's threads and garbage
    collector; `Timer` alone would take one thread and no collector.
    """
    timer = Timer("call()", setup="gc.enable()", globals={"call": call, "gc": gc}, num_threads=torch.get_num_threads())
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return timer.blocked_autorange(min_run_time=seconds)


def forward_pass(call: Callable[[], object], compute: Compute) -> Callable[[], None]:
    """Return a function that runs `call` once as a forward pass, in a device's precision and without gradients."""

    def forward() -> None:
        with torch.inference_mode(), compute.autocast():
            call()

    return forward


def training_step(
    call: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], optimizer: Optimizer, compute: Compute
) -> Callable[[], None]:
    """Return a function that runs `call` in a device's precision, then the loss's backward pass and the optimiser."""

    def step() -> None:
        with compute.autocast():
            out = call()
        loss(out).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_above(base: int, compute: Compute) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, else of this process above `base`."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device)
    return peak_bytes() - base


def in_new_process(name: str, measure: Callable[[T], R], trial: T) -> R:
    """Return `measure(trial)`, called in a new process that ends with this one.

    Raises a ResourceError with `name` if the process died.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            return pool.submit(measure, trial).result()
        except BrokenProcessPool as error:
            message = f"measuring {name} died, most likely out of memory"
            raise ResourceError(message, "try a smaller model or smaller inputs") from error


def describe_machine(compute: Compute) -> dict[str, Any]:
    """Return the facts to report beside a measurement: device, cores, threads, versions."""
    name = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else platform.machine()
    facts = {"device": str(compute.device), "device_name": name, "precision": compute.precision, "cores": cores()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**facts, "threads": torch.get_num_threads(), **versions}
