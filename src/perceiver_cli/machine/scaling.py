"""Examples a second of a training step that several processes share, and the bytes that they send to each other."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from perceiver_cli.config import load_preset
from perceiver_cli.machine.growth import layouts_of, made_up_segments
from perceiver_cli.model.describe import DEFAULT_CLASSES
from perceiver_cli.model.device import choose_compute
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.ranks import Ranks
from perceiver_cli.training.optimizer import make_optimizer
from perceiver_cli.training.sums import Node, TreeSum, nodes_of, tree_total

WARM_STEPS = 2


def scaling(
    preset: str, batch_size: int | None, seconds: float, device: str, precision: str, batches: int, ranks: Ranks
) -> dict[str, Any]:
    """Return examples a second of training steps of `batches` batches, which processes share, without reading files.

    The step has the same examples at any number of processes: `batch_size`, the preset's unless given. Raises
    UsageError if there is no such preset or device.
    """
    config = load_preset(preset)
    compute = choose_compute(ranks.device(device), precision)
    size = max(1, (batch_size or config.train.batch_size) // batches)
    layouts = layouts_of(config, None)
    model = Perceiver(config.model, layouts, DEFAULT_CLASSES).to(compute.device)
    segments = made_up_segments(layouts, size, compute.device)
    labels = torch.zeros(size, dtype=torch.long, device=compute.device)
    optimizer, parameters = make_optimizer(model, config.train), list(model.parameters())
    sum_s = 0.0

    def step() -> None:
        nonlocal sum_s
        tree = TreeSum()
        for place in ranks.share(batches):
            with compute.autocast():
                logits = model(segments)
            (cross_entropy(logits, labels) / batches).backward()  # type: ignore[no-untyped-call]
            tree.add(Node(0, place, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]))
            optimizer.zero_grad()
        begin = time.perf_counter()
        for parameter, gradient in zip(parameters, tree_total(tree, parameters, batches, ranks), strict=True):
            parameter.grad = gradient
        sum_s += time.perf_counter() - begin
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_STEPS):
        step()
    begin = time.perf_counter()
    step()
    count = int(ranks.from_first(lambda: max(2, round(seconds / max(1e-6, time.perf_counter() - begin)))))
    sum_s, begin = 0.0, time.perf_counter()
    for _ in range(count):
        step()
    ranks.meet()
    step_s = (time.perf_counter() - begin) / count
    sent = (len(nodes_of(ranks.share(batches))) + 1) * (ranks.size - 1) / ranks.size
    return {
        "processes": ranks.size,
        "examples_per_s": size * batches / step_s,
        "step_s": step_s,
        "sum_s": sum_s / count,
        "bytes_sent_per_step": round(sent * sum(p.nbytes for p in parameters)),
        "parameters": sum(p.numel() for p in parameters),
        "threads": torch.get_num_threads(),
    }
