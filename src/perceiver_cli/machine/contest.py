"""Side-by-side measurements: each contender in a process of its own, in turn, several rounds.

Times are medians inside a process; ratios are made within a round, so that a machine that slows down slows both.
Memory is the process's peak above what it was with torch imported and nothing built.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from perceiver_cli.config import Config, load_preset
from perceiver_cli.data.workers import end_with_parent
from perceiver_cli.errors import ResourceError, UsageError
from perceiver_cli.machine import peers
from perceiver_cli.machine.speed import machine
from perceiver_cli.malloc import peak_bytes
from perceiver_cli.model import kernels
from perceiver_cli.model.cost import latent_flops
from perceiver_cli.model.device import Compute, choose, find
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.base import Layout

USUAL = ("usual (einsum)", "usual (SDPA)")
MODES = ("forward", "train")
GROWTH_INPUTS = tuple(2**power for power in range(12, 21, 2))  # squares: 64 x 64 to 1024 x 1024
SLOPE_FROM = 2**14


@dataclass(frozen=True)
class Job:
    """One measurement in one process.

    mode "train": forward, cross-entropy (or a sum, of a cross-attend alone), backward and a plain SGD step.
    """

    name: str
    preset: str
    side: int | None
    mode: str
    alone: bool
    batch: int
    seconds: float
    device: str
    precision: str


@dataclass(frozen=True)
class Measured:
    """seconds of a call, bytes at the peak, seconds that the latents' matrix products alone take, what differs.

    product_seconds: by PyTorch's own products, and by the fastest that are known here (`kernels.product`).
    """

    seconds: float
    peak_bytes: int
    product_seconds: tuple[float, float]
    differs: str


def layouts_of(config: Config, side: int | None) -> dict[str, Layout]:
    """Return the layouts of a preset, of images with another side where one is given."""
    specs = {name: settled(spec) for name, spec in config.inputs.items()}
    if side is not None:
        if set(specs) != {"image"}:
            raise UsageError(f"--inputs {side}: sides of images, but {config.name} reads {'+'.join(specs)}")
        specs = {"image": specs["image"].model_copy(update={"size": (side, side)})}
    return {name: modality(spec.modality).layout(spec) for name, spec in specs.items()}


def measure(job: Job) -> Measured:
    """Return what one contender takes, in this process."""
    base = peak_bytes()
    # Others run as they are written: malloc's own settings are part of that.
    compute = (choose if job.name == "ours" else find)(job.device, job.precision)
    config = load_preset(job.preset)
    layouts = layouts_of(config, job.side)
    contender = peers.build(job.name, config.model, layouts, job.batch, compute.device, alone=job.alone)
    if job.mode == "train":
        call = _training_step(contender, job.batch, compute, alone=job.alone)
    else:

        def call() -> None:
            with torch.inference_mode(), compute.autocast():
                contender.call()

    seconds = _median_seconds(call, job.seconds, compute)
    peak = torch.cuda.max_memory_allocated() if compute.device.type == "cuda" else peak_bytes() - base
    stock, fastest = (
        _product_seconds(config, job.batch, compute, product, min(1.0, job.seconds))
        for product in (_stock_product, kernels.product)
    )
    return Measured(seconds, peak, (stock, fastest), contender.differs)


def _training_step(contender: peers.Contender, batch: int, compute: Compute, *, alone: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in contender.parameters if p.requires_grad], lr=1e-6)
    labels = torch.zeros(batch, dtype=torch.long, device=compute.device)

    def step() -> None:
        with compute.autocast():
            out = contender.call()
        (out.float().sum() if alone else F.cross_entropy(out.float(), labels)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _median_seconds(call: Callable[[], None], seconds: float, compute: Compute) -> float:
    """Return the median of as many calls as fit, one at least, after one that is not counted."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        _wait(compute)
        begin = time.perf_counter()
        call()
        _wait(compute)
        times.append(time.perf_counter() - begin)
    return median(times)


def _product_seconds(
    config: Config,
    batch: int,
    compute: Compute,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seconds: float,
) -> float:
    """Return what the matrix products of all latent Transformers of one forward take here, and nothing else of them.

    Those of one latent Transformer, with as many distinct weights as it has, times how often one runs.
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

    return _median_seconds(call, seconds, compute) * sum(kind == "t" for kind, _ in model.steps)


def _stock_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b.mT


def _wait(compute: Compute) -> None:
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)


def run(job: Job) -> Measured:
    """Return `measure(job)` from a fresh process.

    Raises:
        ResourceError: the process died, most likely for want of memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool as error:
            raise ResourceError(
                f"measuring {job.name} died, most likely for want of memory", "try smaller --inputs"
            ) from error


# ---------------------------------------------------------------- against peers


def contest(
    preset: str, against: Sequence[str], mode: str, sides: Sequence[int], batch: int, rounds: int, seconds: float,
    device: str, precision: str, *, alone: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield one row per contender and size: its time, memory, and ratios to ours of the same round.

    A peer that is not installed gives a row that says so. "usual" is measured in both its forms; its ratio is that of
    the faster one.

    Raises:
        UsageError: an unknown preset, peer, mode or device.
    """
    config = load_preset(preset)
    if mode not in MODES:
        raise UsageError(f"--mode {mode}: expected forward or train")
    present = [name for name in against if peers.is_installed(name)]
    if mode == "train" and "onnxruntime" in present:
        raise UsageError("--against onnxruntime --mode train: it runs models and trains none", "leave out --mode train")
    choices: list[int | None] = [*sides] or [None]
    for side in choices:
        names = ["ours", *(form for name in present for form in (USUAL if name == "usual" else (name,)))]
        jobs = {name: Job(name, preset, side, mode, alone, batch, seconds, device, precision) for name in names}
        found: dict[str, list[Measured]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                found[name].append(run(jobs[name]))
        total = sum(layout.num_inputs for layout in layouts_of(config, side).values())
        about = {"side": side, "inputs": total, "mode": mode, "preset": preset}
        flops = batch * latent_flops(config.model)
        for name in names:
            yield _row(name, found, flops, 3 if mode == "train" else 1, batch) | about
    for name in against:
        if name not in present:
            yield {"name": name, "differs": f"not installed: pip install {peers.EXTRAS.get(name, name)}"}


def _row(name: str, found: Mapping[str, list[Measured]], flops: int, passes: int, batch: int) -> dict[str, Any]:
    runs, ours = found[name], found["ours"]
    ratios = sorted(theirs.seconds / mine.seconds for theirs, mine in zip(runs, ours, strict=True))
    return {
        "name": name,
        "seconds_per_sample": median(run.seconds for run in runs) / batch,
        "peak_mib": median(run.peak_bytes for run in runs) / 2**20,
        "time_over_ours": {"min": ratios[0], "median": median(ratios), "max": ratios[-1]},
        "memory_over_ours": median(
            theirs.peak_bytes / mine.peak_bytes for theirs, mine in zip(runs, ours, strict=True)
        ),
        # How many times longer than the latent Transformers' matrix products alone: of a backward, two more of each.
        "time_over_latent_products": median(run.seconds / (passes * run.product_seconds[0]) for run in runs),
        "time_over_fastest_products": median(run.seconds / (passes * run.product_seconds[1]) for run in runs),
        "product_gflop_per_s": flops / median(run.product_seconds[0] for run in runs) / 1e9,
        "fastest_product_gflop_per_s": flops / median(run.product_seconds[1] for run in runs) / 1e9,
        "differs": runs[0].differs,
    }


# ---------------------------------------------------------------- growth


def growth(
    preset: str, mode: str, rounds: int, seconds: float, device: str, precision: str
) -> Iterator[dict[str, Any]]:
    """Yield rows of one cross-attend and of the whole model, ours and the usual way (fused), for more and more inputs.

    The last rows, one per contender, hold `slope`: of log time against log inputs from SLOPE_FROM inputs on.
    """
    for alone in (True, False):
        times: dict[str, list[tuple[int, float]]] = {}
        for inputs in GROWTH_INPUTS:
            side = int(inputs**0.5)
            jobs = [Job(name, preset, side, mode, alone, 1, seconds, device, precision) for name in ("ours", USUAL[1])]
            results: dict[str, list[Measured]] = {job.name: [] for job in jobs}
            for _ in range(rounds):
                for job in jobs:
                    results[job.name].append(run(job))
            for name, runs in results.items():
                second = median(run.seconds for run in runs)
                times.setdefault(name, []).append((inputs, second))
                yield {
                    "what": "cross-attend" if alone else "model",
                    "name": name,
                    "inputs": inputs,
                    "seconds": second,
                    "peak_mib": median(run.peak_bytes for run in runs) / 2**20,
                }
        for name, points in times.items():
            yield {"what": "cross-attend" if alone else "model", "name": name, "slope": _slope(points)}


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Return the least-squares slope of log time over log inputs."""
    chosen = torch.tensor([p for p in points if p[0] >= SLOPE_FROM], dtype=torch.float64).log()
    x, y = (chosen - chosen.mean(dim=0)).unbind(dim=1)
    return float((x * y).sum() / x.square().sum())


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Write a plot of `growth` rows (SVG or PNG by suffix): time and memory over inputs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, (key, label) in zip(axes, (("seconds", "seconds"), ("peak_mib", "peak MiB beyond torch")), strict=True):
        for what, line in (("cross-attend", "--"), ("model", "-")):
            for name, colour in (("ours", "#1b6ca8"), (USUAL[1], "#c8553d")):
                points = [(r["inputs"], r[key]) for r in rows if r["what"] == what and r["name"] == name and key in r]
                axis.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=colour,
                          label=f"{what}, {'this project' if name == 'ours' else 'K, V + SDPA'}")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="inputs M", ylabel=label)
        axis.set_xticks(GROWTH_INPUTS, [f"{count:,}" for count in GROWTH_INPUTS], fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def facts(device: str, precision: str) -> dict[str, Any]:
    """Return the machine and versions that a table must be read with."""
    return machine(choose(device, precision))
