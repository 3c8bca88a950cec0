"""The page of suspect labels and near-copies: one file with the media, that opens from disk and loads nothing."""

from __future__ import annotations

from perceiver_cli.inference.labels import LabelReport
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.report.html import Gallery, percent, shown, template

MOST_SUSPECTS, MOST_COPIES = 100, 40  # shown with media


def labels_page(report: LabelReport, predictor: Predictor, data: str) -> str:
    """Return the page as HTML. data: the path of the data, as the user named it."""
    gallery = Gallery(predictor.reader)
    suspects = [
        gallery.show(
            example,
            f"{suspect.split}: {shown(suspect.label)} ({percent(suspect.prob)}), rather {shown(suspect.suggested)} "
            f"({percent(suspect.suggested_prob)})",
        )
        for suspect, example in zip(report.suspects[:MOST_SUSPECTS], report.examples, strict=False)
    ]
    pairs = report.examples[len(report.suspects) :]
    copies = [
        [
            gallery.show(one, f"{copy.split}: {shown(copy.labels[0])}"),
            gallery.show(other, f"{copy.other_split}: {shown(copy.labels[1])}"),
        ]
        for copy, one, other in zip(report.copies[:MOST_COPIES], pairs[::2], pairs[1::2], strict=False)
    ]
    return template("labels.html").render(
        report=report, suspects=suspects, copies=copies, gallery=gallery, data=data, path=str(predictor.path)
    )
