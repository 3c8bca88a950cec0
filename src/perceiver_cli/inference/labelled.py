"""The answers of a model to labelled examples, computed by one process or by several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader, ordered_tasks
from perceiver_cli.errors import DataError, counted
from perceiver_cli.inference.predictor import forward_batches
from perceiver_cli.model.device import Compute
from perceiver_cli.model.ensemble import Model
from perceiver_cli.model.ranks import ALONE, Ranks


@dataclass(frozen=True)
class LabelledLogits:
    """Logits of labelled examples. bad, strangers: as in a Report."""

    examples: tuple[Example, ...]
    logits: Tensor  # (n, classes) float64
    targets: Tensor  # (n,) or, with several labels, (n, classes) of 0 and 1
    used: tuple[tuple[str, ...], ...]  # modalities of each example
    bad: tuple[tuple[Example, str], ...]
    strangers: int


def label_logits(
    model: Model,
    reader: Reader,
    examples: Sequence[Example],
    compute: Compute,
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> LabelledLogits | None:
    """Return a model's logits for examples, in evaluation mode. Raises DataError if none could be read.

    ranks: N processes take whole batches in turn; the first one gets all answers, the others None.
    """
    multi_label = reader.multi_label_classes > 0
    batch_size = max(1, batch_size // reader.num_views)
    known = [example for example in examples if example.labels or multi_label]
    own = islice(ordered_tasks(known, batch_size), ranks.rank, None, ranks.size)
    answers: list[_Answers] = []
    was_training, done = model.training, 0
    model.eval()
    for batch, outputs in forward_batches(model, reader, own, compute, workers):
        bad = tuple((position, error) for position, _, error in batch.bad)
        answers.append(_Answers(bad, batch.used, outputs.logits))
        done += len(batch.examples) + len(bad)
        if progress is not None:
            progress(min(done * ranks.size, len(known)))
    model.train(was_training)
    if ranks.size > 1:
        parts = [_unpacked(packed, model.head.out_features) for packed in ranks.gather(_packed(answers))]
        answers = [answer for turn in zip_longest(*parts) for answer in turn if answer is not None]
    return _labelled(reader, examples, known, batch_size, answers) if ranks.first else None


class _Answers(NamedTuple):
    """The answers to one batch. bad: (position, error) of unreadable examples. used: modalities of the others."""

    bad: tuple[tuple[int, str], ...]
    used: tuple[tuple[str, ...], ...]
    logits: Tensor


def _packed(answers: Sequence[_Answers]) -> bytes:
    """Return answers as bytes for another process: a line of JSON, then the logits."""
    facts = json.dumps([[answer.bad, answer.used] for answer in answers]).encode()
    return b"\n".join([facts, b"".join(answer.logits.numpy().tobytes() for answer in answers)])


def _unpacked(data: bytes, classes: int) -> list[_Answers]:
    facts, _, numbers = data.partition(b"\n")
    logits = np.frombuffer(numbers, np.float64).reshape(-1, classes)
    answers = []
    for bad, used in json.loads(facts):
        rows, logits = logits[: len(used)], logits[len(used) :]
        answers.append(_Answers(tuple(map(tuple, bad)), tuple(map(tuple, used)), torch.from_numpy(rows.copy())))
    return answers


def _labelled(
    reader: Reader, examples: Sequence[Example], known: Sequence[Example], batch_size: int, answers: Sequence[_Answers]
) -> LabelledLogits:
    """Return the answers to the batches of `known`, in order, with their labels."""
    scored: list[Example] = []
    bad: list[tuple[Example, str]] = []
    for start, answer in zip(range(0, len(known), batch_size), answers, strict=True):
        members, wrong = known[start : start + batch_size], dict(answer.bad)
        bad += [(members[position], error) for position, error in answer.bad]
        scored += [example for position, example in enumerate(members) if position not in wrong]
    if not scored:
        raise DataError(
            f"nothing to score: {counted(len(examples), 'example')}, {len(bad)} unreadable, "
            f"{len(examples) - len(known)} of classes that the model does not know",
            *(error for _, error in bad[:1]),
        )
    logits, targets = torch.cat([answer.logits for answer in answers]), reader.labels(scored)
    targets = targets.to(logits.dtype) if targets.ndim == 2 else targets
    used = tuple(modalities for answer in answers for modalities in answer.used)
    return LabelledLogits(tuple(scored), logits, targets, used, tuple(bad), len(examples) - len(known))
