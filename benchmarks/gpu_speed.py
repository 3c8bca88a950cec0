"""Part "speed" of `benchmarks.gpu`: the imagenet model for more and more pixels beside other ways, with peak memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from benchmarks import peers
from benchmarks.flex import flex_kernel
from benchmarks.gpu_common import Record, Setting, first_line, isolated, row
from perceiver_cli.config import load_preset
from perceiver_cli.machine.growth import Trial, layouts_of, new_model, timed_call
from perceiver_cli.machine.measure import peak_above, time_calls
from perceiver_cli.malloc import peak_bytes
from perceiver_cli.model import kernels
from perceiver_cli.model.device import Compute, choose_compute
from perceiver_cli.model.encoding import ByteArrayEncoding
from perceiver_cli.model.perceiver import Perceiver

FLEX = "ours (flex_attention with lse)"  # in place of private CUDA calls
# Contender and precision, the most telling first.
ORDER = [
    ("ours", "bf16"), ("usual (einsum)", "bf16"), ("usual (SDPA)", "bf16"), ("perceiver-pytorch", "bf16"),
    ("ours", "fp32"), ("usual (einsum)", "fp32"), ("usual (SDPA)", "fp32"), (FLEX, "bf16"),
]  # fmt: skip
# Side of the picture, examples at once, the first cross-attend alone.
SIZES = [
    (224, 1, False), (224, 16, False), (512, 1, False), (512, 1, True), (1024, 1, False), (512, 4, False),
    (2048, 1, True), (2048, 1, False),
]  # fmt: skip
ONE_S, SMALL_S = 0.25, 0.01  # to spend on a measurement
CONTENDER_S, COMPILED_S = 22.0, 40.0  # for all sizes of a contender in one precision
SMALL_ORDER = [("ours", "fp32"), (FLEX, "fp32")]
SMALL_SIZES = [(32, 1, False), (32, 2, True)]
SMALL = ["model.num_latents=8", "model.latent_channels=16", "model.self_attends_per_block=1"]


def speed(setting: Setting) -> Iterator[Record]:
    """Yield forward and training step of each contender at each size, each contender in a process of its own."""
    for name, precision in ORDER if setting.on_gpu else SMALL_ORDER:
        what = f"{name}, {precision}"
        if name in peers.PACKAGES and not peers.is_installed(name):
            yield row(what, verdict="not installed")
        elif setting.left_s < 10:
            yield row(what, verdict="not begun")
        else:
            seconds = min(COMPILED_S if "flex" in name else CONTENDER_S, setting.left_s - 8)
            yield from isolated(what, seconds, _contender, name, precision, setting)


def _contender(name: str, precision: str, setting: Setting) -> Iterator[Record]:
    """Yield the rows of one contender in one precision."""
    compute = choose_compute(setting.device, precision)
    config = load_preset("imagenet").override([] if setting.on_gpu else SMALL)
    sizes = SIZES if setting.on_gpu else SMALL_SIZES
    base = peak_bytes()
    model = None
    if name == FLEX:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        kernels.choose = lambda *_: flex_kernel(dtype)  # type: ignore[assignment]
    known = "ours" if name == FLEX else name
    if known not in peers.PACKAGES:
        model = new_model(config.model, layouts_of(config, sizes[0][0]), compute.device)
    for side, batch, alone in sizes:
        if alone and known in peers.PACKAGES:
            continue
        layouts = layouts_of(config, side)
        torch.compiler.reset()  # flex_attention is compiled anew for each shape, eight of which are too many for one
        if model is not None:  # another size changes no weight
            model.encoding = ByteArrayEncoding(layouts, config.model.modality_channels).to(compute.device)
        for mode in ("forward", "train"):
            trial = Trial(config.name, mode, ONE_S if setting.on_gpu else SMALL_S, setting.device, precision, batch,
                          side, alone)  # fmt: skip
            yield _measured(name, trial, compute, base, model)
            if model is not None:
                model.zero_grad()
            gc.collect()
            if compute.device.type == "cuda":
                torch.cuda.empty_cache()


def _measured(name: str, trial: Trial, compute: Compute, base: int, model: Perceiver | None) -> Record:
    """Return the row of one trial: milliseconds, and the peak of memory."""
    timed = "cross-attend" if trial.alone else "model"
    what = f"{name}, {trial.precision}, {timed}, {trial.side} px x {trial.batch}, {trial.mode}"
    facts = {**vars(trial), "contender": name, "of": timed}
    config = load_preset("imagenet").override([] if compute.device.type == "cuda" else SMALL)
    layouts = layouts_of(config, trial.side)
    known = "ours" if name == FLEX else name
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    try:
        contender = peers.build(
            known, config.model, layouts, trial.batch, compute.device, alone=trial.alone, model=model
        )
        call = timed_call(trial, compute, contender.call, contender.parameters)
        seconds = time_calls(call, trial.seconds, compute.device).median
    except torch.OutOfMemoryError:
        return row(what, verdict="out of memory", trial=facts)
    except Exception as error:
        verdict = "failed" if name == "ours" else "refused"
        return row(what, verdict=f"{verdict}: {first_line(error)}", trial=facts)
    peak_mib = peak_above(base, compute) / 2**20
    return row(what, seconds * 1e3, f"ms, {peak_mib:,.0f} MiB", peak_mib=peak_mib, trial=facts)
