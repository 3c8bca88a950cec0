"""The 2021 Perceiver for files: the work of the commands, as Python. Each name is imported at its first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_cli.config import Config as Config, load_config as load_config, load_preset as load_preset
    from perceiver_cli.data.prepare import byte_array as byte_array
    from perceiver_cli.errors import PerceiverError as PerceiverError
    from perceiver_cli.inference.evaluation import Report as Report
    from perceiver_cli.inference.predictor import Prediction as Prediction, Predictor as Predictor, Windows as Windows
    from perceiver_cli.model.checkpoint import load_model
    from perceiver_cli.model.encoding import Segment as Segment
    from perceiver_cli.model.perceiver import Perceiver as Perceiver
    from perceiver_cli.preprocess import register as register
    from perceiver_cli.preprocess.base import ByteArray as ByteArray, Layout as Layout, Modality as Modality
    from perceiver_cli.preprocess.source import Source as Source
    from perceiver_cli.preprocess.spec import InputSpec as InputSpec
    from perceiver_cli.training.optimizer import Lamb as Lamb
    from perceiver_cli.training.trainer import Trainer as Trainer

    load = load_model

_NAMES = {
    "config": ("Config", "load_config", "load_preset"),
    "data.prepare": ("byte_array",),
    "errors": ("PerceiverError",),
    "inference.evaluation": ("Report",),
    "inference.predictor": ("Prediction", "Predictor", "Windows"),
    "model.checkpoint": ("load",),
    "model.encoding": ("Segment",),
    "model.perceiver": ("Perceiver",),
    "preprocess": ("register",),
    "preprocess.base": ("ByteArray", "Layout", "Modality"),
    "preprocess.source": ("Source",),
    "preprocess.spec": ("InputSpec",),
    "training.optimizer": ("Lamb",),
    "training.trainer": ("Trainer",),
}
_HOMES = dict(sorted((name, module) for module, names in _NAMES.items() for name in names))
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("perceiver-cli")
        except PackageNotFoundError:
            return "not installed"  # a checkout on PYTHONPATH
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), "load_model" if name == "load" else name)


def __dir__() -> list[str]:
    return __all__
