"""Write scikit-learn's wines as a manifest, FOLDER/wine.csv: six measures as cells, seven as the bars of a picture.

python examples/write_wine.py wine
perceiver train wine/wine.csv --column 'bars=image,*=auto' -o wine/run
perceiver evaluate wine/wine.csv -m wine/run --worth          # what the picture adds to the cells, and they to it
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_wine

AS_CELLS = 6  # measures; the others are bars
BAR, HEIGHT = 4, 28  # width of a bar and height of a picture in pixels


def write_wine(folder: Path) -> None:
    """Write the manifest, whose fifth row of each five is in the split test, and a picture for each row."""
    wines = load_wine()
    (folder / "bars").mkdir(parents=True, exist_ok=True)
    lowest, highest = wines.data.min(axis=0), wines.data.max(axis=0)
    levels = ((wines.data - lowest) / (highest - lowest))[:, AS_CELLS:]
    with (folder / "wine.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["bars", *wines.feature_names[:AS_CELLS], "label", "split"])
        for number, (row, own, target) in enumerate(zip(wines.data, levels, wines.target, strict=True)):
            is_bar = np.arange(HEIGHT, 0, -1)[:, None] <= np.repeat(own * HEIGHT, BAR)
            Image.fromarray((255 * is_bar).astype(np.uint8)).save(folder / "bars" / f"{number:03d}.png")
            cells = [f"{value:g}" for value in row[:AS_CELLS]]
            split = "test" if number % 5 == 4 else "train"
            table.writerow([f"bars/{number:03d}.png", *cells, wines.target_names[target], split])


if __name__ == "__main__":
    write_wine(Path(sys.argv[1] if len(sys.argv) > 1 else "wine"))
