"""Inputs in slices on two processes: `python -m tests.slow.slices FOLDER SIDE`, for a picture of SIDE x SIDE.

Up to 2,000 x 2,000 the gradients are compared with those of one process; above, a step is timed.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from perceiver_cli.config import ModelConfig
from perceiver_cli.malloc import peak_bytes
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.ranks import Ranks
from perceiver_cli.model.slices import slice_logits
from perceiver_cli.preprocess.base import Layout
from tests.training.test_ranks import as_ranks

COMPARED = 2000


def main(place: str, text: str) -> None:
    """Print the figures of both processes."""
    side = int(text)
    shutil.rmtree(place, ignore_errors=True)
    layout = Layout(grid=(side, side), channels=3, dims=2, bands=32, max_resolution=(float(side),) * 2)
    config = ModelConfig(
        num_latents=32, latent_channels=128, schedule="c0 t0 c1 t0", self_attends_per_block=1, num_self_heads=4
    )

    def fresh() -> Perceiver:
        model = Perceiver(config, {"image": layout}, 10)
        with torch.no_grad():
            model.head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        return model

    def work(ranks: Ranks) -> Any:
        rows, labels = ranks.share(side), torch.tensor([3])
        pictures = [torch.empty(1, len(ranks.share(side, r)), side, 3, dtype=torch.uint8) for r in range(ranks.size)]
        for rank, picture in enumerate(pictures):
            if side <= COMPARED or rank == ranks.rank:
                picture.random_(generator=torch.Generator().manual_seed(rank))
        model, begin = fresh(), time.perf_counter()
        logits = slice_logits(model, {"image": Segment(pictures[ranks.rank])}, {"image": rows}, ranks)
        loss, middle = cross_entropy(logits, labels), time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        facts = f"loss {loss.item():.6f}, forward {middle - begin:.1f} s, backward {end - middle:.1f} s"
        facts += f", peak {peak_bytes() / 1e9:.1f} GB"
        if side > COMPARED:
            return facts
        whole = fresh()
        cross_entropy(whole({"image": Segment(torch.cat(pictures, dim=1))}), labels).backward()
        pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters(), strict=True)]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        largest = max(float(b.abs().max()) for _, b in known)
        return f"{facts}; gradients differ by {max(float((a - b).abs().max()) for a, b in known) / largest:.1e}"

    for rank, facts in enumerate(as_ranks(2, Path(place), work)):
        print(f"{side * side:,} inputs, process {rank}: {facts}")


if __name__ == "__main__":
    main(*sys.argv[1:])
