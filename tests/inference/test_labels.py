"""Suspect labels: planted in latents, and in files through the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver_cli.errors import IntegrityError
from perceiver_cli.inference.labels import check_labels, combined, out_of_fold, suspect_labels, votes
from perceiver_cli.inference.predictor import Predictor
from tests.conftest import Perceive


def test_planted_wrong_labels_are_found_in_latents() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 400)
    latents = rng.normal(0, 1, (400, 12)) + 6 * np.eye(12)[true]
    labels = true.copy()
    wrong = rng.choice(400, 20, replace=False)
    labels[wrong] = (true[wrong] + rng.integers(1, 4, 20)) % 4
    answers = [out_of_fold(latents, labels, 4), votes(latents, labels, 4)]
    assert all(np.allclose(answer.sum(axis=1), 1) for answer in answers)
    found = suspect_labels(combined(*answers), labels)
    assert len({i for i, _ in found} & set(wrong)) >= 18
    assert len(found) <= 22
    assert all(suggested == true[i] for i, suggested in found if i in wrong)
    assert [i for i, _ in suspect_labels(combined(*answers), true) if i not in wrong] == []


def test_lint_judges_labels_and_draws_a_page(perceive: Perceive, trained: Path, bars: Path, tmp_path: Path) -> None:
    data = tmp_path / "d"
    shutil.copytree(bars, data)
    victim = min((data / "train" / "left").iterdir())
    victim.rename(data / "train" / "right" / f"moved-{victim.name}")
    page = tmp_path / "labels.html"
    done = perceive("lint", data, "--labels", trained, "-o", page, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["suspects"][0]["path"] == f"train/right/moved-{victim.name}"
    assert (facts["suspects"][0]["label"], facts["suspects"][0]["suggested"]) == ("right", "left")
    assert "data:image" in page.read_text()
    shown = perceive("lint", data, "--labels", trained).stdout.decode()
    assert "suspect labels: " in shown
    assert f"moved-{victim.name}" in shown


def test_a_broken_model_judges_no_labels(trained: Path, bars: Path) -> None:
    """Its answers were NaN, which is above no margin: every label was right."""
    predictor = Predictor(trained)
    torch.nn.init.constant_(predictor.model.head.bias, float("nan"))
    with pytest.raises(IntegrityError, match="not finite"):
        check_labels(predictor, bars)


@pytest.mark.parametrize(("words", "status"), [(("-o", "x.html"), 2), (("--labels", "RUN", "-o", "x.txt"), 2)])
def test_wrong_uses_are_refused(
    perceive: Perceive, trained: Path, bars: Path, words: tuple[str, ...], status: int
) -> None:
    words = tuple(str(trained) if word == "RUN" else word for word in words)
    assert perceive("lint", bars, *words).returncode == status
