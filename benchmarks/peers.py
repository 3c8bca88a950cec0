"""The same model in other implementations, to measure against ours: the same sizes, the same synthetic input.

Axes: B batch, M inputs, N latents, C input channels, D latent channels, H heads, W width of Q, K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.config import ModelConfig
from perceiver_cli.errors import UsageError
from perceiver_cli.machine.growth import NUM_CLASSES, made_up_segments, new_model, read_alone
from perceiver_cli.model.attention import CrossAttend, Dense, SelfAttend, merge_heads, split_heads
from perceiver_cli.model.checkpoint import Calibration
from perceiver_cli.model.cost import cross_width
from perceiver_cli.model.encoding import ByteArrayEncoding, Segment
from perceiver_cli.model.export import Graph, describe_inputs, made_up, missing_packages, traced
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess.base import Layout

# Peers by name, with the module of each package. "onnxruntime" runs the output of `perceiver export`; "usual", which
# needs no package, is our model with the usual computation.
PACKAGES = {
    "perceiver-pytorch": "perceiver_pytorch",
    "transformers": "transformers",
    "perceiver-io": "perceiver",
    "onnxruntime": "onnxruntime",
}
EXTRAS = {"onnxruntime": "'perceiver-cli[onnx]'"}  # argument of pip install, if it is not the name
NAMES = ("usual", *PACKAGES)
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of Q, K, V (B, H, N or M, W / H) and the scale


@dataclass(frozen=True)
class Contender:
    """One implementation: `call` returns logits (B, classes), or the read of one cross-attend (B, N, W).

    differs: the difference of its model to the requested one, in words; empty if both are the same function.
    """

    call: Callable[[], Tensor]
    parameters: list[nn.Parameter] = field(default_factory=list)
    differs: str = ""


def is_installed(name: str) -> bool:
    """Return whether a contender's packages are installed. Raises UsageError for an unknown name."""
    if name not in NAMES:
        raise UsageError(f"--against {name}: not a peer", f"expected some of {', '.join(NAMES)}")
    if name == "onnxruntime":
        return not missing_packages(".onnx")
    return name == "usual" or find_spec(PACKAGES[name]) is not None


def build(
    name: str, config: ModelConfig, layouts: Mapping[str, Layout], batch: int, device: torch.device, *, alone: bool,
    model: Perceiver | None = None,
) -> Contender:  # fmt: skip
    """Return a contender by name: "ours", a name in `FORMS`, or a package.

    model: this package's, for "ours" and the usual ways; None makes one.
    alone: only the first cross-attend's read, without the linear layers on latents after it. The usual way then starts
    from a finished byte array; ours computes its replacement too.

    Raises:
        UsageError: the peer cannot build a model of these sizes.
    """
    segments = made_up_segments(layouts, batch, device)
    if name == "ours" or name in FORMS:
        return _of_this_model(name, model or new_model(config, layouts, device), segments, alone=alone)
    if alone:
        raise UsageError(f"--against {name}: no measurement of its cross-attend alone", "use --against usual")
    if name == "onnxruntime":
        return _onnxruntime(new_model(config, layouts, torch.device("cpu")), batch)
    (layout,) = layouts.values() if len(layouts) == 1 else (None,)
    if layout is None or not layout.is_grid or layout.learned_channels or layout.stem != "none":
        raise UsageError(f"--against {name}: needs one grid with Fourier features", "use --against usual")
    values = segments[next(iter(layouts))].values
    peer, differs = _PEERS[name](config, layout)
    peer.to(device).eval()
    logits = _logits(peer, values if name != "transformers" else values.movedim(-1, 1).contiguous())
    return Contender(logits, list(peer.parameters()), differs)


def _of_this_model(name: str, model: Perceiver, segments: Mapping[str, Segment], *, alone: bool) -> Contender:
    """Return this package's model as a contender, called our way or in one of the usual ways."""
    block = model.cross_attends[0]
    assert isinstance(block, CrossAttend)
    if name == "ours" and alone:
        return Contender(lambda: read_alone(model, segments), list(block.parameters()))
    if name == "ours":
        return Contender(lambda: model(segments), list(model.parameters()))
    attend = FORMS[name]
    if not alone:
        return Contender(lambda: usual_forward(model, segments, attend), list(model.parameters()))
    with torch.no_grad():
        rows = model.encoding(segments)  # before the timing
    latents = model.latents.expand(len(rows), -1, -1)
    return Contender(lambda: usual_read(block, latents, rows, attend), list(block.parameters()))


def _logits(peer: nn.Module, values: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        out = peer(values)
        logits: Tensor = getattr(out, "logits", out)
        return logits

    return call


def _onnxruntime(model: Perceiver, batch: int) -> Contender:
    layouts = model.encoding.layouts
    graph = Graph(model, Calibration(), multi_label=False)
    data, run, _ = traced(graph, {"inputs": describe_inputs(layouts)}, ".onnx")
    inputs = made_up(layouts, batch, 0, np.random.default_rng(0))
    size = f"a file of {len(data) / 1e6:.2f} MB, on the CPU; its memory includes the export"
    return Contender(lambda: torch.from_numpy(run(inputs)[0]), [], size)


# ---------------------------------------------------------------- the usual way


def by_einsum(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * Q K^T) V with all scores in memory."""
    scores = torch.einsum("bhnw,bhmw->bhnm", query, key) * scale
    return torch.einsum("bhnm,bhmw->bhnw", scores.softmax(dim=-1), value)


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * Q K^T) V by PyTorch's fused attention."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


FORMS: dict[str, Attend] = {"usual (einsum)": by_einsum, "usual (SDPA)": by_sdpa}


def usual_read(block: CrossAttend, latents: Tensor, byte_array: Tensor, attend: Attend) -> Tensor:
    """Return the latents' read (B, N, W), with K and V projected from the whole byte array (B, M, C)."""
    rows = block.input_norm(byte_array)
    normalised = block.latent_norm(latents)
    query, key, value = (
        split_heads(linear(x), block.heads)
        for linear, x in ((block.query, normalised), (block.key, rows), (block.value, rows))
    )
    return merge_heads(attend(query, key, value, query.shape[-1] ** -0.5))


def _usual_self_read(block: SelfAttend, latents: Tensor) -> Tensor:
    rows = block.norm(latents)
    query, key, value = (split_heads(linear(rows), block.heads) for linear in (block.query, block.key, block.value))
    return merge_heads(F.scaled_dot_product_attention(query, key, value))


def _usual_dense(dense: Dense, latents: Tensor) -> Tensor:
    out: Tensor = dense.project(dense.gelu(dense.widen(dense.norm(latents))))
    return out


def usual_forward(model: Perceiver, segments: Mapping[str, Segment], attend: Attend) -> Tensor:
    """Return our model's logits (B, classes), computed with a byte array as in every public implementation."""
    encoding: ByteArrayEncoding = model.encoding
    byte_array = encoding(segments)
    latents = model.latents.expand(len(byte_array), -1, -1)
    for kind, index in model.config.steps:
        if kind == "c":
            block = model.cross_attends[index]
            assert isinstance(block, CrossAttend)
            latents = latents + block.output(usual_read(block, latents, byte_array, attend))
            latents = latents + _usual_dense(block.dense, latents)
        else:
            for block in model.latent_transformers[index].children():
                assert isinstance(block, SelfAttend)
                latents = latents + block.output(_usual_self_read(block, latents))
                latents = latents + _usual_dense(block.dense, latents)
    logits: Tensor = model.head(latents.mean(dim=1) if model.readout is None else model.readout(latents))
    return logits


# ---------------------------------------------------------------- packages


def _perceiver_pytorch(config: ModelConfig, layout: Layout) -> tuple[nn.Module, str]:
    from perceiver_pytorch import Perceiver as Theirs

    rounds, width = sum(kind == "c" for kind, _ in config.steps), cross_width(config, layout.num_channels)
    blocks = sum(kind == "t" for kind, _ in config.steps) // rounds * config.self_attends_per_block
    peer = Theirs(
        num_freq_bands=layout.bands, depth=rounds, max_freq=max(layout.max_resolution),
        input_channels=layout.channels, input_axis=layout.dims, num_latents=config.num_latents,
        latent_dim=config.latent_channels, cross_heads=config.num_cross_heads,
        cross_dim_head=width // config.num_cross_heads, latent_heads=config.num_self_heads,
        latent_dim_head=config.latent_channels // config.num_self_heads, num_classes=NUM_CLASSES,
        weight_tie_layers=config.num_cross_sets < rounds, self_per_cross_attn=blocks,
    )  # fmt: skip
    return peer, "dense blocks are 4 times wide and gated (GEGLU); its latent Transformers 2 to n are shared, 1 is not"


def _transformers(config: ModelConfig, layout: Layout) -> tuple[nn.Module, str]:
    from transformers import PerceiverConfig
    from transformers.models.perceiver import modeling_perceiver as theirs

    if layout.dims != 2:
        raise UsageError("--against transformers: its classifier with Fourier features reads images only")
    rounds = sum(kind == "t" for kind, _ in config.steps)
    settings = PerceiverConfig(
        num_latents=config.num_latents, d_latents=config.latent_channels, d_model=layout.num_channels,
        num_blocks=rounds, num_self_attends_per_block=config.self_attends_per_block,
        num_self_attention_heads=config.num_self_heads, num_cross_attention_heads=config.num_cross_heads,
        self_attention_widening_factor=config.widening_factor, cross_attention_widening_factor=config.widening_factor,
        num_labels=NUM_CLASSES,  # type: ignore[call-arg]
    )  # fmt: skip
    positions = {
        "concat_pos": True, "max_resolution": layout.grid, "num_bands": layout.bands, "sine_only": False,
    }  # fmt: skip

    # Built as its PerceiverForImageClassificationFourier, which takes 224 x 224 and 64 bands only.
    peer = theirs.PerceiverModel(
        settings,
        input_preprocessor=theirs.PerceiverImagePreprocessor(
            settings, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=positions
        ),
        decoder=theirs.PerceiverClassificationDecoder(  # type: ignore[no-untyped-call]
            settings, num_channels=config.latent_channels, use_query_residual=True,
            trainable_position_encoding_kwargs={"num_channels": config.latent_channels, "index_dims": 1},
        ),
    )  # fmt: skip
    crosses = sum(kind == "c" for kind, _ in config.steps)
    differs = [f"1 cross-attend for {crosses}"] if crosses > 1 else []
    differs += ["a learned query reads the latents"] if config.head == "mean" else []
    return peer, ", ".join(differs)


def _perceiver_io(config: ModelConfig, layout: Layout) -> tuple[nn.Module, str]:
    from perceiver.model import core  # its image classifier, without its training framework

    class Pixels(core.InputAdapter):  # type: ignore[misc]
        def __init__(self) -> None:
            positions = core.FourierPositionEncoding(input_shape=layout.grid, num_frequency_bands=layout.bands)
            super().__init__(layout.channels + positions.num_position_encoding_channels())
            self.positions = positions

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.flatten(1, -2), self.positions(len(x))], dim=-1)

    crosses, width = sum(kind == "c" for kind, _ in config.steps), cross_width(config, layout.num_channels)
    encoder = core.PerceiverEncoder(
        Pixels(), config.num_latents, config.latent_channels,
        num_cross_attention_heads=config.num_cross_heads, num_cross_attention_qk_channels=width,
        num_cross_attention_v_channels=width, num_cross_attention_layers=crosses,
        first_cross_attention_layer_shared=config.num_cross_sets < min(2, crosses),
        cross_attention_widening_factor=config.widening_factor, num_self_attention_heads=config.num_self_heads,
        num_self_attention_layers_per_block=config.self_attends_per_block,
        num_self_attention_blocks=sum(kind == "t" for kind, _ in config.steps),
        first_self_attention_block_shared=True, self_attention_widening_factor=config.widening_factor,
    )  # fmt: skip
    channels = config.latent_channels
    decoder = core.PerceiverDecoder(
        core.ClassificationOutputAdapter(NUM_CLASSES, num_output_query_channels=channels),
        core.TrainableQueryProvider(1, channels), channels, num_cross_attention_heads=1,
    )  # fmt: skip
    return core.PerceiverIO(encoder, decoder), "" if config.head == "query" else "a learned query reads the latents"


_PEERS: dict[str, Callable[[ModelConfig, Layout], tuple[nn.Module, str]]] = {
    "perceiver-pytorch": _perceiver_pytorch,
    "transformers": _transformers,
    "perceiver-io": _perceiver_io,
}
