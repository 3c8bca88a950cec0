"""Tables of numbers: points only by shape and name, or if the user asks; and the forms that writers give them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.data.catalog import scan
from perceiver_cli.data.inputs import examples_of
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.points import MODALITY as POINTS, PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import Perceive, write_images

SPEC = PointsSpec(pool_points=500, num_points=64)
RNG = np.random.default_rng(0)


def load(data: bytes, name: str = "a.xyz", spec: PointsSpec = SPEC) -> np.ndarray:
    return POINTS.load(Source(name, data), spec, Limits())


def text(rows: np.ndarray, gap: str = " ", places: int = 6) -> bytes:
    return "".join(gap.join(f"{x:.{places}f}" for x in row) + "\n" for row in rows.tolist()).encode()


def with_normals(count: int, more: int = 0) -> np.ndarray:
    """Return rows of points, unit normals and more numbers, as in ModelNet40's resampled files."""
    normals = RNG.normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return np.hstack([RNG.uniform(-1, 1, (count, 3)), normals, RNG.integers(0, 9, (count, more))])


def npy(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TIME = np.arange(200)[:, None] / 100
TABLES = {  # name: bytes that are no cloud, however their columns are counted
    "yolo.txt": b"0 0.5 0.5 0.2 0.3\n16 0.1 0.2 0.05 0.1\n",
    "yolo-pose.txt": b"0 0.5 0.5 0.2 0.3 0.1 0.2 2 0.3 0.4 2\n",
    "one-box.txt": b"0 0.5 0.5\n",
    "landmarks.txt": text(RNG.uniform(0, 224, (68, 2))),
    "landmarks-3d.txt": text(RNG.uniform(0, 224, (68, 3))),
    "300w.pts": b"version: 1\nn_points: 68\n{\n" + text(RNG.uniform(0, 224, (68, 2))) + b"}\n",
    "pitch.csv": text(np.hstack([TIME, RNG.uniform(80, 300, (200, 2))]), ","),
    "acceleration.csv": b"time,ax,ay,az\n" + text(np.hstack([TIME, RNG.normal(size=(200, 3))]), ","),
    "gyro.txt": text(RNG.normal(size=(500, 6))),
    "eeg.csv": text(RNG.normal(size=(128, 14)), ","),
    "grid.asc": b"ncols 3\nnrows 2\nxllcorner 0\nyllcorner 0\ncellsize 1\n1 2 3\n4 5 6\n",
    "water.xyz": b"3\nwater\nO 0 0 0\nH 0.7 0.5 0\nH -0.7 0.5 0\n",
    "benzene.xyz": b"40\n\n" + text(np.hstack([RNG.integers(1, 9, (40, 1)), RNG.normal(size=(40, 3))])),
    "five.xyz": text(RNG.normal(size=(50, 5))),
    "eeg.npy": npy(RNG.normal(size=(128, 14)).astype(np.float32)),
    "spectrogram.npy": npy(RNG.normal(size=(128, 431)).astype(np.float32)),
    "picture.npy": npy(RNG.normal(size=(64, 64))),
    "motion.npy": npy(RNG.normal(size=(300, 3)).astype(np.float32)),
    "embedding.bin": RNG.normal(size=512).astype("<f4").tobytes(),
    "waves.npy": npy(RNG.normal(size=1000)),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_not_taken_for_points(name: str) -> None:
    assert not POINTS.sniff(TABLES[name][:4096], name)


@pytest.mark.parametrize("name", [name for name in TABLES if name not in ("spectrogram.npy",)])
def test_a_refused_table_is_named_with_the_way_to_take_it_in(name: str) -> None:
    with pytest.raises(DataError) as caught:
        detected(Source(name, TABLES[name]))
    message = str(caught.value)
    assert "\n" not in message
    asked = POINTS.may_read(TABLES[name], name)
    assert asked == ("pass --preset tiny-points" in message and "column points of a manifest" in message)
    if name == "acceleration.csv":
        assert "a table of 4 numbers a line, which could be anything" in message
    if name == "picture.npy":
        assert "an array of float64 (64, 64), which could be anything" in message


@pytest.mark.parametrize("name", ["yolo.txt", "landmarks-3d.txt", "pitch.csv", "motion.npy", "eeg.npy"])
def test_a_table_beside_a_picture_adds_nothing(tmp_path: Path, name: str) -> None:
    """Read as a cloud, a table that tells the label would make noise pictures perfectly known."""
    write_images(tmp_path / "d", {"a": 3, "b": 3})
    for picture in (tmp_path / "d").rglob("*.png"):
        picture.with_suffix(Path(name).suffix).write_bytes(TABLES[name])
    catalog = scan(tmp_path / "d")
    assert catalog.modalities == ("image",)
    assert any("6 tables of numbers beside files of the same stem" in note for note in catalog.notes)


@pytest.mark.parametrize("shape", [(64, 64), (128, 431)])
def test_arrays_of_pictures_are_not_byte_arrays_by_themselves(tmp_path: Path, shape: tuple[int, int]) -> None:
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", RNG.normal(size=shape).astype(np.float32))
    with pytest.raises(DataError, match=r"no usable files: 0 of 4 files are used; passed over 4 .npy"):
        scan(tmp_path)


@pytest.mark.parametrize("gap", [" ", ","])
@pytest.mark.parametrize("more", [0, 1])
def test_whole_folders_of_points_with_normals_are_read(tmp_path: Path, gap: str, more: int) -> None:
    """`modelnet40_normal_resampled` has lists beside its class folders, and ShapeNet a seventh column."""
    for name in ("chair/chair_0001", "chair/chair_0002", "lamp/lamp_0001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_bytes(text(with_normals(300, more), gap))
    (tmp_path / "modelnet40_train.txt").write_text("chair_0001\n")
    catalog = scan(tmp_path)
    assert catalog.modalities == ("points",)
    assert len(catalog.splits["train"]) == 3
    assert POINTS.sniff(npy(with_normals(300))[:4096], "a.npy")


def test_normals_must_be_in_every_row() -> None:
    rows = with_normals(300)
    rows[20, 3] += 0.5
    assert not POINTS.sniff(text(rows)[:4096], "a.txt")
    assert not POINTS.sniff(text(with_normals(5)), "a.txt")  # a few rows could be chance


def test_the_user_may_ask(tmp_path: Path) -> None:
    rows = RNG.normal(size=(100, 3))
    for name in ("a/1.npy", "b/1.npy", "a/2.npy", "b/2.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, rows)
    reads = {"points": SPEC}
    assert scan(tmp_path, reads=["points"]).modalities == ("points",)  # as with --preset tiny-points
    (example,) = examples_of(str(tmp_path / "a" / "1.npy"), reads, Limits())
    assert example.error is None
    assert len(list(examples_of(str(tmp_path), reads, Limits()))) == 4
    (two,) = examples_of(str(tmp_path / "a" / "1.npy"), reads | {"image": SPEC}, Limits())
    assert two.error is not None
    # A manifest that names a column of points asks too.
    lines = [{"points": f"{name}/{i}.npy", "label": name} for name in "ab" for i in (1, 2)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert scan(tmp_path / "m.jsonl").modalities == ("points",)


def test_a_folder_of_meshes_takes_no_table_in(tmp_path: Path) -> None:
    """Even where points are asked for, a table beside clouds that say what they are is not one more cloud."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.xyz").write_bytes(text(RNG.normal(size=(100, 3))))
        (tmp_path / name / "1.txt").write_bytes(TABLES["landmarks-3d.txt"])
    assert len(scan(tmp_path, reads=["points"]).splits["train"]) == 2


def test_predict_reads_a_named_table(perceive: Perceive, tmp_path: Path) -> None:
    for k, name in enumerate("ab"):
        for i in range(8):
            (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
            rows = RNG.normal(size=(100, 3)) * ((1, 1, 0.1), (0.1, 1, 1))[k]
            np.save(tmp_path / "d" / name / f"{i}.npy", rows)
    small = ["--set", "inputs.points.num_points=64", "--steps", "3", "-o", "run", "--device", "cpu"]
    refused = perceive("train", "d", *small, cwd=tmp_path)
    assert refused.returncode == 3
    done = perceive("train", "d", "--preset", "tiny-points", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for named in (["d/a/0.npy"], ["d"], ["d/a/0.npy", "d/b/1.npy"]):
        done = perceive("predict", *named, "-m", "run", "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = perceive("predict", "-", "-m", "run", "--device", "cpu", cwd=tmp_path, stdin=text(rows))
    assert done.returncode == 0, done.stderr
    for model in (["-m", "run"], ["--preset", "tiny-points"]):
        done = perceive("preprocess", "d/a/0.npy", *model, "-o", "x.tar", cwd=tmp_path)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- forms of text

POINTS_OF = np.array([[1.5, 2.5, 3.5], [-4.0, 5.25, 6.0], [7.0, 8.0, 9.125]])
PLAIN = text(POINTS_OF)
FORMS = {
    "comments": (b"# x y z\n// by hand\n\n% more\n" + PLAIN, "a.xyz"),
    "comments within": (PLAIN.replace(b"\n", b"\n# next\n", 1), "a.xyz"),
    "slashes within": (PLAIN.replace(b"\n", b"\n// next\n", 1), "a.xyz"),
    "names": (b"X Y Z\n" + PLAIN, "a.xyz"),
    "CloudCompare": (b"//X Y Z\n3\n" + PLAIN, "a.asc"),
    "names and commas": (b"x,y,z\n" + PLAIN.replace(b" ", b","), "a.xyz"),
    "quoted names": (b'"x","y","z"\n' + PLAIN.replace(b" ", b","), "a.xyz"),
    "names in another order": (b"i z y x\n" + text(np.hstack([POINTS_OF[:, :1], POINTS_OF[:, ::-1]])), "a.xyz"),
    "a count": (b"3\n" + PLAIN, "a.pts"),
    "a count and CRLF": ((b"3\n" + PLAIN).replace(b"\n", b"\r\n"), "a.PTS"),
    "CR": (PLAIN.replace(b"\n", b"\r"), "a.xyz"),
    "BOM": (b"\xef\xbb\xbf" + PLAIN, "a.xyz"),
    "BOM and names": (b"\xef\xbb\xbfx y z\r\n" + PLAIN.replace(b"\n", b"\r\n"), "a.xyz"),
    "tabs": (PLAIN.replace(b" ", b"\t"), "a.xyz"),
    "blanks around": (b"  " + PLAIN.replace(b"\n", b"  \n").replace(b" ", b"   "), "a.xyz"),
    "semicolons": (PLAIN.replace(b" ", b";"), "a.xyz"),
    "commas": (PLAIN.replace(b" ", b", "), "a.xyz"),
    "commas at the ends": (PLAIN.replace(b" ", b",").replace(b"\n", b",\n"), "a.xyz"),
    "decimal commas": (PLAIN.replace(b".", b","), "a.xyz"),
    "decimal commas and semicolons": (PLAIN.replace(b".", b",").replace(b" ", b";"), "a.xyz"),
    "no last line end": (PLAIN[:-1], "a.xyz"),
    "long comments": (b"# about these points\n" * 400 + PLAIN, "a.xyz"),
    "colours": (text(np.hstack([POINTS_OF, POINTS_OF])), "a.xyzrgb"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_text_gives_the_same_points(form: str) -> None:
    data, name = FORMS[form]
    assert detected(Source(name, data)).kinds == ("points",)
    assert load(data, name).tolist() == POINTS_OF.tolist()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"4\n" + PLAIN, "declared 4 points, found 3"),
        (b"2\n" + PLAIN, "declared 2 points, found 3"),
        (b"1,5 2.5 3,5\n" * 3, "not a format of points"),
        (b"1.234,5 2.345,6 3.456,7\n", "not a format of points"),
        (b"1.5,2.5,3.5\n" * 500 + b"1,5 2,5 3,5\n", "commas separate numbers in some lines"),
        (b"1 2 3\n" * 2000 + b"1,5 2,5 3,5\n", "commas separate numbers in some lines"),
        (b"1 2 3\n" * 2000 + b"and so on\n", "cannot decode"),
        (b"nan nan nan\n" * 3, "not finite"),
        (b"1 2 3\n" * 3, "all 3 points are at the same place"),
    ],
)
def test_a_text_that_contradicts_itself_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(data)


@pytest.mark.parametrize("bad", ["nan nan nan", "NaN 0 0", "inf 0 0", "0 0 -inf"])
def test_points_that_are_not_finite_are_left_out_and_counted(bad: str) -> None:
    for data in (PLAIN + f"{bad}\n".encode(), f"{bad}\n".encode() + PLAIN):
        source = Source("a.xyz", data)
        assert detected(source).kinds == ("points",)
        assert POINTS.load(source, SPEC, Limits()).tolist() == POINTS_OF.tolist()
        assert source.notes == ["left out 1 of 4 points that are not finite numbers"]


def test_pictures_are_still_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.xyz", "PNG")
    assert detected(Source(str(tmp_path / "a.xyz"))).kinds == ("image",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("picture.npy", b"an array of float64 (64, 64), which could be anything; to read it as series, name it in a "),
        ("spectrogram.npy", b"an array of float32 (128, 431), which could be anything; to read it as a byte array"),
        (
            "eeg.npy",
            b"an array of float32 (128, 14), which could be anything; to read it as points or series, name it in a",
        ),
    ],
)
def test_a_folder_of_tables_is_refused_by_name(perceive: Perceive, tmp_path: Path, name: str, words: bytes) -> None:
    for place in ("a", "b"):
        (tmp_path / "d" / place).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "d" / place / f"{i}{Path(name).suffix}").write_bytes(TABLES[name])
    done = perceive("train", "d", "-o", "run", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.count(b"\n") == 1
    assert words in done.stderr
    if name == "spectrogram.npy":
        done = perceive("train", "d", "--preset", "tiny-image", "--dry-run", cwd=tmp_path)
        assert done.returncode == 3
        assert b"a byte array of 128 x 431, expected" in done.stderr
