"""Predictions of several processes, in input order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from perceiver_cli.data.account import Account, Paths
from perceiver_cli.data.examples import PAUSE, Example
from perceiver_cli.data.inputs import Named
from perceiver_cli.errors import PerceiverError, error_facts, error_from
from perceiver_cli.inference.predictor import Prediction, Predictor, Windows
from perceiver_cli.model.ranks import Ranks

# The fields that differ between predictions: processes send only these.
SENT = ("path", "names", "probs", "error", "used", "notes", "start_s", "end_s")


def predict_shared(
    predictor: Predictor,
    inputs: Iterable[Named],
    ranks: Ranks,
    batch_size: int | None,
    workers: int,
    windows: Windows | None,
    *,
    min_prob: float,
    embeddings: bool,
    account: Account,
) -> Iterator[Prediction]:
    """Yield what `Predictor.predict` does, in the first process; nothing in the others.

    Each process lists the inputs by itself, and N processes take whole batches in turn: the answers are those of one
    process. An error comes after the predictions of the inputs before it.
    """
    size = predictor.rows_at_once(batch_size, windows)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "windows": windows}
    options |= {"min_prob": min_prob, "embeddings": embeddings, "account": (answered := Account())}
    given = (named for named in inputs if named is not PAUSE)
    every = (example for named in given for example in predictor.examples(named, account))
    own = (example for number, example in enumerate(every) if number // size % ranks.size == ranks.rank)
    errors: list[PerceiverError] = []
    answers = _until_error(_by_example(predictor, own, options), errors)
    blank = predictor.blank(min_prob)
    while True:
        batch = list(islice(answers, size))
        if not any(ranks.totals([len(batch)])):
            break
        for packed in ranks.gather(_packed(batch)):
            for facts in json.loads(packed):
                yield from (_prediction(blank, each) for each in facts)
    bad = answered.unreadable
    facts = [answered.used, [bad.count, bad.first], error_facts(errors[0]) if errors else None]
    errors.clear()
    for used, (count, first), error in ranks.exchange(facts):
        account.add(Account(used=used, unreadable=Paths(count, first)))
        errors += [] if error is None else [error_from(error)]
    if errors:
        raise errors[0]


def _by_example(predictor: Predictor, own: Iterable[Example], options: dict[str, Any]) -> Iterator[list[Prediction]]:
    """Yield the predictions of each example: one for each window if windows are kept apart, else one."""
    windows = options["windows"]
    if windows is not None and windows.aggregate == "none":
        for example in own:
            yield list(predictor.predict(example, **options))
        return
    for prediction in predictor.predict(own, **options):
        yield [prediction]


def _until_error(answers: Iterator[list[Prediction]], errors: list[PerceiverError]) -> Iterator[list[Prediction]]:
    try:
        yield from answers
    except PerceiverError as error:
        errors.append(error)


def _packed(batch: Sequence[Sequence[Prediction]]) -> bytes:
    return json.dumps([[_facts(prediction) for prediction in one] for one in batch]).encode()


def _facts(prediction: Prediction) -> dict[str, Any]:
    """Return the fields of a prediction to send, as JSON types: numbers keep every bit."""
    facts = {name: getattr(prediction, name) for name in SENT}
    return facts | ({} if prediction.embedding is None else {"embedding": prediction.embedding.tolist()})


def _prediction(blank: Prediction, facts: dict[str, Any]) -> Prediction:
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    if "embedding" in facts:
        known["embedding"] = np.array(facts["embedding"], np.float32)
    return replace(blank, **known)
