"""Rivals and claims train: the same batches, a budget of steps, a permutation that is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import claims, rivals
from benchmarks.learning import Budget
from perceiver_cli.errors import UsageError
from perceiver_cli.model.encoding import Segment
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL


def test_the_perceiver_and_its_rival_train_for_the_same_steps(bars: Path) -> None:
    plan = Trainer(bars, None, overrides=SMALL).plan
    rows = list(rivals.rows(plan, Budget(None, 2), 1, "val"))
    assert [row["name"] for row in rows] == ["Perceiver", "CNN"]
    assert {row["steps"] for row in rows} == {2}
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)


def test_every_claim_names_its_models(bars: Path) -> None:
    plan = Trainer(bars, None, overrides=SMALL).plan
    names = {claim: [c.name for c in claims.contenders(claim, plan, 0)] for claim in ("permutation", "depth", "stem")}
    assert names["permutation"] == ["Perceiver", "Perceiver, permuted", "CNN", "CNN, permuted"]
    assert names["depth"][-1] == "48 layers"
    (row,) = [row for row in claims.rows("stem", {"": plan}, Budget(None, 1), 1, "val") if row["name"] == "no stem"]
    assert row["steps"] == 1
    with pytest.raises(UsageError, match="fusion needs several modalities"):
        claims.contenders("fusion", plan, 0)


def test_a_permuted_network_gets_every_place_once() -> None:
    network = claims.Permuted("image", Layout((4, 4), 1, 2, 4, (4.0, 4.0)), 2)
    assert sorted(network.order.tolist()) == list(range(16))
    assert network({"image": Segment(torch.rand(2, 4, 4, 1))}).shape == (2, 2)
