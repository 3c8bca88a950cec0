"""This package against other implementations of the same model: each in its own process, in turn, for several rounds.

    python -m benchmarks.contest imagenet --against usual,perceiver-pytorch --inputs 224,512

Times are medians inside a process; ratios are taken within a round, so that a machine that slows down slows both.
Memory is the process's peak above its size with torch imported and nothing built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks import peers
from benchmarks.command import report, start
from perceiver_cli.cli.options import Device, Json, Precision
from perceiver_cli.config import Config, load_preset
from perceiver_cli.errors import UsageError
from perceiver_cli.machine.growth import Spent, Trial, layouts_of, timed_call
from perceiver_cli.machine.measure import in_new_process, peak_above, time_calls
from perceiver_cli.malloc import keep_freed, peak_bytes
from perceiver_cli.model import kernels
from perceiver_cli.model.cost import latent_flops
from perceiver_cli.model.device import Compute, choose_compute

MODES = ("forward", "train")
PRODUCTS_S = 1.0  # longest timing of matrix products alone


@dataclass(frozen=True)
class Measured(Spent):
    """One contender's time and memory, and the time of the latents' matrix products alone.

    product_seconds: by PyTorch's own product, and by `kernels.product`, the fastest known here. differs: see
    `peers.Contender`.
    """

    product_seconds: tuple[float, float]
    differs: str


def measure(name: str, trial: Trial) -> Measured:
    """Return the time and memory of one contender, measured in this process."""
    base = peak_bytes()
    # Other implementations keep malloc's default settings.
    if name == "ours":
        keep_freed()  # as the command line does
    compute = choose_compute(trial.device, trial.precision)
    config = load_preset(trial.preset)
    layouts = layouts_of(config, trial.side)
    contender = peers.build(name, config.model, layouts, trial.batch, compute.device, alone=trial.alone)
    call = timed_call(trial, compute, contender.call, contender.parameters)
    seconds = time_calls(call, trial.seconds, compute.device).median
    peak = peak_above(base, compute)
    stock, fastest = (
        _product_seconds(config, trial.batch, compute, product, min(PRODUCTS_S, trial.seconds))
        for product in (_stock_product, kernels.product)
    )
    return Measured(seconds, peak, (stock, fastest), contender.differs)


def _product_seconds(
    config: Config,
    batch: int,
    compute: Compute,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seconds: float,
) -> float:
    """Return the seconds of the matrix products of all latent Transformers in one forward pass.

    The time of one latent Transformer, each product with its own weight, is multiplied by the number of runs.
    """
    model = config.model
    n, d, heads = model.num_latents, model.latent_channels, model.num_self_heads
    dtype = torch.get_autocast_dtype(compute.device.type) if compute.precision != "fp32" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=compute.device, dtype=dtype)

    x, wide = random(batch * n, d), random(batch * n, d * model.widening_factor)
    query, scores = random(n, d // heads), random(n, n)
    blocks = [
        [*(random(d, d) for _ in range(4)), random(d * model.widening_factor, d), random(d, d * model.widening_factor)]
        for _ in range(model.self_attends_per_block)
    ]

    @torch.inference_mode()
    def call() -> None:
        for *square, widen, project in blocks:
            for weight in (*square, widen):
                product(x, weight)
            product(wide, project)
            for _ in range(batch * heads):
                product(query, query)
                product(scores, query.mT)

    return time_calls(call, seconds, compute.device).median * sum(kind == "t" for kind, _ in model.steps)


def _stock_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b.mT


def contest(trial: Trial, against: Sequence[str], sides: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one row per contender and size: its time, memory, and ratios to ours of the same round.

    The row of a missing peer names its package. "usual" is measured in both its forms.

    Args:
        trial: the work of each contender; its `side` is ignored.
        against: names in `peers.NAMES`.
        sides: pixels of square images; empty for the preset's own inputs.
        rounds: processes per contender and size, in turn.

    Raises:
        UsageError: an unknown preset, peer, mode or device.
    """
    config = load_preset(trial.preset)
    if trial.mode not in MODES:
        raise UsageError(f"--mode {trial.mode}: expected forward or train")
    present = [name for name in against if peers.is_installed(name)]
    if trial.mode == "train" and "onnxruntime" in present:
        raise UsageError("--against onnxruntime --mode train: onnxruntime trains no model", "leave out --mode train")
    names = ["ours", *(form for name in present for form in (peers.FORMS if name == "usual" else (name,)))]
    choices: list[int | None] = [*sides] or [None]
    for side in choices:
        sized = replace(trial, side=side)
        measured: dict[str, list[Measured]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                measured[name].append(in_new_process(name, partial(measure, name), sized))
        total = sum(layout.num_inputs for layout in layouts_of(config, side).values())
        about = {"side": side, "inputs": total, "mode": trial.mode, "preset": trial.preset}
        flops = trial.batch * latent_flops(config.model)
        for name in names:
            yield _row(name, measured, flops, 3 if trial.mode == "train" else 1, trial.batch) | about
    for name in against:
        if name not in present:
            yield {"name": name, "differs": f"not installed: pip install {peers.EXTRAS.get(name, name)}"}


def _row(name: str, measured: Mapping[str, list[Measured]], flops: int, passes: int, batch: int) -> dict[str, Any]:
    runs, ours = measured[name], measured["ours"]
    ratios = sorted(theirs.seconds / mine.seconds for theirs, mine in zip(runs, ours, strict=True))
    return {
        "name": name,
        "seconds_per_sample": median(run.seconds for run in runs) / batch,
        "peak_mib": median(run.peak_bytes for run in runs) / 2**20,
        "time_over_ours": {"min": ratios[0], "median": median(ratios), "max": ratios[-1]},
        "memory_over_ours": median(
            theirs.peak_bytes / mine.peak_bytes for theirs, mine in zip(runs, ours, strict=True)
        ),
        # Ratios to the latent Transformers' matrix products alone; a backward pass has two more of each.
        "time_over_latent_products": median(run.seconds / (passes * run.product_seconds[0]) for run in runs),
        "time_over_fastest_products": median(run.seconds / (passes * run.product_seconds[1]) for run in runs),
        "product_gflop_per_s": flops / median(run.product_seconds[0] for run in runs) / 1e9,
        "fastest_product_gflop_per_s": flops / median(run.product_seconds[1] for run in runs) / 1e9,
        "differs": runs[0].differs,
    }


# ---------------------------------------------------------------- the command


def main(
    preset: Annotated[str, typer.Argument(help="Preset to time.")] = "tiny-image",
    against: Annotated[str, typer.Option(help=f"Some of {', '.join(peers.NAMES)}.")] = "usual",
    mode: Annotated[Literal["forward", "train"], typer.Option(help="Call to time.")] = "forward",
    inputs: Annotated[str | None, typer.Option(help="Sides of images in pixels, e.g. 224,512,1024.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Time one cross-attend alone, against usual.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Processes per contender, in turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Measure this package against other implementations at the same sizes, each in its own process.

    "usual" is the same model, but it builds the byte array and projects K and V in every cross-attend.
    """
    sides = [_side(text) for text in inputs.split(",")] if inputs else []
    names = [name.strip() for name in against.split(",")]
    trial = Trial(preset, mode, seconds, device, precision, batch_size, alone=alone)
    report(contest(trial, names, sides, rounds), choose_compute(device, precision), json)


def _side(text: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise UsageError(f"--inputs {text}: expected sides of images, such as 224,512")
    return int(text)


if __name__ == "__main__":
    start(main)
