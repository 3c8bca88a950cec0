"""What an extension costs: a modality, a preset and a file format are one file or one entry, and nothing else."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import perceiver_cli
from perceiver_cli.errors import UsageError
from perceiver_cli.preprocess import container, image, mesh_files, modality, names, register, sound_files
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.plugins import load_plugin
from perceiver_cli.preprocess.points import PointsModality, PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from tests.conftest import Perceive, decode, detect, warm

PACKAGE = Path(perceiver_cli.__file__).parent
EXAMPLE = PACKAGE.parents[1] / "examples" / "custom_modality.py"
TAKEN = """
from perceiver_cli import register
from perceiver_cli.preprocess.image import ImageModality
class Mine(ImageModality): pass
register(Mine())
"""
SPLITS = {"train": 20, "test": 8}  # curves of each class
RECIPE = """# Light curves: a preset of one file.
[model]
num_latents = 4
latent_channels = 16
num_self_heads = 2
schedule = "c0 t0"
self_attends_per_block = 1

[inputs.curve]
length = 32

[train]
max_steps = 60
batch_size = 16
optimizer = "adamw"
lr = 0.01
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a package, without compiled code."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, a copy of the package that has one more modality and one more preset, and its program."""
    root = tmp_path_factory.mktemp("extended")
    copy = root / "src" / "perceiver_cli"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE, copy / "preprocess" / "curve.py")
    (copy / "presets" / "dips.toml").write_text(RECIPE)
    (root / "curves.toml").write_text(RECIPE)
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for label, center in (("early", 25), ("late", 75)):
            (root / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                curve = rng.normal(0, 0.05, 100)
                curve[center - 8 : center + 8] -= 1
                lines = "".join(f"{value:.4f}\n" for value in curve)
                # The suffix says nothing: the content decides.
                (root / "data" / split / label / f"{number:02d}.dat").write_text(f"# curve\n{lines}")
    (root / "bin").mkdir()
    with warm(root / "bin", **environment(root)):
        yield root


def environment(root: Path) -> dict[str, str]:
    """Return the variables that make Python import the copied package."""
    return {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


def perceiver(root: Path, *words: str) -> str:
    """Return the stdout of a command of the copied package, which must succeed."""
    done = subprocess.run(
        [root / "bin" / "perceiver", *words], cwd=root, capture_output=True, text=True, timeout=300,
        env=os.environ | environment(root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_modality_is_one_file(extended: Path) -> None:
    perceiver(extended, "train", "data", "-o", "run", "--config", "curves.toml", "--device", "cpu")
    assert json.loads(perceiver(extended, "info", "run", "--json"))["inputs"].keys() == {"curve"}

    report = json.loads(perceiver(extended, "evaluate", "data", "-m", "run", "--json"))
    assert report["num_examples"] == 2 * SPLITS["test"]
    assert report["accuracy"] > 0.9

    path = "data/test/late/00.dat"
    (line,) = perceiver(extended, "predict", path, "-m", "run", "--format", "jsonl").splitlines()
    assert json.loads(line)["label"] == "late"

    perceiver(extended, "preprocess", "data", "-m", "run", "-o", "curves.tar")
    stored = json.loads(perceiver(extended, "evaluate", "curves.tar", "-m", "run", "--json"))
    assert stored["num_examples"] == report["num_examples"]
    assert stored["loss"] == pytest.approx(report["loss"], abs=1e-6)
    perceiver(extended, "preprocess", path, "-m", "run", "-o", "rows.npy")
    assert np.load(extended / "rows.npy").shape == (32, 1 + 2 * 8 + 1)  # value, sines and cosines, position

    before, after = files_of(PACKAGE), files_of(extended / "src" / "perceiver_cli")
    assert after.keys() - before.keys() == {"preprocess/curve.py", "presets/dips.toml"}
    assert all(after[name] == content for name, content in before.items())


def test_a_plugin_is_one_file_that_the_user_names(perceive: Perceive, tmp_path: Path) -> None:
    """A model of a modality of one's own could be trained from Python, and then used nowhere."""
    (tmp_path / "curves.toml").write_text(RECIPE)
    facts = json.loads(perceive("info", "curves.toml", "--json", "--plugin", EXAMPLE, cwd=tmp_path).stdout)
    assert facts["inputs"].keys() == {"curve"}
    told = perceive("info", "curves.toml", cwd=tmp_path)
    assert told.returncode == 2
    assert b"unknown modality 'curve'" in told.stderr
    assert b"--plugin FILE.py" in told.stderr


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("none.txt", "", "no such Python file"),
        ("numpy.py", "", "another module is called numpy"),
        ("broken_plugin.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("taken_plugin.py", TAKEN, "modality 'image' needs a name of its own"),
    ],
)
def test_a_plugin_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, fault: str
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=fault):
        load_plugin(tmp_path / name)


def test_detection_asks_the_new_modality_by_content(extended: Path) -> None:
    script = (
        "import sys\n"
        "from perceiver_cli.preprocess import names\nfrom perceiver_cli.preprocess.detection import detected\n"
        "from perceiver_cli.preprocess.source import Source\n"
        "print(detected(Source('x', b'# curve\\n1\\n')).kinds)\n"
        "print(detected(Source('x.xyz', b'# other\\n1 2 3\\n')).kinds)\n"
        "print(names())\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(extended / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    by_content, by_name_alone, known = map(ast.literal_eval, done.stdout.splitlines())
    assert by_content == ("curve",)
    assert by_name_alone == ("points",)
    assert known == ("curve", "video", "image", "audio", "points", "series", "text", "table")


def test_a_preset_is_one_file(extended: Path) -> None:
    listed = perceiver(extended, "presets").splitlines()
    assert any(line.split() == ["dips", "Light", "curves:", "a", "preset", "of", "one", "file."] for line in listed)
    facts = json.loads(perceiver(extended, "info", "dips", "--json"))
    assert facts["latents"] == {"count": 4, "channels": 16}
    options = ("--preset", "dips", "--steps", "2", "--device", "cpu")
    best = perceiver(extended, "train", "data", "-o", "by-preset", *options)
    assert best.splitlines()[-1] == "by-preset/model.safetensors"


# ---------------------------------------------------------------- file formats: one entry of one table


def read_floats(source: Source, data: bytes, limits: Limits) -> mesh_files.Mesh:
    """Return the points of a made-up format: a signature, then coordinates in float32."""
    points = np.frombuffer(data[4:], "<f4").reshape(-1, 3).astype(np.float64)
    mesh_files.check_counts(source, len(points), 0, limits)
    return mesh_files.Mesh(points)


def test_a_mesh_format_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.arange(30, dtype="<f4").reshape(10, 3)
    source = Source("cloud.flt", b"FLT1" + points.tobytes())
    assert "points" not in kinds_of(source)
    made_up = mesh_files.MeshFormat(lambda head, suffix: head.startswith(b"FLT1"), read_floats)
    monkeypatch.setitem(mesh_files.FORMATS, "FLT", made_up)
    assert detect(source) == "points"
    assert np.array_equal(decode(source, PointsSpec(), Limits()), points)
    with pytest.raises(perceiver_cli.PerceiverError, match="10 vertices > 5"):
        decode(source, PointsSpec(), Limits(vertices=5))
    with pytest.raises(perceiver_cli.PerceiverError, match="cannot decode the points"):  # what a reader raises
        decode(Source("x", source.data + b"?" if source.data else b""), PointsSpec(), Limits())


def kinds_of(source: Source) -> tuple[str, ...]:
    """Return the modalities that read a source, none if its format is unknown."""
    return tuple(name for name in names() if modality(name).sniff(source.head(), source.name))


@pytest.mark.parametrize(("module", "kind"), [(sound_files, "audio"), (container, "video")])
def test_a_format_of_sound_or_video_is_one_entry(
    module: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("x", b"MADE UP")
    assert kind not in kinds_of(source)
    monkeypatch.setitem(module.FORMATS, "made up", rb"MADE.UP")
    assert detected(source).kinds[0] == kind


def test_an_image_format_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    # PCX is a format of Pillow that is not read: 1 x 1 pixel, 8 bits, one plane.
    head = bytes([10, 5, 1, 8, 0, 0, 0, 0, 0, 0, 0, 0]) + bytes(53) + bytes([1, 2, 0, 1, 0]) + bytes(58)
    source = Source("x", head + b"\x07\x00" + b"\x0c" + bytes(768))
    assert "image" not in kinds_of(source)
    monkeypatch.setitem(image.FORMATS, "PCX", (rb"\x0a\x05\x01", "PCX"))
    assert detect(source) == "image"
    assert decode(source, ImageSpec(), Limits()).shape == (1, 1, 3)


# ---------------------------------------------------------------- the registry


def test_every_modality_says_what_others_ask_of_it() -> None:
    """The numbers that evaluation, lint and preprocess take from a modality, without naming it."""
    views = {name: modality(name).num_views(InputSpec.kinds[name]()) for name in ("audio", "image", "points", "video")}
    assert set(views.values()) == {1}
    for name in ("audio", "video"):
        spec = InputSpec.kinds[name].model_validate({"eval_windows": 3})
        assert modality(name).num_views(spec) == 3
    assert modality("video").contains == ("audio",)
    assert all(modality(name).preparation for name in views)
    assert [name for name in views if modality(name).can_mix] == ["audio", "image"]
    from perceiver_cli.config import load_preset

    for name in views:
        preset = modality(name).paper_preset
        assert preset is not None
        assert load_preset(preset).inputs.keys() == {name}


def test_faults_of_decoded_arrays() -> None:
    fault = {name: modality(name).fault for name in ("audio", "image", "points", "video")}
    ramp = np.arange(300, dtype=np.float32)
    assert fault["audio"](ramp * 0 + 0.5) == "silent"
    assert fault["audio"](np.sin(ramp)) is None
    assert fault["image"](np.full((10, 10, 3), (1, 2, 3), np.uint8)) == "constant"
    assert fault["image"](np.arange(300, dtype=np.uint8).reshape(10, 10, 3)) is None
    assert fault["points"](ramp[:30].reshape(10, 3)) == "tiny"
    assert fault["points"](ramp.reshape(100, 3)) is None
    assert fault["points"](np.ones((100, 3), np.float32)) == "constant"
    assert fault["video"](np.zeros((4, 5, 5, 3), np.uint8)) == "constant"


def test_a_name_belongs_to_its_file() -> None:
    class Impostor(PointsModality):
        """Another class under the name of a file of the package."""

    with pytest.raises(UsageError, match="a name of its own"):
        register(Impostor())
    assert type(modality("points")) is PointsModality
