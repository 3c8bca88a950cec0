"""Where models looked: known answers, the rollout written out, pictures, numbers and words of the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli import Perceiver, Predictor, Segment
from perceiver_cli.config import ModelConfig
from perceiver_cli.errors import UsageError
from perceiver_cli.inference import explain
from perceiver_cli.model.attention import CrossAttend, SelfAttend, split_heads
from perceiver_cli.model.encoding import ByteArrayEncoding
from perceiver_cli.preprocess import audio
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.video import VideoSpec
from perceiver_cli.report import explanation, pictures
from tests.conftest import Perceive, decode

SMALL = {"num_latents": 8, "latent_channels": 32, "num_self_heads": 2, "self_attends_per_block": 1}
Segments = dict[str, Segment]

# ---------------------------------------------------------------- known answers


def learned(layouts: Mapping[str, Layout], segments: Segments, labels: Tensor, steps: int = 120) -> Perceiver:
    """Return a small model that has learned two classes."""
    model = Perceiver(ModelConfig(**SMALL, schedule="c0 t0 c1 t0"), layouts, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randperm(len(labels), generator=generator)[:64]
        loss = F.cross_entropy(model(rows(segments, some)), labels[some], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def rows(segments: Segments, some: Tensor) -> Segments:
    return {
        name: Segment(s.values[some], None if s.positions is None else s.positions[some])
        for name, s in segments.items()
    }


def mean_share(
    layouts: Mapping[str, Layout], make: Callable[[np.random.Generator, int], tuple[Segments, Tensor]], part: np.ndarray
) -> float:
    """Return the mean share of the heat in a part of the inputs, of a model that is right on new examples."""
    model = learned(layouts, *make(np.random.default_rng(1), 512))
    segments, labels = make(np.random.default_rng(2), 12)
    assert (model(segments).argmax(dim=1) == labels).float().mean() > 0.9
    (name,) = layouts
    shares = []
    for k, label in enumerate(labels.tolist()):
        one = rows(segments, torch.tensor([k]))
        heat = explain.weighed(explain.evidence(model, one, label, False), explain.look(model, one)[0])[name]
        assert heat.min() >= 0
        assert heat.sum() == pytest.approx(1, abs=1e-5)
        shares.append(float(heat[part].sum()))
    return float(np.mean(shares))


def test_heat_is_in_the_quadrant_that_carries_the_class() -> None:
    def make(rng: np.random.Generator, count: int) -> tuple[Segments, Tensor]:
        """Upright or lying bars, at random in three quadrants; the class is what is in the one at the upper right."""
        labels = rng.integers(2, size=count)
        pictures = 0.3 * rng.standard_normal((count, 16, 16, 1))
        for k, label in enumerate(labels):
            for y, x in ((0, 0), (0, 8), (8, 0), (8, 8)):
                lying = label if (y, x) == (0, 8) else rng.integers(2)
                bar = (slice(3, 5), slice(0, 8)) if lying else (slice(0, 8), slice(3, 5))
                pictures[k, y : y + 8, x : x + 8][bar] += 2
        return {"image": Segment(torch.from_numpy(pictures).float())}, torch.from_numpy(labels)

    part = np.zeros((16, 16), bool)
    part[:8, 8:] = True
    layouts = {"image": Layout((16, 16), 1, 2, 8, (16.0, 16.0))}
    assert mean_share(layouts, make, part) >= 3 * part.mean()


def test_heat_is_in_the_second_that_carries_the_class() -> None:
    spec = AudioSpec(features="mel", rate_hz=4000, clip_s=5.0, num_mels=16, patch=(20, 4), hop_s=0.01, bands=8)

    def make(rng: np.random.Generator, count: int) -> tuple[Segments, Tensor]:
        """Five seconds, each with a low or a high tone; the class is that of the fourth."""
        labels = rng.integers(2, size=count)
        time = np.arange(4000) / 4000
        clips = []
        for label in labels:
            sound = 0.05 * rng.standard_normal((5, 4000))
            for second in range(5):
                hz = (400, 1200)[label if second == 3 else rng.integers(2)]
                sound[second] += 0.3 * np.sin(2 * np.pi * hz * time) * np.hanning(4000)
            clips.append(audio.MODALITY.prepare(sound.ravel().astype(np.float32), spec, None).values)
        return {"audio": Segment(torch.from_numpy(np.stack(clips)))}, torch.from_numpy(labels)

    layout = audio.MODALITY.layout(spec)
    part = np.zeros(layout.grid, bool)
    part[3 * layout.grid[0] // 5 : 4 * layout.grid[0] // 5 + 1] = True
    assert mean_share({"audio": layout}, make, part) >= 3 / 5


def test_heat_is_in_the_part_of_a_cloud_that_carries_the_class() -> None:
    def make(rng: np.random.Generator, count: int) -> tuple[Segments, Tensor]:
        """Four sticks one above the other, along x or z; the class is the direction of the lowest."""
        labels = rng.integers(2, size=count)
        points = 0.03 * rng.standard_normal((count, 4, 32, 3))
        for k, label in enumerate(labels):
            for stick in range(4):
                along = 2 * (label if stick == 0 else rng.integers(2))
                points[k, stick, :, along] += rng.uniform(-0.6, 0.6, 32)
                points[k, stick, :, 1] += stick / 2 - 0.75
        positions = torch.from_numpy(points.reshape(count, 128, 3)).float()
        return {"points": Segment(torch.zeros(count, 128, 0), positions)}, torch.from_numpy(labels)

    layouts = {"points": Layout((128,), 0, 3, 6, (6.0, 6.0, 6.0), is_grid=False)}
    part = np.arange(128) < 32
    assert mean_share(layouts, make, part) >= 3 * part.mean()


# ---------------------------------------------------------------- against what is written out


def dense_rollout(model: Perceiver, segments: Segments) -> dict[str, Tensor]:
    """Return the attention of `explain.look`, from whole (N, M) matrices."""
    by_name = model.encoding.inputs(segments)
    byte_array = torch.cat([inputs.rows() for inputs in by_name.values()], dim=1)
    reached = torch.zeros(model.config.num_latents, byte_array.shape[1])
    latents, memory = model.latents.unsqueeze(0), explain.Memory(by_name.values())

    def weights(block: CrossAttend | SelfAttend, query: Tensor, key: Tensor) -> Tensor:
        query, key = (split_heads(x, block.heads) for x in (query, key))
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)[0].mean(0)

    for kind, index in model.config.steps:
        if kind == "c":
            block = model.cross_attends[index]
            assert isinstance(block, CrossAttend)
            keys = block.key(block.input_norm(byte_array))
            reached = reached / 2 + weights(block, block.query(block.latent_norm(latents)), keys) / 2
            latents = block(latents, memory)
        else:
            for block in model.latent_transformers[index]:  # type: ignore[union-attr]
                normalised = block.norm(latents)
                mixing = weights(block, block.query(normalised), block.key(normalised))
                reached = (reached + mixing @ reached) / 2
                latents = block(latents)
    share = torch.full((model.config.num_latents,), 1 / model.config.num_latents)
    if model.readout is not None:
        block = model.readout.cross_attend
        query = block.query(block.latent_norm(model.readout.query[None]))
        share = weights(block, query, block.key(block.input_norm(latents)))[0]
    total = share @ reached
    sizes = [int(np.prod(inputs.grid)) for inputs in by_name.values()]
    return dict(zip(by_name, (total / total.sum()).split(sizes), strict=True))


GRID = Layout((40, 33), 3, 2, 4, (40.0, 33.0))
LEARNED = Layout((20, 18), 3, 2, 4, (20.0, 18.0), learned_channels=9)
STRIP = Layout((150,), 5, 1, 4, (150.0,))
CLOUD = Layout((600,), 0, 3, 4, (8.0, 8.0, 8.0), is_grid=False)


def random_segments(layouts: Mapping[str, Layout]) -> Segments:
    return {
        name: Segment(
            torch.randn(1, *layout.prepared_shape),
            None if layout.is_grid else torch.rand(1, layout.num_inputs, layout.dims) * 2 - 1,
        )
        for name, layout in layouts.items()
    }


def shaken(config: ModelConfig, layouts: Mapping[str, Layout]) -> Perceiver:
    torch.manual_seed(0)
    model = Perceiver(config, layouts, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        ({"image": GRID}, {}),
        ({"image": LEARNED}, {"num_cross_heads": 2}),
        ({"points": CLOUD}, {"head": "query"}),
        (
            {"audio": STRIP, "image": GRID},
            {"num_cross_heads": 4, "modality_channels": 7, "head": "query", "query_residual": False},
        ),
        ({"audio": STRIP, "points": CLOUD}, {}),
    ],
    ids=["grid", "learned", "points-query", "mix-heads-query", "mix-points"],
)
def test_attention_is_the_rollout_written_out(layouts: dict[str, Layout], options: dict[str, object]) -> None:
    model = shaken(ModelConfig(**SMALL, schedule="c0 t0 (c1 t0)x2", **options), layouts)  # type: ignore[arg-type]
    segments = random_segments(layouts)
    attention, maps = explain.look(model, segments)
    with torch.no_grad():
        expected = dense_rollout(model, segments)
    for name, layout in layouts.items():
        assert attention[name].shape == layout.grid
        torch.testing.assert_close(torch.from_numpy(attention[name]).flatten(), expected[name], rtol=2e-3, atol=1e-6)
    assert sum(float(part.sum()) for part in attention.values()) == pytest.approx(1, abs=1e-5)
    assert sorted({one.cross_attend for one in maps}) == [1, 2, 3]
    first = next(one for one in maps if one.cross_attend == 1)
    block = model.cross_attends[0]
    assert isinstance(block, CrossAttend)
    query = block.queries(model.latents[None])[0, first.head - 1, first.latent - 1]
    keys = split_heads(block.key(block.input_norm(model.encoding(segments))), block.heads)[0, first.head - 1]
    scores = (keys - block.key.bias.view(block.heads, -1)[first.head - 1]) @ query / query.shape[-1] ** 0.5
    found = torch.cat([torch.from_numpy(first.scores[name]).flatten() for name in model.encoding.layouts])
    offset = (scores - found).mean()  # what is the same for every input is not in the folded scores
    torch.testing.assert_close(found + offset, scores, rtol=1e-3, atol=1e-3)


def mean_of(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over all places (1, 1.., C)."""
    return values.mean(tuple(range(1, values.dim() - 1)), keepdim=True)


def test_evidence_adds_up_and_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integrated gradients over a long enough path are what the log-odds rise by (their completeness)."""
    layouts = {"audio": STRIP, "points": CLOUD}
    model = shaken(ModelConfig(**SMALL, schedule="c0 t0"), layouts)
    segments = random_segments(layouts)
    gained: list[float] = []
    monkeypatch.setattr(explain, "PATH_STEPS", 100)
    monkeypatch.setattr(explain, "_with_neighbours", lambda grid: grid)  # and the sums as they are
    monkeypatch.setattr(explain, "_normalised", lambda heat: gained.append(sum(float(h.sum()) for h in heat.values())))
    # Of a logit and of its negative, what is above zero differs by the whole.
    with torch.no_grad():
        model.head.weight[1], model.head.bias[1] = -model.head.weight[0], -model.head.bias[0]
    for sign in (0, 1):
        explain.evidence(model, segments, sign, True)
    blank = {
        name: Segment(
            mean_of(s.values).expand_as(s.values),
            None if s.positions is None else mean_of(s.positions).expand_as(s.positions),
        )
        for name, s in segments.items()
    }
    with torch.no_grad():
        rise = float(model(segments)[0, 0] - model(blank)[0, 0])
    assert gained[0] - gained[1] == pytest.approx(rise, rel=0.03, abs=0.01)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.recompute


def test_heat_of_a_stem_is_weighed_by_the_attention_of_fewer_inputs() -> None:
    attention = {"image": np.array([[4.0, 0.0], [0.0, 4.0]], np.float32)}
    heat = explain.weighed({"image": np.ones((4, 6), np.float32)}, attention)["image"]
    np.testing.assert_allclose(heat, np.kron([[1, 0], [0, 1]], np.ones((2, 3))) / 12)


def test_neighbours_keep_the_sum_inside_and_flatten_noise() -> None:
    one = torch.zeros(100, dtype=torch.float64)
    one[50] = 1
    mean = explain._with_neighbours(one)
    assert float(mean.sum()) == pytest.approx(1)
    assert 0.1 < float(mean.max()) < 0.2
    noise = torch.randn(200, 4, dtype=torch.float64)
    assert float(explain._with_neighbours(noise).std()) < 0.4


# ---------------------------------------------------------------- the command


def test_explains_an_image(trained: Path, bars: Path, tmp_path: Path, perceive: Perceive) -> None:
    file = bars / "test" / "middle" / "000.png"
    done = perceive("explain", file, "-m", trained, "-o", tmp_path / "out.png", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["label"] == facts["class"] == "middle"
    part = facts["inputs"]["image"]
    assert part["share"] == pytest.approx(1, abs=1e-4)
    assert np.sum(part["heat"]) == pytest.approx(1, abs=1e-4)
    assert np.shape(part["heat"]) == (8, 8)
    with Image.open(tmp_path / "out.png") as page:
        assert page.format == "PNG"
        assert 900 < page.width < 1200
        assert len(page.convert("RGB").resize((100, 100)).getcolors(10_000) or []) > 200
    other = perceive("explain", file, "-m", trained, "--class", "left", "--json")
    assert json.loads(other.stdout)["class"] == "left"
    assert json.loads(other.stdout)["class_prob"] < 0.5
    plain = perceive("explain", "-", "-m", trained, "-o", tmp_path / "b.png", stdin=file.read_bytes())
    assert plain.stdout.decode().splitlines()[0].startswith("middle ")


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["FILE"], "nothing to write to; pass -o FILE.png, or --json", 2),
        (["FILE", "-o", "x.jpg"], "expected .png or .ply or .npz", 2),
        (["FILE", "--json", "--class", "dog"], "no class 'dog' in ", 2),
        (["FILE", "-o", "x.ply"], "a PLY holds points, ", 2),
        (["FOLDER", "--json"], "several inputs; explain one file, or one of each modality", 2),
        (["FILE", "FILE", "--json"], "one file too many: an input is one file of each of image", 2),
        (["EMPTY", "--json"], "nothing to predict: there is no file", 3),
        (["/dev/null", "--json"], "not a regular file", 3),
        (["missing.png", "--json"], "No such file", 3),
    ],
)
def test_what_cannot_be_explained_is_said(
    arguments: list[str], words: str, status: int, trained: Path, bars: Path, tmp_path: Path, perceive: Perceive
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"FILE": bars / "test" / "left" / "000.png", "FOLDER": bars / "test" / "left", "EMPTY": tmp_path / "empty"}
    done = perceive("explain", *[places.get(a, a) for a in arguments], "-m", trained, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == b""
    assert not list(tmp_path.glob("x.*"))


def test_a_pair_is_drawn_in_two_ways(paired: Path, pairs: Path, tmp_path: Path) -> None:
    predictor = Predictor(paired)
    stem = pairs / "test" / "top-low" / "000"
    both = explain.explain(predictor, [f"{stem}.wav", f"{stem}.png"])
    assert list(both.shown) == ["audio", "image"]
    assert sum(float(part.heat.sum()) for part in both.shown.values()) == pytest.approx(1, abs=1e-4)
    assert sum(float(part.attention.sum()) for part in both.shown.values()) == pytest.approx(1, abs=1e-4)
    assert both.shown["audio"].end_s == pytest.approx(0.275, abs=0.01)  # the middle 0.25 s of 0.3 s
    explanation.save(both, tmp_path / "both.png")
    one = explain.explain(predictor, f"{stem}.png")
    assert list(one.shown) == ["image"]
    assert one.notes == ("audio: missing in this input",)
    assert next(predictor.predict([f"{stem}.png"])).prob == pytest.approx(one.predicted_prob)
    assert explanation.to_picture(one).height < explanation.to_picture(both).height


def test_a_film_is_a_strip_with_its_sound(filmed: Path, clips: Path) -> None:
    file = next((clips / "test" / "top-low").glob("*.mp4"))
    found = explain.explain(Predictor(filmed), str(file), "bottom-high")
    assert list(found.shown) == ["audio", "video"]
    facts = found.to_dict()
    assert facts["class"] == "bottom-high"
    assert np.shape(facts["inputs"]["video"]["heat"]) == (2, 4, 4)
    assert facts["inputs"]["video"]["start_s"] == pytest.approx(0.25)
    assert explanation.to_picture(found).width < 1200


def test_a_class_for_which_nothing_speaks_is_said(trained: Path, bars: Path) -> None:
    predictor = Predictor(trained)
    torch.nn.init.zeros_(predictor.model.head.weight)
    found = explain.explain(predictor, str(bars / "test" / "left" / "000.png"), "left")
    assert "nothing in this input speaks for 'left'" in found.notes[0]
    assert not found.shown["image"].heat.any()
    explanation.to_picture(found)


def test_points_are_written_as_a_coloured_cloud(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    heat = np.linspace(0, 1, 50, dtype=np.float32)
    shown = explain.ExplainedInput(points, PointsSpec(), heat / heat.sum(), heat)
    cloud = explain.Explanation("a.npy", "b", 0.9, "b", 0.9, {"points": shown}, ())
    explanation.save(cloud, tmp_path / "out.ply")
    read = decode(Source(str(tmp_path / "out.ply")), PointsSpec(), Limits())
    np.testing.assert_allclose(read, points, rtol=1e-6)
    tail = (tmp_path / "out.ply").read_bytes()[-19:]
    assert np.frombuffer(tail, "<f4", 1, 15)[0] == pytest.approx(heat[-1] / heat.sum())
    red, green, blue = tail[12:15]
    assert red > 100 > green
    assert blue < 100
    assert len(cloud.to_dict()["inputs"]["points"]["points"]) == 50
    picture = cloud.shown["points"]
    assert explain._folded(picture.heat, 20).sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UsageError, match="a PLY holds points"):
        explanation.to_ply(explain.Explanation("a", "b", 1, "b", 1, {}, ()))


def test_maps_are_written_as_arrays(tmp_path: Path) -> None:
    pixels, heat = np.zeros((4, 6, 3), np.uint8), np.full((2, 3), 1 / 6, np.float32)
    shown = explain.ExplainedInput(pixels, ImageSpec(), heat, heat)
    maps = tuple(explain.ScoreMap(1, latent, 1, {"image": latent * heat}) for latent in (3, 7))
    explanation.save(explain.Explanation("a.png", "b", 0.9, "b", 0.9, {"image": shown}, maps), tmp_path / "maps.npz")
    arrays = np.load(tmp_path / "maps.npz")
    assert {name: array.shape for name, array in arrays.items()} == {
        "label": (), "image": (4, 6, 3), "image_heat": (2, 3), "image_attention": (2, 3), "image_scores": (2, 2, 3),
        "cross_attend": (2,), "latent": (2,), "head": (2,),
    }  # fmt: skip
    assert arrays["latent"].tolist() == [3, 7]
    np.testing.assert_allclose(arrays["image_scores"][1], 7 * heat)


# ---------------------------------------------------------------- drawing


def reddest(picture: Image.Image) -> tuple[int, int]:
    """Return (x, y) of where red most exceeds blue."""
    pixels = np.asarray(picture, np.int64)
    place = np.argmax(pixels[..., 0] - pixels[..., 2])
    return int(place % pixels.shape[1]), int(place // pixels.shape[1])


def test_heat_lies_where_its_input_is() -> None:
    """Evaluation crops the middle 24 x 24 of 48 x 32: its upper right cell is right of and above the middle."""
    spec = ImageSpec(size=(8, 8), eval_crop=0.75)
    heat = np.zeros((8, 8), np.float32)
    heat[0, 7] = 1
    picture = pictures.sample(np.full((32, 48, 3), 128, np.uint8), spec, heat, side=480)
    assert picture.size == (480, 320)
    x, y = reddest(picture)
    assert 325 <= x <= 360
    assert 40 <= y <= 75


def test_what_lies_outside_the_crop_is_pale() -> None:
    raw = np.full((32, 48, 3), 20, np.uint8)
    for spec, cropped in (
        (ImageSpec(size=(8, 8), eval_crop=0.75), True),
        (ImageSpec(size=(8, 8), eval_crop=1.0, fit="pad"), False),
    ):
        assert pictures.is_cropped(raw, spec) == cropped
        figure = pictures.new_figure(*pictures.size_of(raw, spec, 480))
        pictures.draw(figure, raw, spec, framed=True)
        pixels = np.asarray(pictures.rendered(figure).convert("L"))
        middle, edge = pixels[len(pixels) // 2, 240], pixels[len(pixels) // 2, 20]
        assert middle == 20
        assert (edge > 120) == cropped


def test_heat_lies_at_its_time_and_pitch() -> None:
    spec = AudioSpec(features="mel", rate_hz=8000, clip_s=2.0, num_mels=16, patch=(10, 2))
    heat = np.zeros(audio.MODALITY.layout(spec).grid, np.float32)
    heat[len(heat) // 4, -1] = 1  # high, after half a second
    sound = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    x, y = reddest(pictures.sample(sound, spec, heat, side=200))
    assert 110 <= x <= 145
    assert y <= 110


def test_every_medium_is_drawn_without_heat_too() -> None:
    rng = np.random.default_rng(0)
    film = rng.integers(0, 255, (5, 20, 30, 3), dtype=np.uint8)
    assert pictures.sample(film, VideoSpec(num_frames=4, size=(16, 16)), side=150).width <= 300
    assert pictures.sample(rng.normal(size=(1, 3)), PointsSpec(), side=100).size == (100, 100)
    assert pictures.sample(np.zeros(10, np.float32), AudioSpec(rate_hz=8000)).width == 2 * pictures.SIDE
    assert (
        pictures.sample(rng.integers(0, 255, (9, 4, 1), dtype=np.uint8), ImageSpec(size=(4, 4))).height == pictures.SIDE
    )


def test_the_labels_of_a_sound_are_whole_inside_the_frame_of_a_picture() -> None:
    picture = np.asarray(pictures.sample(np.random.default_rng(0).normal(size=24_000), AudioSpec(rate_hz=16_000)))
    assert picture[:, :2].min() == 255  # "250 Hz"
    assert picture[-3:].min() == 255  # "0.5 s"; the report's frame is two pixels wide


def test_scores_of_any_grid_have_the_colours_of_their_key() -> None:
    """The highest is yellow, the lowest violet; of three axes and more, the middles of the first stand side by side."""
    for shape in ((12,), (3, 12), (4, 3, 12), (4, 2, 3, 12)):
        figure = pictures.new_figure(240, 60)
        values = np.zeros(shape)
        values[..., 6:] = 1
        pictures.grid(pictures.bare_axes(figure), values, pictures.SCORE)
        pixels = np.asarray(pictures.rendered(figure), np.int64)
        yellow = (pixels == (253, 231, 36)).all(axis=-1)
        violet = (pixels == (68, 1, 84)).all(axis=-1)
        assert yellow.mean() == pytest.approx(violet.mean(), abs=0.02)
        assert yellow.mean() > 0.4
        starts = (np.diff(yellow[30].astype(int)) == 1).sum()
        assert starts == {1: 1, 2: 1, 3: 4, 4: 8}[len(shape)]


def test_names_on_the_page_are_text_and_end_where_their_room_ends() -> None:
    """A dollar sign starts no mathematics, a letter that the font lacks no warning, and no line leaves its panel."""
    raw = np.full((8, 8, 3), 200, np.uint8)
    shown = explain.ExplainedInput(
        raw, ImageSpec(size=(8, 8)), np.ones((8, 8), np.float32), np.ones((8, 8), np.float32)
    )
    maps = tuple(explain.ScoreMap(1, k, 2, {"image": np.eye(8, dtype=np.float32)}) for k in range(1, 7))
    for name in ("$x^$ 猫 $", "W" * 190):
        page = explanation.to_picture(explain.Explanation(name, name, 0.5, f"{name}b", 0.5, {"image": shown}, maps))
        pixels = np.asarray(page.convert("L"))
        gap, side = explanation.GAP, pictures.SIDE
        for right in (gap + side, 2 * (gap + side), 3 * (gap + side)):
            below = 2 * explanation.LINE + explanation.HEAD if right < explanation.WIDTH else 0
            assert (pixels[below : below + side, right : right + gap] > 250).all(), right
        assert (pixels[: explanation.HEAD] < 100).any()


def test_products_are_those_of_the_rows() -> None:
    """By blocks of tiles, in the order of the byte array."""
    layouts = {"audio": STRIP, "image": GRID, "points": CLOUD}
    encoding = ByteArrayEncoding(layouts, 4)
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter)
    memory = explain.Memory(encoding.inputs(random_segments(layouts)).values())
    u = torch.randn(1, 7, memory.num_channels)
    with torch.no_grad():
        found = [tiles.untiled(torch.cat(list(tiles.products(u)), dim=1).movedim(2, 3)) for tiles in memory.tiles]
        torch.testing.assert_close(torch.cat(found, dim=1), memory.rows @ u[0].T, rtol=1e-3, atol=1e-3)
