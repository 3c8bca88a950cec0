"""The parts of `benchmarks.gpu`, each a generator of rows.

python -m benchmarks.gpu_parts PART DEVICE SECONDS FILE
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.gpu import ROOT
from benchmarks.gpu_common import Record, Setting, first_line, judged, row
from benchmarks.gpu_speed import speed
from benchmarks.gpu_training import compile_, loader, precisions
from perceiver_cli.config import load_preset
from perceiver_cli.machine.growth import layouts_of, made_up_segments, new_model
from perceiver_cli.model import kernels
from perceiver_cli.model.perceiver import Perceiver

WIDTHS = (kernels.TESTED_WIDTH, 411)  # of keys: a picture's; a video's in patches of 2 x 8 x 8
MOST_ERROR = 1e-4  # of float32 beside float64, as a share of the largest number
CASES = {"cuda": 60, "cpu": 4}  # random cross-attends
CASES_SHARE = 0.6  # of the part's time; the rest is for whole models
REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}  # that NCCL sums
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def machine(setting: Setting) -> Iterator[Record]:
    """Yield card, memory and versions, and what `perceiver doctor --run` says."""
    facts: dict[str, Any] = {"machine": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if setting.on_gpu:
        card = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "card": card.name, "memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
        }  # fmt: skip
        versions |= {"cudnn": torch.backends.cudnn.version(), "nccl": str(torch.cuda.nccl.version())}  # type: ignore[no-untyped-call]
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()
            versions["driver"] = answer[0] if answer else None
    for name in ("triton", "numpy", "av", "perceiver_pytorch"):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "installed")
        except ImportError:
            versions[name] = None
    yield {"facts": {"machine": facts, "versions": versions}}
    for name, value in [*facts.items(), *versions.items()]:
        yield row(name, str(value))
    run = ["--run", "--device", setting.device] if setting.on_gpu else []
    done = perceiver("doctor", "--json", *run)
    if done.returncode:
        yield row("perceiver doctor", done.returncode, "exit status", f"failed: {done.stderr.strip()[-160:]}")
        return
    told = json.loads(done.stdout)
    problems = "; ".join(told["problems"])
    yield row("perceiver doctor", len(told["problems"]), "problems", f"failed: {problems}" if problems else "passed")
    for name, device in told["devices"].items():
        yield row(f"kernel on {name} in {device['precision']}", device["kernel"])
    for name, value in told.get("self_test", {}).items():
        yield row(f"self-test: {name}", value)


def perceiver(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return the finished `perceiver` command."""
    command = [sys.executable, "-m", "perceiver_cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def kernel_tests(setting: Setting) -> Iterator[Record]:
    """Yield the error of each attention kernel beside plain products, and which one is chosen."""
    device = torch.device(setting.device)
    for width in WIDTHS:
        tested: set[tuple[str, torch.dtype]] = set()
        for dtype in DTYPES if setting.on_gpu else DTYPES[:1]:
            candidates = kernels.candidates(device, dtype)
            for kernel in candidates:
                if (kernel.name, kernel.dtype) in tested:
                    continue
                tested.add((kernel.name, kernel.dtype))
                what = f"{kernel.name}, {_short(kernel.dtype)}, keys of {width}: error"
                try:
                    yield judged(what, kernels.self_test(kernel, device, width), kernel.tolerance)
                except Exception as error:
                    # Wide keys are refused by flash attention; that the next kernel takes them is the row below.
                    word = "refused" if width > kernels.TESTED_WIDTH else "failed"
                    yield row(what, verdict=f"{word}: {first_line(error)}")
            chosen = kernels.choose(device, dtype, width)
            names = [kernel.name for kernel in candidates]
            fell_back = chosen.name != names[0] if width == kernels.TESTED_WIDTH else chosen is kernels.PLAIN
            verdict = f"failed: fell back from {names[0]}" if fell_back else "passed"
            yield row(f"chosen for {_short(dtype)}, keys of {width}", f"{chosen.name}", _short(chosen.dtype), verdict)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def equality(setting: Setting) -> Iterator[Record]:
    """Yield the worst errors of random cross-attends, beside float64, and of whole models, beside the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(setting.device)
    until = time.monotonic() + CASES_SHARE * setting.left_s
    worst: dict[tuple[str, str], list[float]] = defaultdict(list)
    seed = 0
    while seed < CASES[device.type] and time.monotonic() < until:
        case = Case.draw(random.Random(seed))
        try:
            for name, error in case.errors(device).items():
                worst[case.form, "output" if name == "output" else "gradients"].append(error)
        except Exception as error:
            yield row(f"random case {seed}, {case.form}", verdict=f"failed: {first_line(error)}")
        seed += 1
    for (form, of), errors in sorted(worst.items()):
        yield judged(f"{form}: worst error of {of}, {seed} cases", float(torch.tensor(errors).max()), MOST_ERROR)
    presets = ["tiny-image", "tiny-audio", "tiny-points", "tiny-av", "imagenet"] if setting.on_gpu else ["tiny-points"]
    for preset in presets:
        if setting.left_s > 5:
            yield judged(f"{preset}: worst error of logits and gradients", _model_error(preset, device), MOST_ERROR)


def _model_error(preset: str, device: torch.device) -> float:
    """Return the largest difference of logits and of gradients between CPU and device, as a share of the largest."""
    config = load_preset(preset)
    specs = layouts_of(config, 64 if preset == "imagenet" else None)
    cpu = torch.device("cpu")
    ours = new_model(config.model, specs, cpu)
    theirs = new_model(config.model, specs, cpu)
    theirs.load_state_dict(ours.state_dict())
    expected, result = _run(ours, specs, cpu), _run(theirs.to(device), specs, device)
    largest = max(float(x.abs().max()) for x in expected[1:])
    errors = [(expected[0] - result[0]).abs().max() / expected[0].abs().max()]
    errors += [(a - b).abs().max() / largest for a, b in zip(expected[1:], result[1:], strict=True)]
    return float(torch.stack(errors).max())


def _run(model: Perceiver, layouts: Any, device: torch.device) -> list[torch.Tensor]:
    """Return the logits of a batch and the gradients of their first class, on the CPU."""
    logits = model(made_up_segments(layouts, 2, device))
    logits[:, 0].sum().backward()
    return [logits.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]


def nccl(setting: Setting) -> Iterator[Record]:
    """Yield whether NCCL (gloo on a CPU) begins with one rank and sums a tensor, and how long that takes."""
    backend = "nccl" if setting.on_gpu else "gloo"
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):  # there may be no network
        os.environ.setdefault(name, "lo")
    device = torch.device(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/rank", rank=0, world_size=1)
        x = torch.ones(REDUCED_BYTES[device.type] // 4, device=device)
        torch.distributed.all_reduce(x)
        right = bool((x == 1).all())  # waits
        yield row(f"{backend}: init and first all_reduce", time.perf_counter() - begun, "s")
        yield row(f"{backend}: sum of one rank", verdict="passed" if right else "failed: another sum")
        begun = time.perf_counter()
        for _ in range(5):
            torch.distributed.all_reduce(x)
        assert float(x[0]) == 1
        yield row(f"{backend}: all_reduce of {x.nbytes >> 20} MiB", (time.perf_counter() - begun) / 5 * 1e3, "ms")
        torch.distributed.destroy_process_group()


def tests(setting: Setting) -> Iterator[Record]:
    """Yield the result of the test files that hold tests for a GPU."""
    try:
        importlib.import_module("pytest")
    except ImportError:
        yield row("pytest", verdict="not installed")
        return
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)  # into the part's log
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    skipped = setting.on_gpu and "skipped" in summary
    verdict = f"failed: exit status {done.returncode}" if done.returncode else "passed"
    yield row(f"{len(files)} files: {summary}", verdict="failed: tests were skipped" if skipped else verdict)


PARTS: dict[str, Callable[[Setting], Iterator[Record]]] = {
    "machine": machine, "kernels": kernel_tests, "equality": equality, "precisions": precisions, "speed": speed,
    "compile": compile_, "loader": loader, "nccl": nccl, "tests": tests,
}  # fmt: skip


def main(part: str, device: str, seconds: str, file: str) -> None:
    """Run a part and add its records to a file, one JSON object a line, as they come."""
    with open(file, "a", encoding="utf-8") as rows:
        for record in PARTS[part](Setting(device, time.monotonic() + float(seconds))):
            rows.write(json.dumps(record) + "\n")
            rows.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
