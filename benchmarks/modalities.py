"""Text, tables and series, mostly real data, beside the usual baselines on the same split.

    python -m benchmarks.modalities breast-cancer man motions    (default: all; minutes each)

- breast-cancer, wine: scikit-learn's tables; gradient boosting; five splits.
- packages: Debian's package descriptions by section (`apt-cache dumpavail` of this machine); logistic regression on
  TF-IDF of characters. packages-mixed: the same, with size, dependencies, priority and architecture as columns.
- man: the manual pages of this machine by section, their first 2,000 bytes; the same baseline.
- vibration: made up: a machine with one of six states, measured along three axes at 2,000 Hz while its speed, load and
  noise differ from file to file; logistic regression on spectral statistics; three seeds of 300 steps.
- motions, vowels, gun-point: BasicMotions, JapaneseVowels and GunPoint of the UCR and UEA archives, with their own
  split, as the package aeon holds them (pip install --no-deps aeon); the same baseline; three seeds of 300 steps.
- xor: made up: the class is whether a word and a picture agree. Each alone says nothing.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = list[dict[str, Any]]
SECTIONS = ("games", "science", "python", "perl", "doc", "net", "admin", "graphics", "sound", "math")
PAGES = ("1", "3", "5", "7", "8")
SEEDS = 5
RATE_HZ = 2000  # of vibration
STEPS = 300  # of training on vibration
BEARING = {"outer-race": 3.57, "inner-race": 5.43}  # impulses a turn
ARCHIVED = {"motions": "BasicMotions", "vowels": "JapaneseVowels", "gun-point": "GunPoint"}  # the archives' names
STATES = ("good", "unbalance", "misalignment", "looseness", *BEARING)


def write(path: Path, rows: Rows) -> Path:
    """Write rows as CSV; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def in_test(name: str) -> bool:
    """Return whether a name is in the fifth that is tested, by its hash."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def learned(data: Path, changes: Sequence[str] = (), use: Iterable[str] | None = None) -> float:
    """Return the accuracy on test of the default recipe, trained on a manifest; use: inputs to answer from."""
    from perceiver_cli import Predictor, Trainer
    from perceiver_cli.inference.evaluation import evaluate

    run = data.parent / "run"
    if use is None or not run.is_dir():
        for _ in Trainer(data, run, None, overrides=[*changes, "data.workers=0"], replace=True).fit():
            pass
    return evaluate(Predictor(run, use=use), data, "test").accuracy


def tf_idf(rows: Rows) -> float:
    """Return the accuracy of logistic regression on TF-IDF of 2 to 5 characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, max_features=200_000)
    model = LogisticRegression(C=10, max_iter=300)
    model.fit(vectors.fit_transform([row["text"] for row in train]), [row["label"] for row in train])
    return float(model.score(vectors.transform([row["text"] for row in test]), [row["label"] for row in test]))


def table(name: str, folder: Path) -> Iterable[str]:
    """Yield the results on one of scikit-learn's tables."""
    from sklearn import datasets
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_breast_cancer() if name == "breast-cancer" else datasets.load_wine()
    ours, theirs = [], []
    for seed in range(SEEDS):
        train, test = train_test_split(
            np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=seed
        )
        boosted = GradientBoostingClassifier(random_state=seed).fit(bunch.data[train], bunch.target[train])
        theirs.append(boosted.score(bunch.data[test], bunch.target[test]))
        rows = [
            dict(zip(bunch.feature_names, bunch.data[place], strict=True))
            | {"label": bunch.target_names[bunch.target[place]], "split": split}
            for split, places in (("train", train), ("test", test))
            for place in places
        ]
        ours.append(learned(write(folder / str(seed) / "rows.csv", rows), [f"train.seed={seed}"]))
    yield f"{name}: {np.mean(ours):.4f} (gradient boosting {np.mean(theirs):.4f}), {SEEDS} splits of {len(test)} rows"


def package_rows(each: int) -> Rows:
    """Return descriptions of packages without doubles; packages of one source are in one split."""
    text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows: Rows = []
    seen, counts = set(), {(section, split): 0 for section in SECTIONS for split in ("train", "test")}
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line[:1] != " " and ": " in line)
        section, words = fields.get("Section", ""), fields.get("Description", "")
        split = "test" if in_test(fields.get("Source", fields.get("Package", "")).split(" ")[0]) else "train"
        most = each if split == "train" else each // 4
        if section not in SECTIONS or not words or words in seen or counts[section, split] >= most:
            continue
        seen.add(words)
        counts[section, split] += 1
        rows.append({
            "text": words, "size": fields.get("Installed-Size", ""), "arch": fields.get("Architecture", ""),
            "priority": fields.get("Priority", ""), "depends": fields.get("Depends", "").count(","),
            "label": section, "split": split,
        })  # fmt: skip
    return rows


def packages(name: str, folder: Path) -> Iterable[str]:
    """Yield the results on package descriptions, with columns of numbers too if the name says so."""
    rows = package_rows(400)
    if name == "packages":
        rows = [{key: row[key] for key in ("text", "label", "split")} for row in rows]
    accuracy = learned(write(folder / "rows.csv", rows))
    others = "" if name == "packages" else f", text alone {learned(folder / 'rows.csv', use=['text']):.4f}"
    yield f"{name}: {accuracy:.4f} (TF-IDF {tf_idf(rows):.4f}{others}), {len(SECTIONS)} classes, {len(rows):,} rows"


def man(name: str, folder: Path) -> Iterable[str]:
    """Yield the results on manual pages: the text of a page without macros, after its title."""
    rows: Rows = []
    for section in PAGES:
        pages = sorted(Path(f"/usr/share/man/man{section}").glob("*.gz"))
        order = np.random.default_rng(0).permutation(len(pages))[:500]
        for place in order:
            with gzip.open(pages[place]) as file:
                source = file.read(20_000).decode("utf-8", "replace")
            lines = [line for line in source.split("\n") if not line.startswith((".", "'"))]
            words = " ".join(lines).replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
            if len(words) > 200:
                split = "test" if in_test(pages[place].name) else "train"
                rows.append({"text": words[:2000], "label": section, "split": split})
    accuracy = learned(write(folder / "rows.csv", rows))
    yield f"{name}: {accuracy:.4f} (TF-IDF {tf_idf(rows):.4f}), {len(PAGES)} classes, {len(rows):,} pages"


def vibration(rng: np.random.Generator, state: str) -> NDArray[np.float64]:
    """Return the acceleration (samples, 3) of a machine in a state: sines of its speed, impulses, noise."""
    seconds = np.arange(1024) / RATE_HZ
    speed, phase, load = rng.uniform(20, 40), rng.uniform(0, 2 * np.pi, 8), rng.uniform(0.5, 1.5)

    def wave(order: float, place: int) -> NDArray[np.float64]:
        return np.asarray(np.sin(2 * np.pi * order * speed * seconds + phase[place]))

    signal = 0.5 * wave(1, 0) + 0.3 * wave(2, 1) + 0.2 * wave(3, 2)
    if state == "unbalance":
        signal = signal + 0.5 * load * wave(1, 0)
    elif state == "misalignment":
        signal = signal + 0.5 * load * wave(2, 1)
    elif state == "looseness":
        signal = signal + 0.25 * load * (wave(0.5, 3) + wave(1.5, 4) + wave(2.5, 5))
    elif state in BEARING:
        turns = (seconds * speed * BEARING[state] * rng.uniform(0.99, 1.01) + rng.uniform()) % 1
        since = turns / (speed * BEARING[state])
        ring = np.exp(-since * 300) * np.sin(2 * np.pi * 700 * since)
        modulated = 1 + (0.8 * wave(1, 6) if state == "inner-race" else 0)
        signal = signal + 1.2 * load * ring * modulated
    axes = np.stack([signal, 0.7 * np.roll(signal, 9), 0.4 * signal], axis=1) * rng.uniform(0.7, 1.4)
    return axes + rng.normal(0, rng.uniform(0.4, 0.8), axes.shape)


def statistics(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the mean, deviation, kurtosis, crest factor and logarithms of power in at most 32 bands of each channel.

    length: samples of the spectrum; a shorter recording is padded with zeros.
    """
    deviation = values.std(axis=0) + 1e-9
    centred = values - values.mean(axis=0)
    power = np.square(np.abs(np.fft.rfft(centred, length, axis=0)))[1:]
    bands = [band.sum(axis=0) for band in np.array_split(power, min(32, len(power)))]
    scaled = centred / deviation
    others = [values.mean(axis=0), np.log(deviation), (scaled**4).mean(axis=0), np.abs(scaled).max(axis=0)]
    return np.asarray(np.concatenate([np.log(np.add(bands, 1e-9)).ravel(), *others]))


Recordings = dict[str, list[tuple[str, NDArray[np.float64]]]]  # by split: class and values (samples, channels)


def made_up(seed: int) -> Recordings:
    """Return vibration of machines in each state."""
    rng = np.random.default_rng(seed)
    return {
        split: [(state, vibration(rng, state)) for state in STATES for _ in range(count)]
        for split, count in (("train", 100), ("test", 50))
    }


def archived(name: str) -> Recordings:
    """Return a set of the UCR and UEA archives."""
    spec = importlib.util.find_spec("aeon")
    assert spec is not None, "pip install --no-deps aeon"
    home = next(iter(spec.submodule_search_locations or ()))
    found: Recordings = {}
    for split in ("train", "test"):
        path = Path(home, "datasets", "data", ARCHIVED[name], f"{ARCHIVED[name]}_{split.upper()}.ts")
        lines = path.read_text().partition("@data")[2].split("\n")
        cells = [line.strip().split(":") for line in lines if line.strip()]
        found[split] = [
            (label, np.array([channel.split(",") for channel in channels], float).T) for *channels, label in cells
        ]
    return found


def series(name: str, folder: Path) -> Iterable[str]:
    """Yield the results on recordings in class folders of CSV files."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ours, theirs = [], []
    for seed in range(3):
        recordings = archived(name) if name in ARCHIVED else made_up(seed)
        longest = max(len(values) for _, values in recordings["train"])
        known: dict[str, tuple[list[Any], list[str]]] = {}
        for split, each in recordings.items():
            known[split] = [statistics(values, longest) for _, values in each], [label for label, _ in each]
            for number, (label, values) in enumerate(each):
                place = folder / str(seed) / "data" / split / label
                place.mkdir(parents=True, exist_ok=True)
                names = ",".join(f"channel {count}" for count in range(1, values.shape[1] + 1))
                times = np.arange(len(values)) / RATE_HZ
                table, names = (
                    (values, names) if name in ARCHIVED else (np.column_stack([times, values]), f"time,{names}")
                )
                np.savetxt(place / f"{number:03d}.csv", table, "%.6g", ",", header=names, comments="")
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(*known["train"])
        theirs.append(model.score(*known["test"]))
        ours.append(learned(folder / str(seed) / "data", [f"train.seed={seed}", f"train.steps={STEPS}"]))
    one_by_one = " ".join(f"{accuracy:.3f}" for accuracy in ours)
    tests = f"3 seeds of {len(recordings['test'])} tests"
    yield f"{name}: {np.mean(ours):.4f} ({one_by_one}; logistic regression {np.mean(theirs):.4f}), {tests}"


def xor(name: str, folder: Path) -> Iterable[str]:
    """Yield the results where the class is whether a word and a picture agree."""
    from PIL import Image

    rng = np.random.default_rng(0)
    rows: Rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        up, says = (bool(x) for x in rng.integers(0, 2, 2))
        pixels = rng.integers(0, 80, (16, 16), dtype=np.uint8)
        pixels[:8] += 120 if up else 0
        pixels[8:] += 0 if up else 120
        Image.fromarray(pixels).save(folder / f"{number}.png")
        words = " ".join(rng.choice(["a", "the", "of", "with", "box", "tree", "ship", "stone"], 6))
        title = f"{words} {'above' if says else 'below'} {rng.choice(['it', 'them', 'us'])}"
        split = "test" if number % 5 == 0 else "train"
        rows.append({"photo": f"{number}.png", "title": title, "label": int(up ^ says), "split": split})
    data = write(folder / "rows.csv", rows)
    columns = ["data.path_column.image=photo", "data.columns.title=text"]
    both = learned(data, columns)
    for alone in ("image", "text"):
        kept = "data.path_column.image=photo" if alone == "image" else "data.columns.title=text"
        part = write(folder / alone / "rows.csv", [{**row, "photo": f"../{row['photo']}"} for row in rows])
        yield f"{name}: {alone} alone {learned(part, [kept]):.4f}"
    yield f"{name}: together {both:.4f}, {len(rows):,} rows"


PARTS: dict[str, Callable[[str, Path], Iterable[str]]] = {
    "breast-cancer": table, "wine": table, "packages": packages, "packages-mixed": packages, "man": man,
    "vibration": series, **dict.fromkeys(ARCHIVED, series), "xor": xor,
}  # fmt: skip


def main() -> None:
    """Print a line for each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="|".join(PARTS))
    for part in parser.parse_args().parts:
        with tempfile.TemporaryDirectory() as folder:
            for line in PARTS[part](part, Path(folder)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
