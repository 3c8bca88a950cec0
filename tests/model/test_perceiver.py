"""The paper's counts, sharing, invariances and initial values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from perceiver_cli.config import ModelConfig, load_preset
from perceiver_cli.model import attention
from perceiver_cli.model.attention import CrossAttend
from perceiver_cli.model.cost import estimate
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.linear import linears
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.presets import preset_names

IMAGENET = Layout((224, 224), 3, 2, 64, (224.0, 224.0))
SMALL = ModelConfig(
    num_latents=8, latent_channels=32, schedule="c0 t0 (c1 t0)x2", self_attends_per_block=2, num_self_heads=4
)
GRID = Layout((6, 5), 3, 2, 4, (6.0, 5.0))
CLOUD = Layout((30,), 2, 3, 4, (8.0, 8.0, 8.0), is_grid=False)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(schedule: str, **changes: object) -> Perceiver:
    with torch.device("meta"):
        return Perceiver(ModelConfig.model_validate({"schedule": schedule, **changes}), {"image": IMAGENET}, 1000)


UNSHARED = " ".join(f"c{i} t{i}" for i in range(8))


@pytest.mark.parametrize(
    ("schedule", "parameters", "gflop"),
    [
        ("c0 t0 (c1 t0)x7", 44_912_254, 706.3),  # Table 7, shared
        (UNSHARED, 326_241_856, 706.3),  # Table 7, not shared
        ("c0 (t0)x8", 42_135_859, 404.0),  # Table 6, one cross-attend: at the start and interleaved are the same
        ("c0 c1 (t0)x8", 44_912_254, 447.2),  # Table 6, 2, 4 and 8 cross-attends at the start
        ("c0 (c1)x3 (t0)x8", 44_912_254, 533.5),
        ("c0 (c1)x7 (t0)x8", 44_912_254, 706.3),
        ("c0 (t0)x4 c1 (t0)x4", 44_912_254, 447.2),  # 2 and 4 interleaved, evenly: the paper leaves the spacing open
        ("c0 (t0)x2 (c1 (t0)x2)x3", 44_912_254, 533.5),
        ("c0 c1 c2 c3", 12_654_868, 172.8),  # Table 5, no latent Transformer
        ("c0 c1 c2 c3 c4 c5 c6 c7", 23_760_448, 345.5),
        ("c0 c1 c2 c3 c4 c5 c6 c7 c8 c9 c10 c11", 34_866_028, 518.3),
    ],
)
def test_parameters_and_flops_of_the_papers_tables(schedule: str, parameters: int, gflop: float) -> None:
    cost = estimate(ModelConfig(schedule=schedule), {"image": IMAGENET}, 1000)
    assert count(build(schedule)) == cost.parameters == parameters
    assert cost.flops / 1e9 == pytest.approx(gflop, rel=5e-4)
    assert (cost.num_inputs, cost.input_channels) == (50_176, 261)


@pytest.mark.parametrize(
    ("model", "inputs", "parameters"),
    [
        # Table 2's learned positions, 128 a pixel, one cross-attend: 48.19 M (paper.md's derivation).
        ({"schedule": "c0 (t0)x8"}, {"positions": "learned"}, 48_189_577),
        # Perceiver IO's published ImageNet models: Fourier, learned positions, convolution.
        ({"schedule": "c0 (t0)x8", "head": "query"}, {}, 48_440_627),
        (
            {"schedule": "c0 (t0)x8"},
            {"positions": "learned", "learned_channels": 256, "stem": "linear", "stem_channels": 256},
            55_885_288,
        ),
    ],
)
def test_parameters_of_learned_positions_and_perceiver_io(
    model: dict[str, object], inputs: dict[str, object], parameters: int
) -> None:
    spec = ImageSpec.model_validate(inputs)
    config, layouts = ModelConfig.model_validate(model), {"image": modality("image").layout(spec)}
    with torch.device("meta"):
        built = Perceiver(config, layouts, 1000)
    assert count(built) == estimate(config, layouts, 1000).parameters == parameters


@pytest.mark.parametrize("stem", ["none", "linear", "conv", "conv-same", "conv-valid"])
@pytest.mark.parametrize("head", ["mean", "query"])
def test_flops_and_parameters_of_stems_and_heads(stem: str, head: str) -> None:
    spec = ImageSpec.model_validate({"size": [30, 25], "stem": stem, "stem_channels": 8, "bands": 3})
    layout = modality("image").layout(spec)
    config = SMALL.model_copy(update={"head": head, "schedule": "c0 t0 c1 t0"})
    model = Perceiver(config, {"image": layout}, 10)
    for module in model.modules():
        if isinstance(module, CrossAttend):
            module.form = lambda *sizes: "projected"  # type: ignore[assignment]
    image = {"image": Segment(torch.randint(0, 256, (1, *layout.prepared_shape), dtype=torch.uint8))}
    model(image)  # the first pass of a process tests kernels, which would count
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(image)
    cost = estimate(config, {"image": layout}, 10)
    assert counter.get_total_flops() == cost.flops
    assert count(model) == cost.parameters


def test_a_fixed_permutation_of_rows_changes_no_logit() -> None:
    """Permuted ImageNet (4.1): one order for all inputs, features travelling with their pixels."""
    plain, permuted = (
        randomised(Perceiver(SMALL, {"image": replace(GRID, permutation=seed)}, 5)) for seed in (None, 7)
    )
    image = torch.randn(2, 6, 5, 3)
    torch.testing.assert_close(permuted({"image": Segment(image)}), plain({"image": Segment(image)}), rtol=0, atol=1e-5)
    assert not torch.equal(permuted.encoding({"image": Segment(image)}), plain.encoding({"image": Segment(image)}))


def test_learned_positions_tell_places_apart() -> None:
    layout = replace(GRID, learned_channels=16, learned_std=1.0)
    model = randomised(Perceiver(SMALL, {"image": layout}, 5))
    assert model.encoding.learned_positions["image"].shape == (30, 16)
    assert layout.num_channels == 3 + 16
    image = torch.randn(1, 6, 5, 3)
    moved = model({"image": Segment(image.flip(1))}) - model({"image": Segment(image)})
    assert moved.abs().max() > 1e-3


def test_counts_of_the_parts() -> None:
    model = build("c0 t0 (c1 t0)x7")
    assert count(model.cross_attends[0]) == 2_776_395
    assert count(model.latent_transformers[0]) == 6 * 6_301_696
    assert model.latents.numel() == 524_288
    assert count(model.head) == 1_025_000


def test_sharing_is_the_papers_by_identity() -> None:
    model = Perceiver(SMALL, {"image": GRID}, 3)
    calls: list[int] = []
    for module in [*model.cross_attends, *model.latent_transformers]:
        module.register_forward_hook(lambda module, *_: calls.append(id(module)))
    model({"image": Segment(torch.randn(1, 6, 5, 3))})
    first, shared = (id(module) for module in model.cross_attends)
    (transformer,) = (id(module) for module in model.latent_transformers)
    assert calls == [first, transformer, shared, transformer, shared, transformer]
    blocks = list(model.latent_transformers[0])
    assert blocks[0] is not blocks[1]  # shared across rounds, never between the blocks of one


def test_flops_in_closed_form_are_those_that_run() -> None:
    """With K and V projected in every cross-attend and plain attention, each product is counted as it happens."""
    config = ModelConfig(
        num_latents=16, latent_channels=64, schedule="c0 t0 c1 t1", self_attends_per_block=2, num_self_heads=4
    )
    layout = Layout((9, 7), 3, 2, 4, (9.0, 7.0))
    model = Perceiver(config, {"image": layout}, 10)
    for cross_attend in model.cross_attends:
        cross_attend.form = lambda *sizes: "projected"  # type: ignore[assignment]
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model({"image": Segment(torch.randn(1, 9, 7, 3))})
    assert counter.get_total_flops() == estimate(config, {"image": layout}, 10).flops


@pytest.mark.parametrize("name", preset_names())
def test_closed_form_is_what_is_built(name: str) -> None:
    config = load_preset(name)
    layouts = {}
    for key, spec in config.inputs.items():
        kind = modality(spec.modality)
        layouts[key] = kind.layout(kind.resolve(spec, [], config.data.limits))
    with torch.device("meta"):
        model = Perceiver(config.model, layouts, 7)
    assert count(model) == estimate(config.model, layouts, 7).parameters


@pytest.mark.parametrize(
    ("name", "inputs", "channels"),
    [
        ("imagenet", 50_176, 261),
        ("imagenet-permuted", 50_176, 261),
        ("imagenet-learned", 50_176, 131),
        ("imagenet-io", 50_176, 261),
        ("audioset-audio", 480, 257),
        ("audioset-mel", 4_800, 259),
        ("audioset-video", 12_544, 483),
        ("modelnet40", 2_048, 387),
    ],
)
def test_inputs_of_the_papers_presets(name: str, inputs: int, channels: int) -> None:
    config = load_preset(name)
    (spec,) = config.inputs.values()
    layout = modality(spec.modality).layout(spec)
    assert (layout.num_inputs, layout.num_channels) == (inputs, channels)


def test_inputs_of_sound_and_picture_are_perceiver_ios() -> None:
    config = load_preset("audioset-av")
    layouts = {name: modality(spec.modality).layout(spec) for name, spec in config.inputs.items()}
    cost = estimate(config.model, layouts, 527)
    assert (cost.num_inputs, cost.input_channels) == (13_024, 487)  # its Table 5: raw sound and video


def test_closed_form_with_several_modalities() -> None:
    layouts = {"image": GRID, "points": CLOUD}
    cost = estimate(SMALL, layouts, 5)
    assert count(Perceiver(SMALL, layouts, 5)) == cost.parameters
    assert cost.num_inputs == 60
    assert cost.input_channels == CLOUD.num_channels + 4


# ---------------------------------------------------------------- permutation (paper 3.2)


def randomised(model: Perceiver) -> Perceiver:
    """Give a model weights all over, its zero head too, so that every path shows in the logits."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_shuffled_rows_of_the_byte_array_change_nothing() -> None:
    torch.manual_seed(0)
    model = randomised(Perceiver(SMALL, {"cloud": CLOUD}, 5))
    values, positions = torch.randn(2, 30, 2), torch.rand(2, 30, 3) * 2 - 1
    order = torch.randperm(30)
    logits = model({"cloud": Segment(values, positions)})
    together = model({"cloud": Segment(values[:, order], positions[:, order])})
    values_only = model({"cloud": Segment(values[:, order], positions)})
    torch.testing.assert_close(together, logits, rtol=0, atol=1e-5)
    assert (values_only - logits).abs().max() > 1e-3


def test_a_grid_is_a_point_set_with_its_positions() -> None:
    """Pixels with their features in any order give the logits of the grid; pixels alone in another order do not."""
    from perceiver_cli.model.encoding import grid_positions

    grid = randomised(Perceiver(SMALL, {"image": GRID}, 5))
    points = Perceiver(SMALL, {"image": Layout((30,), 3, 2, 4, (6.0, 5.0), is_grid=False)}, 5)
    points.load_state_dict(grid.state_dict())
    torch.manual_seed(0)
    image = torch.randn(2, 6, 5, 3)
    rows, positions = image.reshape(2, 30, 3), grid_positions((6, 5)).expand(2, -1, -1)
    order = torch.randperm(30)
    logits = grid({"image": Segment(image)})
    shuffled = points({"image": Segment(rows[:, order], positions[:, order])})
    torch.testing.assert_close(shuffled, logits, rtol=0, atol=1e-5)
    assert (grid({"image": Segment(rows[:, order].reshape(2, 6, 5, 3))}) - logits).abs().max() > 1e-3


# ---------------------------------------------------------------- initial values


def test_initial_values() -> None:
    config = ModelConfig(num_latents=256, latent_channels=256, schedule="c0 t0", self_attends_per_block=1)
    model = Perceiver(config, {"image": IMAGENET}, 10)
    latents = model.latents.detach()
    assert latents.abs().max() <= 0.04
    assert latents.std() == pytest.approx(0.02 * 0.8796, rel=0.01)
    weight = model.latent_transformers[0][0].query.weight.detach()  # type: ignore[index,union-attr,operator]
    assert weight.std() == pytest.approx(256**-0.5, rel=0.01)  # type: ignore[arg-type]
    assert not model.head.weight.any()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()


def test_initial_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = Perceiver(SMALL, {"image": GRID}, 3, seed=5)
    torch.manual_seed(2)
    second = Perceiver(SMALL, {"image": GRID}, 3, seed=5)
    other = Perceiver(SMALL, {"image": GRID}, 3, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.latents, other.latents)


# ---------------------------------------------------------------- work done once


def test_keys_and_values_of_shared_cross_attends_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    def counted(x: torch.Tensor, cheap: Any, layers: Sequence[nn.Linear]) -> list[torch.Tensor]:
        made.extend(layers)
        return linears(x, cheap, layers)

    monkeypatch.setattr(attention, "linears", counted)
    monkeypatch.setattr(CrossAttend, "form", lambda *sizes: "projected")
    model = Perceiver(SMALL.model_copy(update={"schedule": "c0 t0 (c1 t0)x7"}), {"image": GRID}, 3)
    model({"image": Segment(torch.randn(1, 6, 5, 3))})
    assert [made.count(block.key) for block in model.cross_attends] == [1, 1]
    assert [made.count(block.query) for block in model.cross_attends] == [1, 7]


def test_first_queries_are_made_once_and_again_when_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Perceiver(SMALL, {"image": GRID}, 3))
    image = {"image": Segment(torch.randn(2, 6, 5, 3))}
    made: list[int] = []
    fold = CrossAttend.fold
    monkeypatch.setattr(CrossAttend, "form", lambda *sizes: "folded")
    monkeypatch.setattr(CrossAttend, "fold", lambda self, queries: made.append(len(queries)) or fold(self, queries))
    with torch.no_grad():
        expected = model(image)
    model.eval()
    with torch.inference_mode():
        made.clear()
        first = model(image)
        assert made == [1, 2, 2]  # the first, for all examples at once; the two others read what each has seen
        assert torch.equal(model(image), first)
        assert made == [1, 2, 2, 2, 2]
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(image) - expected).abs().max() > 0
    other = randomised(Perceiver(SMALL, {"image": GRID}, 3, seed=4)).state_dict()
    for change in (
        lambda: model.latents.copy_(torch.randn(8, 32)),
        lambda: model.load_state_dict(other),
    ):
        with torch.no_grad():
            change()
        with torch.inference_mode():
            answered = model(image)
        with torch.no_grad():
            expected = model.train()(image)
        model.eval()
        torch.testing.assert_close(answered, expected, rtol=0, atol=1e-6)


def test_an_evaluation_sees_the_weights_of_a_fused_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused step changes weights without their version: the first queries were those of the first evaluation."""
    monkeypatch.setattr(CrossAttend, "form", lambda *sizes: "folded")
    model = randomised(Perceiver(SMALL, {"image": GRID}, 3))
    image = {"image": Segment(torch.randn(2, 6, 5, 3))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model.train()(image).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            evaluated = model.eval()(image)
        copy = Perceiver(SMALL, {"image": GRID}, 3)
        copy.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected = copy(image)
        torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients_and_keep_less() -> None:
    model = randomised(Perceiver(SMALL, {"image": GRID}, 3))
    image = {"image": Segment(torch.randn(2, 6, 5, 3))}
    gradients, kept = [], []
    for model.recompute in (False, True):
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(image).square().sum()
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        kept.append(sum(storages.values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0]


def test_wrong_shapes_are_refused_with_both_named() -> None:
    model = Perceiver(SMALL, {"image": GRID}, 3)
    with pytest.raises(ValueError, match=r"\(1, 5, 6, 3\).*\(B, 6, 5, 3\)"):
        model({"image": Segment(torch.randn(1, 5, 6, 3))})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_bf16_stays_near_float32(device: str) -> None:
    model = randomised(Perceiver(SMALL, {"image": GRID}, 5)).to(device)
    image = torch.randn(4, 6, 5, 3, device=device)
    exact = model({"image": Segment(image)})
    with torch.autocast(device, dtype=torch.bfloat16):
        rough = model({"image": Segment(image)})
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
