"""A new modality in one file: light curves, one number a line in a .curve file.

    python examples/custom_modality.py [FOLDER]      default: curves

A modality is two classes: an `InputSpec` with its options, and a `Modality` that decodes a file and makes its byte
array. `register` makes it known: it trains, evaluates and predicts like the built-in ones, and a run's model file keeps
its options. On the command line: perceiver train DATA --plugin examples/custom_modality.py, and so with every command.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np

from perceiver_cli import ByteArray, InputSpec, Layout, Modality, Source, register
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.base import Array, check_contract
from perceiver_cli.preprocess.spec import Limits

HEADER = b"# curve\n"


class CurveSpec(InputSpec):
    """Options of [inputs.curve]. length: the number of points to which a curve is resampled."""

    modality: Literal["curve"] = "curve"
    length: int = 64
    bands: int = 8


class CurveModality(Modality[CurveSpec]):
    """Text files of numbers to (length, 1) grids."""

    name = "curve"
    formats = "text with a first line '# curve', then one number a line"
    decides = ()  # the options that change what `load` returns

    def sniff(self, head: bytes, name: str) -> bool:
        """Return whether the file begins with the header line."""
        return head.startswith(HEADER)

    def load(self, source: Source, spec: CurveSpec, limits: Limits) -> Array:
        """Return (n,) float32. Raises DataError for a line that is not a number, or no numbers."""
        text = source.read(limits)
        source.check_decoded(text.count(b"\n"), 4, limits)
        try:
            values = np.array(text.splitlines()[1:], dtype=np.float32)
        except ValueError as error:
            raise DataError(f"{source.shown}: a line that is not a number") from error
        return check_contract(source, values, "numbers")

    def loaded(self, spec: CurveSpec) -> tuple[str, tuple[int | None, ...]]:
        """Return float32, (n,): dtype and shape of what `load` returns."""
        return "float32", (None,)

    def layout(self, spec: CurveSpec) -> Layout:
        """Return a grid of `length` inputs with one value each."""
        return Layout((spec.length,), 1, 1, spec.bands, (float(spec.length),))

    def prepare(self, raw: Array, spec: CurveSpec, rng: np.random.Generator | None) -> ByteArray:
        """Return the curve at `length` points, standardised; in training with a little noise."""
        points = np.linspace(0, len(raw) - 1, spec.length)
        curve = np.interp(points, np.arange(len(raw)), raw)
        curve = (curve - curve.mean()) / (curve.std() + 1e-6)
        if rng is not None:
            curve = curve + rng.normal(0, 0.05, spec.length)
        return ByteArray(curve.astype(np.float32)[:, None])


register(CurveModality())


def write_curves(folder: Path) -> None:
    """Write made-up curves: a dip in the first half or in the second."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        for label, center in (("early", 0.3), ("late", 0.7)):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                x = np.linspace(0, 1, 100)
                dip = np.exp(-(((x - center + rng.normal(0, 0.05)) / 0.05) ** 2))
                lines = "\n".join(f"{value:.4f}" for value in 1 - dip + rng.normal(0, 0.1, 100))
                (folder / split / label / f"{number:03d}.curve").write_bytes(HEADER + lines.encode() + b"\n")


def main(folder: Path) -> float:
    """Train on the curves, evaluate and predict; return the accuracy on test."""
    from perceiver_cli import Config, Predictor, Trainer  # these import torch, which a modality never needs
    from perceiver_cli.inference.evaluation import evaluate

    write_curves(folder / "data")
    config = Config.parse(
        {
            "name": "curves",
            "model": {
                "num_latents": 8,
                "latent_channels": 32,
                "num_self_heads": 2,
                "schedule": "c0 t0 c1 t0",
                "self_attends_per_block": 1,
            },
            "inputs": {"curve": {"length": 64}},
            "train": {"steps": 150, "batch_size": 32, "optimizer": "adamw", "lr": 0.003, "weight_decay": 0.01},
        }
    )
    for _ in Trainer(folder / "data", folder / "run", config).fit():
        pass
    predictor = Predictor(folder / "run")
    report = evaluate(predictor, folder / "data")
    print(f"{report.split}: accuracy {report.accuracy:.3f} of {report.num_examples}")
    (prediction,) = predictor.predict([folder / "data" / "test" / "late" / "000.curve"])
    print(prediction.to_dict())
    return report.accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "curves"))
