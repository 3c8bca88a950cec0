"""The commands as Python: train on class folders, watch the events, evaluate, predict.

python examples/train_from_python.py DATA RUN [KEY=VALUE ...]
"""

import sys
from itertools import islice

from perceiver_cli import Predictor, Trainer
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.training.events import Evaluated, Finished


def main(data: str, run: str, *overrides: str) -> None:
    """Train, then say how good it is and what it makes of the first test files."""
    trainer = Trainer(data, run, overrides=overrides)
    for event in trainer.fit():  # a generator: stop asking, and it stops
        if isinstance(event, Evaluated):
            print(f"epoch {event.epoch:.1f}: validation accuracy {event.accuracy:.3f}")
        elif isinstance(event, Finished):
            print(f"best model: {event.model}")

    predictor = Predictor(run)
    report = evaluate(predictor, data)
    print(f"{report.split}: {report.accuracy:.3f} of {report.num_examples}")
    wrong = [record["path"] for record in report.records if not record["correct"]]
    print(f"wrong: {wrong[:3]}")
    examples = trainer.plan.catalog.splits.get("test", trainer.plan.val_examples)
    for prediction in islice(predictor.predict(examples), 3):
        print(prediction.label, round(prediction.prob, 3))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
