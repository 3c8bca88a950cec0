"""The 2021 Perceiver for files: everything that the commands do, as Python. Names load when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_cli.config import Config, load_config, load_preset
    from perceiver_cli.data.prepare import byte_array
    from perceiver_cli.errors import PerceiverError
    from perceiver_cli.inference.evaluation import Report
    from perceiver_cli.inference.predictor import Prediction, Predictor, Windows
    from perceiver_cli.model.checkpoint import load_model as load
    from perceiver_cli.model.encoding import Segment
    from perceiver_cli.model.perceiver import Perceiver
    from perceiver_cli.preprocess import register
    from perceiver_cli.preprocess.base import ByteArray, Layout, Modality
    from perceiver_cli.preprocess.source import Source
    from perceiver_cli.preprocess.spec import InputSpec
    from perceiver_cli.training.optimizer import Lamb
    from perceiver_cli.training.trainer import Trainer

_HOMES = {
    "ByteArray": "preprocess.base",
    "Config": "config",
    "InputSpec": "preprocess.spec",
    "Lamb": "training.optimizer",
    "Layout": "preprocess.base",
    "Modality": "preprocess.base",
    "Perceiver": "model.perceiver",
    "PerceiverError": "errors",
    "Prediction": "inference.predictor",
    "Predictor": "inference.predictor",
    "Report": "inference.evaluation",
    "Segment": "model.encoding",
    "Source": "preprocess.source",
    "Trainer": "training.trainer",
    "Windows": "inference.predictor",
    "byte_array": "data.prepare",
    "load": "model.checkpoint:load_model",
    "load_config": "config",
    "load_preset": "config",
    "register": "preprocess",
}

__all__ = [
    "ByteArray",
    "Config",
    "InputSpec",
    "Lamb",
    "Layout",
    "Modality",
    "Perceiver",
    "PerceiverError",
    "Prediction",
    "Predictor",
    "Report",
    "Segment",
    "Source",
    "Trainer",
    "Windows",
    "byte_array",
    "load",
    "load_config",
    "load_preset",
    "register",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("perceiver-cli")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, renamed = _HOMES[name].partition(":")
    return getattr(import_module(f"{__name__}.{home}"), renamed or name)


def __dir__() -> list[str]:
    return sorted(__all__)
