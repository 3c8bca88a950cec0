"""Files unlike the rest of a data set, in length or channels, or unlike their own name. `lint` warns of them. No torch.

They can be read, so they are no faults: a list of good files keeps them.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Mapping
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np

from perceiver_cli.data.inputs import Encoded, Input
from perceiver_cli.preprocess import container, image, sound_files
from perceiver_cli.preprocess.live_sound import SOUND
from perceiver_cli.preprocess.spec import Limits

KINDS = ("odd_length", "odd_channels", "misnamed")
LEAST = 10  # files, below which there is no rest to differ from
FEW = 0.1  # largest share of files that differ
FAR = 10  # times the length of the rest
ID3, WAV = "ID3", ("WAV", "NIST SPHERE")  # a tag before MP3, FLAC or AAC; corpora of speech call SPHERE .wav
SHOWN = {ID3: "MP3", "mov": "MP4", "matroska": "Matroska", "ogg": "OGG", "aac": "AAC"}
# The formats that a suffix may stand for, by their names in `image`, `sound_files` and `container`.
FORMATS = {
    **dict.fromkeys((".png", ".apng"), ("PNG",)),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), ("JPEG",)),
    **{suffix: (suffix[1:].upper(),) for suffix in (".gif", ".webp", ".bmp", ".caf", ".w64", ".au")},
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    **dict.fromkeys((".avif", ".heic", ".heif"), ("AVIF", "HEIF")),
    ".wav": WAV,
    ".flac": ("FLAC", ID3),
    ".mp3": ("MP3", ID3),
    **dict.fromkeys((".ogg", ".oga", ".opus", ".ogv"), ("OGG", "ogg")),
    **dict.fromkeys((".aif", ".aiff", ".aifc"), ("AIFF",)),
    **dict.fromkeys((".mp4", ".m4v", ".m4a", ".mov", ".3gp"), ("mov",)),
    **dict.fromkeys((".mkv", ".webm", ".mka"), ("matroska",)),
    ".avi": ("avi",),
}

Pair = tuple[float | str, float | str]  # what was found, and what is usual


class Traits(NamedTuple):
    """What of an example is compared. seconds: NaN without a time axis. channels: 0 without sound.

    content: the format of a file whose suffix stands for another one, else "".
    """

    seconds: float = nan
    channels: int = 0
    content: str = ""


class Odd(NamedTuple):
    """An example unlike the rest: its split and id, what was found, and what is usual."""

    split: str
    id: str
    found: float | str
    usual: float | str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"path": self.id, "split": self.split, "found": self.found, "usual": self.usual}


def traits_of(inputs: Mapping[str, Input], limits: Limits) -> Traits:
    """Return the traits of an example. Raises DataError for a file that cannot be read."""
    seconds = next((each.seconds for each in inputs.values() if each.seconds is not None), nan)
    channels, content = 0, ""
    for name, each in inputs.items():
        if isinstance(each, Encoded):
            content = content or misnamed(each.source.head(), each.source.name)
            if name == SOUND:
                with sound_files.open_sound(each.source, "mix", limits) as sound:
                    channels = sound.channels
    return Traits(seconds, channels, content)


def misnamed(head: bytes, name: str) -> str:
    """Return the format of a file that begins with `head` if its suffix stands for another one, else ""."""
    expected = FORMATS.get(os.path.splitext(name)[1].lower())
    found = ID3 if head.startswith(b"ID3") else image.format_of(head) or sound_files.format_of(head)
    found = found or container.format_of(head)
    return "" if expected is None or found is None or found in expected else SHOWN.get(found, found)


class Collected:
    """The traits of all examples: six bytes each."""

    def __init__(self) -> None:
        self.seconds, self.channels = array("f"), array("H")
        self.contents: dict[int, str] = {}

    def add(self, traits: Traits) -> None:
        """Note the traits of the next example."""
        if traits.content:
            self.contents[len(self.seconds)] = traits.content
        self.seconds.append(traits.seconds)
        self.channels.append(min(traits.channels, 65_535))

    def unlike(self) -> dict[str, dict[int, Pair]]:
        """Return by kind and number of an example what was found and what is usual; "" for a misnamed file."""
        misnamed: dict[int, Pair] = {number: (content, "") for number, content in self.contents.items()}
        return dict(zip(KINDS, (self._lengths(), self._channels(), misnamed), strict=True))

    def _lengths(self) -> dict[int, Pair]:
        """Return the lengths that are FAR above what all but FEW have, or as far below."""
        known = sorted(seconds for seconds in self.seconds if not isnan(seconds))
        if len(known) < LEAST:
            return {}
        spare = int(FEW * len(known))
        low, high = known[spare] / FAR, known[-1 - spare] * FAR
        usual = round(float(np.median(known)), 3)
        return {k: (round(s, 3), usual) for k, s in enumerate(self.seconds) if not isnan(s) and not low <= s <= high}

    def _channels(self) -> dict[int, Pair]:
        """Return the numbers of channels other than the most common one, if FEW have them."""
        counts = Counter(number for number in self.channels if number)
        if (total := counts.total()) < LEAST:
            return {}
        usual, same = counts.most_common(1)[0]
        few = total - same <= FEW * total
        return {k: (number, usual) for k, number in enumerate(self.channels) if few and number not in (0, usual)}
