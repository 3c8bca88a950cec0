"""Side-by-side measurements: that contenders compute what they claim. Figures are for benchmarks, not for tests."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contest, growth, peers
from perceiver_cli.config import ModelConfig
from perceiver_cli.errors import UsageError
from perceiver_cli.machine.growth import NUM_CLASSES, Trial, made_up_segments
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess.base import Layout
from tests.benchmarks.conftest import Benchmark

SMALL = ModelConfig(
    num_latents=8, latent_channels=32, schedule="c0 t0 (c1 t0)x2", self_attends_per_block=2, num_self_heads=4
)
GRID = Layout((40, 30), 3, 2, 4, (40.0, 30.0))
CPU = torch.device("cpu")


@pytest.mark.parametrize("form", peers.FORMS)
@pytest.mark.parametrize("head", ["mean", "query"])
def test_the_usual_way_gives_our_logits(form: str, head: str) -> None:
    layouts = {"image": GRID, "points": Layout((50,), 0, 3, 2, (8.0,) * 3, is_grid=False)}
    model = Perceiver(SMALL.model_copy(update={"head": head}), layouts, 5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    segments = made_up_segments(layouts, 2, CPU)
    with torch.no_grad():
        expected = peers.usual_forward(model, segments, peers.FORMS[form])
        torch.testing.assert_close(model(segments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # theirs
@pytest.mark.parametrize("name", [name for name in peers.PACKAGES if peers.is_installed(name)])
def test_a_peer_has_our_sizes(name: str) -> None:
    config = SMALL.model_copy(update={"schedule": "c0 (t0)x2", "head": "query", "cross_channels": "input"})
    theirs = peers.build(name, config, {"image": GRID}, 2, CPU, alone=False)
    ours = Perceiver(config, {"image": GRID}, NUM_CLASSES)
    assert theirs.call().shape == (2, NUM_CLASSES)
    count, expected = (sum(p.numel() for p in parameters) for parameters in (theirs.parameters, ours.parameters()))
    assert count == expected or theirs.differs


def test_transformers_is_the_same_model_for_one_cross_attend() -> None:
    pytest.importorskip("transformers")
    config = SMALL.model_copy(update={"schedule": "c0 (t0)x2", "head": "query", "cross_channels": "input"})
    contender = peers.build("transformers", config, {"image": GRID}, 1, CPU, alone=False)
    assert contender.differs == ""
    count = sum(p.numel() for p in contender.parameters)
    assert count == sum(p.numel() for p in Perceiver(config, {"image": GRID}, NUM_CLASSES).parameters())


@pytest.mark.parametrize("mode", contest.MODES)
def test_one_row_per_contender_with_ratios_and_memory(mode: str) -> None:
    rows = list(contest.contest(Trial("tiny-points", mode, 0.05, "cpu", "fp32", batch=2), ["usual"], [], 1))
    names = [row["name"] for row in rows]
    assert names == ["ours", *peers.FORMS]
    for row in rows:
        assert row["seconds_per_sample"] > 0
        assert row["peak_mib"] > 0
        assert row["time_over_ours"]["min"] <= row["time_over_ours"]["median"] <= row["time_over_ours"]["max"]
    assert rows[0]["time_over_ours"] == {"min": 1, "median": 1, "max": 1}


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "transformers", "no_such_package")
    trial = Trial("tiny-image", "forward", 0.01, "cpu", "fp32")
    rows = list(contest.contest(trial, ["transformers"], [], 1))
    assert rows[-1] == {"name": "transformers", "differs": "not installed: pip install transformers"}
    with pytest.raises(UsageError, match="not a peer"):
        list(contest.contest(trial, ["keras"], [], 1))


def test_the_command_prints_lines_of_json(benchmark: Benchmark) -> None:
    lines = benchmark("contest", "tiny-audio", "--against", "usual", "--rounds", "1", "--seconds", "0.1")
    assert [line.get("name") for line in lines] == ["ours", *peers.FORMS, None]
    assert lines[-1]["torch"] == torch.__version__


def test_growth_measures_the_usual_way_too() -> None:
    assert list(growth.CONTENDERS) == ["ours", "usual (SDPA)"]
    trial = Trial("tiny-image", "forward", 0.01, "cpu", "fp32", side=32)
    for measure in growth.CONTENDERS.values():
        assert measure(trial).seconds > 0
