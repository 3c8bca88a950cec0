"""Exported models answer as the model does: every kind of input, other sizes, missing modalities, other programs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from perceiver_cli.config import Config, load_preset
from perceiver_cli.data.loader import collate
from perceiver_cli.data.model_inputs import write_model_inputs
from perceiver_cli.errors import IntegrityError, UsageError
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model import export as exporting
from perceiver_cli.model.checkpoint import Calibration, ModelInfo, load_model, read_info, save_model, store_calibration
from perceiver_cli.model.encoding import axis_features, grid_positions
from perceiver_cli.model.ensemble import Ensemble
from perceiver_cli.model.export import export_model, exported, made_up, segments_of
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality, settled
from tests.conftest import Perceive

EXAMPLES = Path(__file__).parents[2] / "examples"
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed: pip install 'perceiver-cli[onnx]'",
)
TINY = ["tiny-image", "tiny-audio", "tiny-points", "tiny-video", "tiny-av"]
# The other kinds of model, as small as they can be.
KINDS = {
    "learned, permuted": ("image", ["inputs.image.positions=learned", "inputs.image.permutation=3"]),
    "convolution, query": ("image", ["inputs.image.stem=conv-same", "model.head=query", "inputs.image.patch=[1, 1]"]),
    "projected": ("image", ["model.num_cross_heads=2", "model.num_latents=4", "inputs.image.bands=2"]),
    "raw sound": ("audio", ["inputs.audio.features=raw", "inputs.audio.patch=[64]", "inputs.audio.clip_s=0.5"]),
}


def build(config: Config) -> tuple[Perceiver, ModelInfo]:
    specs = {name: settled(spec) for name, spec in config.inputs.items()}
    layouts = {name: modality(name).layout(spec) for name, spec in specs.items()}
    model = Perceiver(config.model, layouts, 10).eval()
    nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model, ModelInfo(config.model_copy(update={"inputs": specs}), tuple("abcdefghij"), 1, {})


def runner(data: bytes, suffix: str, names: list[str]) -> exporting.Run:
    if suffix == ".pt2":
        module = torch.export.load(io.BytesIO(data)).module()
        return lambda inputs: [out.detach().numpy() for out in module(*(torch.from_numpy(inputs[n]) for n in names))]
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == names
    return lambda inputs: session.run(["logits", "probabilities"], dict(inputs))


def check(model: Perceiver, info: ModelInfo, suffix: str) -> bytes:
    """Export, and compare with the model itself: batches of 1 and 5, each modality there and missing."""
    data, metadata, difference = exported(model, info, suffix)
    assert difference <= 1e-4
    layouts = model.encoding.layouts
    run = runner(data, suffix, list(metadata["inputs"]))
    rng = np.random.default_rng(7)
    for count in (1, 5):
        inputs = made_up(layouts, count, 0, rng)
        for missing in [None, *layouts] if len(layouts) > 1 else [None]:
            for name in layouts:
                if len(layouts) > 1:
                    inputs[f"{name}_present"] = np.full(count, name != missing)
            with torch.inference_mode():
                expected = model(segments_of(layouts, inputs))
            logits, probabilities = run(inputs)
            assert float(expected.std()) > 0.01  # something was said
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            np.testing.assert_allclose(probabilities, expected.softmax(-1), atol=1e-4)
    return data


@pytest.mark.parametrize(
    ("preset", "suffix"),
    [
        *(pytest.param(preset, ".onnx", marks=needs_onnx) for preset in TINY),
        ("tiny-points", ".pt2"),
    ],
)
def test_tiny_presets_are_equal(preset: str, suffix: str) -> None:
    model, info = build(load_preset(preset))
    data = check(model, info, suffix)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert len(data) < 1.4 * weights + 100_000  # each shared weight once: twice would be more


@pytest.mark.parametrize("kind", KINDS)
@needs_onnx
def test_other_kinds_of_model_are_equal(kind: str) -> None:
    name, changes = KINDS[kind]
    small = ["model.num_latents=8", "model.latent_channels=32", "model.num_self_heads=2", "model.schedule=c0 t0 c1"]
    small += ["inputs.image.size=[16, 16]", "inputs.image.patch=[2, 2]"] if name == "image" else []
    check(*build(load_preset(f"tiny-{name}").override([*small, *changes])), ".onnx")


@needs_onnx
def test_imagenet_is_equal() -> None:
    """Its inputs and cross-attends, with fewer and smaller latents: all of it takes a minute, and is in the README."""
    changes = ["model.num_latents=64", "model.latent_channels=256", "model.schedule=c0 t0 c1 t0"]
    model, info = build(load_preset("imagenet").override([*changes, "model.self_attends_per_block=1"]))
    data, _, difference = exported(model, info, ".onnx")
    assert difference <= 1e-4
    assert len(data) < 4.1 * sum(parameter.numel() for parameter in model.parameters()) + 100_000


@needs_onnx
def test_a_run_by_command(perceive: Perceive, trained: Path, bars: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes((trained / "model.safetensors").read_bytes())
    store_calibration(model, Calibration(1.7), read_info(model))
    output = tmp_path / "out.onnx"
    done = perceive("export", model, "-o", output, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["difference"] <= 1e-4
    assert facts["bytes"] == output.stat().st_size
    assert b"largest difference" in done.stderr
    assert b"[torch.onnx]" not in done.stdout + done.stderr
    assert b"Warning" not in done.stderr

    predictor = Predictor(model)
    files = sorted((bars / "test").rglob("*.png"))[::7]
    rows = [
        row for path in files for row in predictor.reader.views(predictor.reader.decode(*[example(predictor, path)]))
    ]
    values = collate(rows)["image"].values.numpy().astype(np.float32)
    run = runner(output.read_bytes(), ".onnx", ["image"])
    expected = [prediction.probs for prediction in predictor.predict(files)]
    np.testing.assert_allclose(run({"image": values})[1], expected, atol=1e-4)  # the temperature is in it
    wider = np.concatenate([values, values], axis=2)  # sizes that it was not trained on
    assert run({"image": wider})[1].sum(axis=1) == pytest.approx(np.ones(len(files)), abs=1e-4)
    assert str(tmp_path).encode() not in output.read_bytes()


def example(predictor: Predictor, path: Path) -> object:
    (only,) = predictor.examples(str(path))
    return only


@needs_onnx
def test_metadata_is_enough_to_use_it(trained: Path, bars: Path, tmp_path: Path) -> None:
    import onnxruntime

    written = export_model(trained, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["left", "middle", "right"]
    assert json.loads(about["inputs"]) == written.inputs
    shape = ["batch", "image_side_1", "image_side_2", written.inputs["image"]["trained_shape"][-1]]
    assert written.inputs["image"]["shape"] == session.get_inputs()[0].shape == shape
    preparation = json.loads(about["preparation"])["image"]
    assert "bicubic" in preparation["in_words"]
    assert preparation["options"]["color"] == "grey"
    assert json.loads(about["decision"]) == {"temperature": 1.0}

    files = sorted((bars / "test").rglob("*.png"))[::5]
    script = EXAMPLES / "predict_with_onnx.py"
    blocked = (
        "import sys; sys.modules['torch'] = sys.modules['perceiver_cli'] = None; import runpy; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, script, tmp_path / "m.onnx", *files], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for line, prediction in zip(found, Predictor(trained).predict(files), strict=True):
        assert (line["path"], line["label"]) == (prediction.path, prediction.label)
        assert line["prob"] == pytest.approx(prediction.prob, abs=1e-4)


def test_missing_modalities_by_name() -> None:
    model, info = build(load_preset("tiny-av"))
    inputs = exporting.metadata_of(model, info)["inputs"]
    assert list(inputs) == ["audio", "audio_present", "video", "video_present"]
    assert inputs["audio_present"] == {"modality": "audio", "shape": ["batch"], "dtype": "bool"}


def test_places_are_those_of_a_grid() -> None:
    layout = modality("image").layout(settled(load_preset("imagenet").inputs["image"]))
    for side in (2, 3, 224, 333):
        places = exporting._places(side)
        torch.testing.assert_close(places, grid_positions((side,)), atol=1.2e-7, rtol=0)
        ours, usual = (axis_features(layout, [p])[0] for p in (places, grid_positions((side,))))
        assert float((ours - usual).abs().max()) < 1e-4


# ---------------------------------------------------------------- refusals


def test_a_difference_is_an_error_and_nothing_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting._WRITERS[".pt2"]

    def wrong(*arguments: object) -> tuple[bytes, exporting.Run]:
        data, run = real(*arguments)  # type: ignore[arg-type]
        return data, lambda inputs: [out + 2e-4 for out in run(inputs)]

    monkeypatch.setitem(exporting._WRITERS, ".pt2", wrong)
    with pytest.raises(IntegrityError, match=r"differs from the original by 0.0002, more than 0.0001"):
        export_model(trained, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_refusals_in_words(perceive: Perceive, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = perceive("export", trained, "-o", tmp_path / "m.tflite")
    assert done.returncode == 2
    assert b"expected .onnx or .pt2" in done.stderr
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"onnx needs onnx, onnxscript, onnxruntime; pip install 'perceiver-cli\[onnx\]'"
    ):
        export_model(trained, tmp_path / "m.onnx")
    monkeypatch.undo()
    if find_spec("onnxruntime") is not None:
        monkeypatch.setattr(exporting, "MAX_ONNX_BYTES", 1000)
        with pytest.raises(UsageError, match=r"bytes of weights, ONNX holds 1,000 in one file; export to .pt2"):
            export_model(trained, tmp_path / "m.onnx")
    assert not list(tmp_path.glob("m.*"))


def test_thresholds_travel_along(trained: Path, tmp_path: Path) -> None:
    model, info = load_model(trained / "model.safetensors")
    config = info.config.model_copy(update={"multi_label": True})
    several = ModelInfo(config, info.classes, 1, {}, calibration=Calibration(2.0, (0.1, 0.2, 0.3)))
    save_model(tmp_path / "model.safetensors", model.state_dict(), several)
    _, metadata, _ = exported(model, several, ".pt2")
    assert metadata["probabilities"] == "sigmoid"
    assert metadata["decision"] == {"temperature": 2.0, "thresholds": {"left": 0.1, "middle": 0.2, "right": 0.3}}


def test_an_ensemble_is_one_graph_with_the_mean_of_the_probabilities(trained: Path, tmp_path: Path) -> None:
    one, info = load_model(trained / "model.safetensors")
    assert isinstance(one, Perceiver)
    other = Perceiver(info.config.model, one.encoding.layouts, len(info.classes), seed=1)
    nn.init.normal_(other.head.weight, generator=torch.Generator().manual_seed(0))
    both = Ensemble([one, other], multi_label=False)
    save_model(tmp_path / "both.safetensors", both.state_dict(), replace(info, members=2))
    found = export_model(tmp_path / "both.safetensors", tmp_path / "both.pt2")
    assert found.difference < 1e-4
    inputs = made_up(one.encoding.layouts, 2, 0, np.random.default_rng(0))
    with torch.no_grad():
        segments = segments_of(one.encoding.layouts, inputs)
        own = torch.stack([model.eval()(segments).softmax(dim=1) for model in (one, other)])
        assert torch.allclose(both.eval()(segments).softmax(dim=1), own.mean(dim=0), atol=1e-6)


def test_model_inputs_are_what_the_graph_takes(paired: Path, pairs: Path, tmp_path: Path) -> None:
    """`preprocess -o one.npy` wrote rows with Fourier features where the graph takes patches and a presence."""
    folder = pairs / "test" / "top-low"
    named = [str(folder), str(folder / "000.png"), str(pairs / "none.png")]
    *lines, bad = write_model_inputs(named, str(paired), tmp_path / "inputs.npz", {})
    assert [line["rows"] for line in lines] == [[row] for row in range(9)]
    assert "No such file" in bad["error"]
    arrays = dict(np.load(tmp_path / "inputs.npz"))
    model, info = load_model(paired / "model.safetensors")
    assert isinstance(model, Perceiver)
    expected = exporting.metadata_of(model, info)["inputs"]
    assert {name: (array.shape[1:], str(array.dtype)) for name, array in arrays.items()} == {
        name: (tuple(facts.get("trained_shape", ())), facts["dtype"]) for name, facts in expected.items()
    }
    assert arrays["audio_present"].tolist() == [True] * 8 + [False]
    with torch.no_grad():
        found = model(segments_of(model.encoding.layouts, arrays)).softmax(dim=1)
    answers = list(Predictor(paired).predict(named[:2]))
    np.testing.assert_allclose(found, [answer.probs for answer in answers], atol=1e-5)
    with pytest.raises(UsageError, match=r"expected \.npz"):
        next(write_model_inputs(named, str(paired), tmp_path / "inputs.tar", {}))
