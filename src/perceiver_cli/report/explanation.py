"""Pictures, points and numbers of an explanation."""

from __future__ import annotations

import struct
from pathlib import Path

from perceiver_cli.errors import UsageError
from perceiver_cli.files import atomic_write, show_path, show_text
from perceiver_cli.inference.explain import MAPS, ExplainedInput, Explanation, Heat
from perceiver_cli.report import pictures


def to_ply(explanation: Explanation) -> bytes:
    """Return a cloud as a binary PLY whose points are coloured by heat, with the heat as a property.

    Raises:
        UsageError: the explanation is not of points.
    """
    if "points" not in explanation.shown:
        kinds = "+".join(explanation.shown)
        raise UsageError(f"a PLY holds points, {show_path(explanation.path)} is {kinds}", "pass -o FILE.png")
    shown = explanation.shown["points"]
    names = [("float", axis) for axis in "xyz"] + [("uchar", color) for color in ("red", "green", "blue")]
    properties = "".join(f"property {kind} {name}\n" for kind, name in [*names, ("float", "heat")])
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(shown.raw)}\n{properties}end_header\n"
    tints = pictures.colours(pictures.scaled(shown.heat), pictures.HEAT)
    rows = zip(shown.raw.tolist(), tints.tolist(), shown.heat.tolist(), strict=True)
    return header.encode() + b"".join(struct.pack("<3f3Bf", *point, *tint, heat) for point, tint, heat in rows)


# ---------------------------------------------------------------- the page


def save(explanation: Explanation, path: Path) -> None:
    """Write a page as PNG, or to a path that ends in .ply the coloured points."""
    with atomic_write(path) as file:
        if path.suffix.lower() == ".ply":
            file.write(to_ply(explanation))
        else:
            to_picture(explanation).save(file, format="PNG", optimize=True)


def to_picture(explanation: Explanation) -> pictures.Picture:
    """Return a page: each modality as it is, with attention, with heat; sound below pictures; then the score maps."""
    label = show_text(explanation.label)
    head = f"{label}: {explanation.prob:.3f}"
    if explanation.label != explanation.predicted:
        head += f" (predicted: {show_text(explanation.predicted)} {explanation.predicted_prob:.3f})"
    width = 3 * pictures.SIDE + 2 * pictures.GAP
    parts = [pictures.line(head, width, large=True), pictures.line(show_text(explanation.path), width)]
    parts += [pictures.line(note, width) for note in explanation.notes]
    for name, shown in sorted(explanation.shown.items(), key=lambda item: item[0] == "audio"):
        parts.append(_medium(name, shown, label, several=len(explanation.shown) > 1))
    parts.append(pictures.key(240, pictures.HEAT, "none", "most"))
    parts += _score_pages(explanation, width)
    return pictures.margin(pictures.column(parts))


def _medium(name: str, shown: ExplainedInput, label: str, *, several: bool) -> pictures.Picture:
    wide = shown.start_s is not None
    side = 3 * pictures.SIDE // 2 if wide else pictures.SIDE
    start_s = shown.start_s or 0.0
    looked, spoke = (f": {part.sum():.0%}" if several else "" for part in (shown.attention, shown.heat))
    titles = {
        name: None,
        f"{name}, where it looked (attention){looked}": shown.attention,
        f"{name}, what it found for {label} (heat){spoke}": shown.heat,
    }
    panels = [
        pictures.captioned(pictures.sample(shown.raw, shown.spec, heat, side=side, start_s=start_s), title)
        for title, heat in titles.items()
    ]
    return pictures.column(panels[1:]) if wide else pictures.row(panels)


def _score_pages(explanation: Explanation, width: int) -> list[pictures.Picture]:
    """Return a grid of score maps for each modality: a row for each cross-attend, a column for each latent."""
    pages = []
    rounds = sorted({score.cross_attend for score in explanation.maps})
    for name, shown in sorted(explanation.shown.items(), key=lambda item: item[0] == "audio"):
        pages.append(pictures.line(f"{name}: scores before the softmax, one latent each", width))
        for number in rounds:
            maps = [score for score in explanation.maps if score.cross_attend == number]
            side = (width - pictures.GAP * (MAPS - 1)) // MAPS
            panels = []
            for score in maps:
                head = f", head {score.head}" if any(other.head > 1 for other in maps) else ""
                title = f"cross-attend {number}, latent {score.latent}{head}"
                panels.append(pictures.captioned(_score_picture(score.scores[name], shown, side), title, small=True))
            pages.append(pictures.row(panels))
    pages.append(pictures.key(240, pictures.SCORE, "lowest", "highest"))
    return pages


def _score_picture(scores: Heat, shown: ExplainedInput, side: int) -> pictures.Picture:
    values = pictures.spanned(scores)
    if shown.spec.modality == "points":
        count = len(shown.raw)
        return pictures.cloud(shown.raw, pictures.colours(values[:count], pictures.SCORE), side)
    if shown.spec.modality == "audio" and values.ndim == 2:
        values = values.T[::-1]  # time to the right, low below
    return pictures.grid(values, pictures.SCORE, side)
