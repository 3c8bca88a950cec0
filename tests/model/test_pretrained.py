"""Weights of transformers: the same logits, the same pixels, and every other file refused with words.

The models are transformers' own classes with random weights all over, so that no bias or statistic can hide.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from perceiver_cli.config import load_preset
from perceiver_cli.errors import IntegrityError, PerceiverError, UsageError
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model import pretrained
from perceiver_cli.model.checkpoint import ModelInfo, load_model, read_info
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.pretrained import CONV, FOURIER, LEARNED, Variant, import_model, read_pretrained
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")

SIDE = {FOURIER: 12, LEARNED: 12, CONV: 32}
NAMES = ("left", "middle", "right")
# Several sizes: heads, blocks, widening and latents vary, one of each architecture at least.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fourier": (FOURIER, {}),
    "fourier-wide": (FOURIER, {"d_latents": 48, "num_cross_attention_heads": 3, "self_attention_widening_factor": 2,
                               "cross_attention_widening_factor": 2, "num_self_attends_per_block": 1}),
    "learned": (LEARNED, {}),
    "learned-heads": (LEARNED, {"num_cross_attention_heads": 4, "num_blocks": 1, "num_latents": 5}),
    "conv": (CONV, {}),
    "conv-deep": (CONV, {"num_blocks": 3, "num_self_attention_heads": 2}),
}  # fmt: skip
TOLERANCE = 2e-5


def theirs(architecture: str, **changes: Any) -> Any:
    """Return a small model of transformers in evaluation mode, random in every parameter and statistic."""
    sizes = {"num_latents": 8, "d_latents": 32, "num_blocks": 2, "num_self_attends_per_block": 2}
    heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 1}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = transformers.PerceiverConfig(**{**sizes, **heads, **labels, "image_size": SIDE[architecture], **changes})
    model = getattr(transformers, architecture)(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.fill_(11)
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim == 1:  # biases, and scales and offsets of norms
                tensor.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model


def saved(model: Any, folder: Path, side: int | None = None) -> Path:
    """Save a model of transformers as its users do; with `side` an image processor for that size too."""
    model.save_pretrained(folder)
    if side is not None:
        processor(side).save_pretrained(folder)
    return folder


def processor(side: int) -> Any:
    pil = transformers.models.perceiver.image_processing_pil_perceiver.PerceiverImageProcessorPil
    crop = side * 8 // 7
    return pil(size={"height": side, "width": side}, crop_size={"height": crop, "width": crop})


def ours(folder: Path, variant: Variant, size: tuple[int, int] | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return our logits of pixel_values (B, 3, H, W) from imported weights, given another image size if asked."""
    weights, info = read_pretrained(str(folder), variant)
    spec = info.config.inputs["image"]
    spec = spec if size is None else spec.model_copy(update={"size": size})
    layout = replace(modality("image").layout(spec), mean=(0.0,), std=(1.0,))  # pixel_values are normalised
    model = Perceiver(info.config.model, {"image": layout}, len(info.classes)).eval()
    model.load_state_dict(weights)
    return lambda pixels: model({"image": Segment(pixels.movedim(1, -1))})


def difference(reference: Any, logits: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int]) -> float:
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = reference(pixel_values=pixels).logits, logits(pixels)
    assert expected.std() > 0.1  # three images, three classes: not all the same
    assert (expected[0] - expected[1]).abs().max() > 0.01
    return float((expected - found).abs().max())


# ---------------------------------------------------------------- the same logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[name]
    side = SIDE[architecture]
    model = theirs(architecture, **changes)
    logits = ours(saved(model, tmp_path, side), "hf")
    assert difference(model, logits, (side, side)) <= TOLERANCE


@pytest.mark.parametrize("size", [(9, 14), (40, 24), (1, 30)])
def test_fourier_weights_run_on_any_size(size: tuple[int, int], tmp_path: Path) -> None:
    """The bands stay those of 224 x 224 whatever the grid."""
    model = theirs(FOURIER)
    logits = ours(saved(model, tmp_path), "dm", size)
    assert difference(model, logits, size) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs(LEARNED).to(dtype)
    logits = ours(saved(model, tmp_path), "hf")
    assert difference(model.float(), logits, (12, 12)) <= TOLERANCE


def test_dm_variant_of_learned_positions_has_no_residual_in_the_readout(tmp_path: Path) -> None:
    model = theirs(LEARNED)
    folder = saved(model, tmp_path)
    with_residual, without = ours(folder, "hf"), ours(folder, "dm")
    assert difference(model, without, (12, 12)) > 0.01
    model.perceiver.decoder.decoder.decoding_cross_attention.attention.use_query_residual = False
    assert difference(model, without, (12, 12)) <= TOLERANCE
    assert difference(model, with_residual, (12, 12)) > 0.01


def test_dm_variant_of_the_convolution_pads_as_jax_does(tmp_path: Path) -> None:
    """SAME of JAX and TensorFlow on even sides: 2 before and 3 after the convolution, 0 and 1 for the pooling."""
    model = theirs(CONV)
    folder = saved(model, tmp_path, 32)
    logits = ours(folder, "dm")
    assert difference(model, logits, (32, 32)) > 0.01
    convnet = model.perceiver.input_preprocessor.convnet

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        out = F.conv2d(F.pad(inputs, (2, 3, 2, 3)), convnet.conv.weight, stride=2)
        out = F.pad(convnet.batchnorm(out).relu(), (0, 1, 0, 1), value=-torch.inf)
        return F.max_pool2d(out, 3, 2)

    convnet.forward = forward
    assert difference(model, logits, (32, 32)) <= TOLERANCE
    grids = {}
    for variant in ("dm", "hf"):
        spec = read_pretrained(str(folder), variant)[1].config.inputs["image"]  # type: ignore[arg-type]
        grids[variant] = modality("image").layout(spec.model_copy(update={"size": (224, 224)})).grid
    assert grids == {"dm": (56, 56), "hf": (55, 55)}


@pytest.mark.parametrize("architecture", [FOURIER, LEARNED, CONV])
def test_published_sizes(architecture: str) -> None:
    """The configuration of `deepmind/vision-perceiver-*`: every tensor has its place, and the counts agree."""
    sizes = {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6}
    config = transformers.PerceiverConfig(**sizes, num_cross_attention_heads=1, image_size=224, num_labels=1000)
    with torch.device("meta"):
        reference = getattr(transformers, architecture)(config)
    mine = pretrained._config(architecture, {**pretrained.TABLES["defaults"], **config.to_dict()}, None, 1000, "dm")
    with torch.device("meta"):
        model = Perceiver(mine.model, {"image": modality("image").layout(mine.inputs["image"])}, 1000)
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    pretrained._check_shapes(Path("model.safetensors"), shapes, model.state_dict())
    count = sum(parameter.numel() for parameter in reference.parameters())
    projection = 256 * 256 + 256 if architecture == LEARNED else 0
    assert sum(parameter.numel() for parameter in model.parameters()) == count - projection
    if architecture == FOURIER:
        assert count == 48_440_627
        assert len(shapes) == 136


# ---------------------------------------------------------------- the whole path


def smooth(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(5).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 260), (257, 391), (20, 33)])
@pytest.mark.parametrize("architecture", [FOURIER, LEARNED, CONV])
def test_a_picture_gets_the_probabilities_of_transformers(
    architecture: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """Centre crop in whole pixels, bicubic resize of the crop, mean and deviation: the same values go in, exactly."""
    side = 56
    model = theirs(architecture, image_size=side)
    image = smooth(*size)
    image.save(tmp_path / "picture.png")
    info = import_model(str(saved(model, tmp_path / "theirs", side)), tmp_path / "model.safetensors", "hf")
    with torch.inference_mode():
        pixels = processor(side)(image, return_tensors="pt").pixel_values
        expected = model(pixel_values=pixels).logits.softmax(dim=-1)[0]
    spec = info.config.inputs["image"]
    values = modality("image").prepare(np.asarray(image), spec, None).values
    untouched = processor(side)(image, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
    assert (values == np.moveaxis(untouched, 0, -1)).all()
    (prediction,) = Predictor(tmp_path / "model.safetensors", device="cpu").predict([tmp_path / "picture.png"])
    assert prediction.classes == info.classes == NAMES
    assert expected.min() > 1e-3  # no probability so sure that nothing could move it
    assert np.abs(np.array(prediction.probs) - expected.numpy()).max() <= 1e-4


def test_imported_file_says_where_it_comes_from(tmp_path: Path) -> None:
    folder = saved(theirs(LEARNED), tmp_path / "theirs")
    written = import_model(str(folder), tmp_path / "out.safetensors")
    info = read_info(tmp_path / "out.safetensors")
    assert info == written
    assert (info.config.name, info.step, info.classes) == ("imported-learned", 0, NAMES)
    assert info.metrics == {"imported_from": str(folder), "variant": "dm"}
    spec = info.config.inputs["image"]
    assert isinstance(spec, ImageSpec)
    assert (spec.size, spec.eval_crop, spec.crop_area, spec.flip) == ((12, 12), 0.875, (0.35, 1.0), 0.5)
    assert spec.mean == (0.485, 0.456, 0.406)
    assert (info.config.train.optimizer, info.config.train.lr, info.config.train.schedule) == ("adamw", 1e-4, "cosine")
    with pytest.raises(UsageError, match="already a model of this program"):
        import_model(str(tmp_path / "out.safetensors"), tmp_path / "again.safetensors")


def test_the_source_is_not_overwritten(fourier: Path, tmp_path: Path) -> None:
    target = copied(fourier, tmp_path)
    file = target / "model.safetensors"
    for source in (target, file):
        with pytest.raises(UsageError, match="is the file to import; choose another output"):
            import_model(str(source), file)
    assert file.read_bytes() == (fourier / "model.safetensors").read_bytes()


def test_batch_norm_statistics_travel(tmp_path: Path) -> None:
    model = theirs(CONV)
    weights, _ = read_pretrained(str(saved(model, tmp_path)))
    norm = model.perceiver.input_preprocessor.convnet.batchnorm
    assert torch.equal(weights["encoding.stems.image.norm.running_var"], norm.running_var)
    assert int(weights["encoding.stems.image.norm.num_batches_tracked"]) == 11


def test_a_file_alone_is_read_by_its_shapes(tmp_path: Path) -> None:
    """Without config.json: what shapes do not tell (heads, blocks) is as published, classes are numbers."""
    model = theirs(LEARNED, num_blocks=8, num_self_attention_heads=8)
    folder = saved(model, tmp_path)
    (folder / "config.json").unlink()
    logits = ours(folder / "model.safetensors", "hf")
    assert difference(model, logits, (12, 12)) <= TOLERANCE
    info = read_pretrained(str(folder / "model.safetensors"))[1]
    assert info.classes == ("0", "1", "2")
    assert "num_blocks 8" in info.metrics["assumed"]


def test_fine_tuning_starts_from_it(bars: Path, tmp_path: Path) -> None:
    """Into the paper's layout: cross-attend 0 and the shared latent Transformer are taken, cross-attend 1 is fresh."""
    import_model(str(saved(theirs(FOURIER), tmp_path / "theirs", 14)), tmp_path / "start.safetensors")
    donor, info = load_model(tmp_path / "start.safetensors")
    overrides = ["model.schedule=c0 t0 (c1 t0)x1", "inputs.image.size=12", "train.steps=1", "train.device=cpu"]
    trainer = Trainer(
        bars, tmp_path / "run", info.config, overrides=overrides, init_from=tmp_path / "start.safetensors"
    )
    list(trainer.fit())
    (note,) = (note for note in trainer.plan.notes if "started from" in note)
    fresh = sum(name.startswith("cross_attends.0.") for name in donor.state_dict())  # as many as cross-attend 1 has
    taken = len(donor.state_dict()) - 2  # all but the head's weight and bias, which go by class
    assert f"{taken} tensors taken, {fresh} fresh, it knows 3 of 3 classes" in note
    # One warming-up step of the smallest rate has moved nothing far.
    tuned = load_model(tmp_path / "run" / "model.safetensors")[0].state_dict()
    for name, tensor in donor.state_dict().items():
        torch.testing.assert_close(tuned[name], tensor, rtol=0, atol=1e-3)


def test_another_model_takes_what_fits_or_says_so(bars: Path, tmp_path: Path) -> None:
    import_model(str(saved(theirs(FOURIER), tmp_path / "theirs", 14)), tmp_path / "start.safetensors")
    overrides = [*SMALL, "train.steps=1", "train.device=cpu"]
    tiny = load_preset("tiny-image")
    trainer = Trainer(bars, tmp_path / "run", tiny, overrides=overrides, init_from=tmp_path / "start.safetensors")
    with pytest.raises(UsageError, match="no weight of imported-fourier fits"):
        list(trainer.fit())


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def fourier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Fourier model of transformers, its processor with it."""
    return saved(theirs(FOURIER), tmp_path_factory.mktemp("fourier"), 14)


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """Copy a model folder, with changes to config.json; a value of ... leaves the key out."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


def refused(source: Path | str, kind: type[PerceiverError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        read_pretrained(str(source))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


LATENTS = "perceiver.embeddings.latents"


def test_tensors_that_do_not_fit_are_named(fourier: Path, tmp_path: Path) -> None:
    tensors = load_file(fourier / "model.safetensors")
    target = copied(fourier, tmp_path)
    query = "perceiver.encoder.cross_attention.attention.self.query"
    for changed, match in (
        ({f"{query}.bias": None}, f"1 tensors do not fit: missing {query}.bias"),
        ({"extra\n": torch.zeros(2)}, r"1 tensors do not fit: not expected 'extra\\n'"),
        ({LATENTS: torch.zeros(8, 33)}, r"latents: expected \(8, 32\), found \(8, 33\)"),
        ({LATENTS: torch.zeros(8, 32, dtype=torch.int64)}, "latents: expected finite numbers of torch.float32"),
        ({LATENTS: torch.full((8, 32), torch.nan)}, "latents: expected finite numbers"),
        ({name: None for name in tensors if ".mlp." in name}, r"16 tensors do not fit: (missing [^;]*;? ?){3}$"),
        ({pretrained.CLASSES: None}, "final_layer.weight"),
    ):
        merged = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_file(merged, target / "model.safetensors")
        with pytest.raises(PerceiverError, match=match) as caught:
            read_pretrained(str(target))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "a", "1": "b"},
        {"0": "a", "1": "b", "3": "c"},
        {"0": "a", "1": "b", "2": "c", "3": "d"},
        {"0": "a", "01": "b", "2": "c"},
        {"0": "a", "1": 5, "2": "c"},
        {"0": "a", "1": "", "2": "c"},
        ["a", "b", "c"],
        7,
    ],
)
def test_class_names_that_do_not_match_the_rows(labels: Any, fourier: Path, tmp_path: Path) -> None:
    refused(copied(fourier, tmp_path, id2label=labels), UsageError, "id2label")


def test_class_names_used_twice_are_told_apart(fourier: Path, tmp_path: Path) -> None:
    """ImageNet has two classes named crane; probabilities are given by name."""
    folder = copied(fourier, tmp_path, id2label={"0": "crane", "1": "ox", "2": "crane"})
    assert read_pretrained(str(folder))[1].classes == ("crane", "ox", "crane (2)")
    folder = copied(fourier, tmp_path, id2label=...)
    assert read_pretrained(str(folder))[1].classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"qk_channels": 64}, "qk_channels 64 cannot be expressed here, None can"),
        ({"v_channels": 64}, "v_channels"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' cannot be expressed here, 'gelu' can"),
        ({"hidden_act": ["gelu"]}, "hidden_act a list"),
        ({"cross_attention_shape_for_attention": "q"}, "cross_attention_shape_for_attention 'q'"),
        ({"use_query_residual": False}, "use_query_residual False"),
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"cross_attention_widening_factor": 2}, "two widening factors"),
        ({"num_cross_attention_heads": 2}, "num_cross_attention_heads 2 does not divide 261"),
        ({"num_cross_attention_heads": ...}, "num_cross_attention_heads 8 does not divide 261"),
        ({"num_self_attention_heads": 5}, "not a multiple of num_self_heads"),
        ({"architectures": ["PerceiverForMaskedLM"]}, "architecture 'PerceiverForMaskedLM' is not read here"),
        ({"architectures": "x" * 100_000}, "architecture"),
        ({"architectures": []}, "architecture a list is not read here"),
        ({"architectures": [["x"]]}, "architecture a list is not read here"),
        ({"num_latents": "8"}, "num_latents must be a whole number"),
        ({"num_latents": True}, "num_latents must be a whole number"),
        ({"num_latents": 8.5}, "num_latents must be a whole number"),
        ({"num_latents": -1}, "num_latents must be a whole number"),
        ({"num_latents": 1 << 70}, "num_latents must be a whole number"),
        ({"num_latents": {"a": [1] * 1000}}, "num_latents must be a whole number .* found a dict"),
        ({"num_latents": None}, "num_latents must be a whole number .* found None"),
        ({"num_latents": 1 << 20, "d_latents": 1 << 20}, "parameters and .* at most 2,000,000,000"),
        ({"num_blocks": 1 << 20}, "num_blocks 1048576, expected fewer than 4096"),
        ({"num_self_attends_per_block": 1 << 20}, "self_attends_per_block"),
    ],
)
def test_hostile_and_other_configurations(
    changes: dict[str, Any], match: str, fourier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "Perceiver", None)  # nothing may be built
    refused(copied(fourier, tmp_path, **changes), UsageError, match)


def test_config_and_tensors_of_two_architectures(fourier: Path, tmp_path: Path) -> None:
    refused(copied(fourier, tmp_path, architectures=[CONV]), IntegrityError, f"says {CONV}, but .* {FOURIER}")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"9" * 5000, "not JSON"),
        (b" " * (4 << 20) + b"{}", "larger than"),
    ],
)
def test_hostile_json(name: str, text: bytes, match: str, fourier: Path, tmp_path: Path) -> None:
    target = copied(fourier, tmp_path)
    (target / name).write_bytes(text)
    refused(target, UsageError, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"do_center_crop": False}, "do_center_crop False"),
        ({"resample": 2}, "resample 2 cannot be expressed here, 3 can"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"size": {"shortest_edge": 14}}, "size must be a whole number"),
        ({"size": {"height": 14, "width": 20}}, "squares"),
        ({"size": 512}, "squares"),
        ({"size": 1 << 20, "crop_size": 1 << 20}, "inputs"),
        ({"size": "14"}, "size must be a whole number"),
        ({"image_mean": [0.5, 0.5]}, "inputs.image.mean needs"),
        ({"image_mean": "grey"}, r"inputs\.image\.mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"inputs\.image\.std"),
    ],
)
def test_other_image_processing(changes: dict[str, Any], match: str, fourier: Path, tmp_path: Path) -> None:
    target = copied(fourier, tmp_path)
    file = target / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(target, UsageError, match)


def test_processor_of_the_hub_in_its_old_form(fourier: Path, tmp_path: Path) -> None:
    """As PerceiverFeatureExtractor wrote it: sides as plain numbers."""
    target = copied(fourier, tmp_path)
    old = {"crop_size": 256, "size": 224, "do_normalize": True, "feature_extractor_type": "PerceiverFeatureExtractor",
           "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 3}  # fmt: skip
    (target / "preprocessor_config.json").write_text(json.dumps(old))
    spec = read_pretrained(str(target))[1].config.inputs["image"]
    assert isinstance(spec, ImageSpec)
    assert (spec.size, spec.eval_crop, spec.mean, spec.std) == ((224, 224), 0.875, (0.5,) * 3, (0.25,) * 3)


def test_learned_positions_have_one_size(tmp_path: Path) -> None:
    folder = saved(theirs(LEARNED), tmp_path, 14)
    refused(folder, UsageError, "images of 14 x 14, but positions are learned for 12 x 12")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "MODEL.CKPT", "model.pth"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path / name, UsageError, "a pickle can run programs.*save_pretrained")
    refused(tmp_path, UsageError, r"no model\.safetensors in it.*save_pretrained")


def test_damaged_weights(fourier: Path, tmp_path: Path) -> None:
    target = copied(fourier, tmp_path)
    data = (fourier / "model.safetensors").read_bytes()
    for damaged in (data[:1000], data + b"x", struct.pack("<Q", 1 << 60) + b"{}", b""):
        (target / "model.safetensors").write_bytes(damaged)
        refused(target, IntegrityError, "model.safetensors")
    header = json.dumps({pretrained.CLASSES: {"dtype": "F32", "shape": [1 << 60, 0], "data_offsets": [0, 0]}}).encode()
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(target, UsageError, "whole number")  # rows without columns take no bytes, their names would
    (target / "config.json").unlink()
    refused(target, UsageError, "not the tensors of a Perceiver classifier")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("no-such-folder", UsageError, "no such folder or file")
    refused("no/such/folder", UsageError, "no such folder or file")
    refused("x" * 5000, UsageError, "no such folder or file")
    refused("../somewhere", UsageError, "no such folder or file")
    refused("there-is/none.safetensors", UsageError, "no such folder or file")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name", UsageError, r"pip install 'perceiver-cli\[hub\]'")


def test_hub_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets before import
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused("deepmind/vision-perceiver-fourier", UsageError, r"cannot get config\.json from the hub")


def test_only_three_files_of_a_hub_repository_are_fetched(
    fourier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")
    errors = hub.errors
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, **_: bool) -> str:
        asked.append((repository, name))
        if name == "preprocessor_config.json":
            raise errors.EntryNotFoundError("404")
        return str(fourier / name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    info: ModelInfo = read_pretrained("org/name")[1]
    assert asked == [("org/name", n) for n in ("config.json", "preprocessor_config.json", "model.safetensors")]
    spec = info.config.inputs["image"]
    assert isinstance(spec, ImageSpec)
    assert spec.size == (224, 224)
