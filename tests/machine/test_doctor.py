"""`perceiver doctor`: its facts about this machine, and a self-test that can fail."""

from __future__ import annotations

import json

import pytest
import torch

from perceiver_cli.errors import PerceiverError
from perceiver_cli.machine import doctor
from perceiver_cli.model import kernels
from perceiver_cli.model.kernels import PLAIN
from tests.conftest import Perceive


def test_by_command(perceive: Perceive) -> None:
    done = perceive("doctor", "--json", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (
        facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )  # a wheel may leave it out
    assert set(facts["optional"]) == {
        "av", "pillow-heif", "pyarrow", "onnx", "onnxscript", "onnxruntime", "tensorboard", "huggingface_hub",
        "laspy", "lazrs", "optuna",
    }  # fmt: skip
    assert facts["devices"]["cpu"]["kernel"] == kernels.choose(torch.device("cpu"), torch.float32).name
    assert facts["threads"]["torch"] == 1
    assert facts["threads"]["OMP_NUM_THREADS"] == "1"
    assert facts["problems"] == []


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "av" else real(name))
    monkeypatch.setattr(kernels, "choose", lambda *_: PLAIN)
    facts = doctor.examine()
    assert facts["optional"]["av"] == "not installed: no videos and their sound (pip install 'perceiver-cli[video]')"
    assert "ffmpeg" not in facts["decoders"]
    assert any("no fused attention kernel" in problem for problem in facts["problems"])


def test_the_self_test_learns_and_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    results = doctor.self_test("cpu")
    assert results["last_loss"] < results["first_loss"]
    assert results["difference_after_loading"] <= 1e-6
    monkeypatch.setattr(doctor, "FALLS_TO", 0.0)
    monkeypatch.setattr(doctor, "SELF_TEST_STEPS", 2)
    with pytest.raises(PerceiverError, match=r"self-test: the loss went from .*; please report it"):
        doctor.self_test("cpu")
