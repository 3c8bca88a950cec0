"""The Perceiver of Jaegle et al. 2021: cross-attends and latent Transformers, run by a schedule, then a linear head.

Axes: B batch, M inputs, N latents, C input channels, D latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_cli.config import ModelConfig
from perceiver_cli.errors import UsageError
from perceiver_cli.files import show_text
from perceiver_cli.model.attention import CrossAttend, Memory, SelfAttend
from perceiver_cli.model.cost import cross_width
from perceiver_cli.model.device import Compute
from perceiver_cli.model.encoding import ByteArrayEncoding, ModalityInputs, Segment
from perceiver_cli.model.stems import Embeddings
from perceiver_cli.preprocess.base import Layout

LATENT_STD = 0.02
# A normal distribution cut at two sigma has this standard deviation; Haiku divides by it.
TRUNCATED_STD = 0.87962566103423978


class Perceiver(nn.Module):
    """The model: logits from segments of one or several modalities.

    Weight sharing is data: `cross_attends` and `latent_transformers` hold the distinct weight sets, and the schedule
    (`ModelConfig.steps`) says which runs when. The default schedule is Table 7's: 2 cross-attends and 6 self-attend
    blocks, used 8 times.

    layouts: the shape of each modality's input, by name. The initial weights depend on `seed` alone.
    """

    def __init__(self, config: ModelConfig, layouts: Mapping[str, Layout], num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoding = ByteArrayEncoding(layouts, config.modality_channels)
        latent_channels, input_channels = config.latent_channels, self.encoding.num_channels
        width = cross_width(config, input_channels)
        widening, gelu = config.widening_factor, config.gelu
        self.latents = nn.Parameter(torch.empty(config.num_latents, latent_channels))
        self.cross_attends = nn.ModuleList(
            CrossAttend(latent_channels, input_channels, width, config.num_cross_heads, widening, gelu)
            for _ in range(config.num_cross_sets)
        )
        blocks = config.self_attends_per_block
        self.latent_transformers = nn.ModuleList(
            nn.Sequential(*(SelfAttend(latent_channels, config.num_self_heads, widening, gelu) for _ in range(blocks)))
            for _ in range(config.num_latent_sets)
        )
        self.recompute = (
            False  # compute activations of latent Transformers again in backward: a third more time, far less memory
        )
        self._folded: tuple[tuple[object, ...], Tensor] | None = None  # see _first_queries
        self._steady = False  # weights do not change: in evaluation mode, until a gradient is computed
        self.readout = QueryReadout(config) if config.head == "query" else None
        self.head = nn.Linear(latent_channels, num_classes)
        initialise(self, seed)

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return logits (B, classes) in float32 (App. C)."""
        return self.classify(self.encode(segments))

    def classify(self, latents: Tensor) -> Tensor:
        """Return logits (B, classes) in float32 from the final latents (B, N, D): their mean, then a linear layer."""
        logits: Tensor = self.head(latents.mean(dim=1) if self.readout is None else self.readout(latents))
        return logits.float()

    def encode(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return the final latents (B, N, D)."""
        return self.read(Memory(self.encoding.inputs(segments).values()))

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, as in torch, and forget what was computed from earlier weights."""
        self._folded, self._steady = None, not mode
        return super().train(mode)

    def read(self, memory: Memory) -> Tensor:
        """Return the final latents (B, N, D), after all steps of the schedule."""
        latents = self.latents.unsqueeze(0)  # all examples share them until the first cross-attend
        if torch.is_grad_enabled():  # an optimiser may step next
            self._folded, self._steady = None, False
        folded = self._first_queries() if memory.tileable and self._steady else None
        for kind, index in self.config.steps:
            if kind == "c":
                latents = self.cross_attends[index](latents, memory, folded)
                folded = None
            elif self.recompute and torch.is_grad_enabled():
                latents = checkpoint(self.latent_transformers[index], latents, use_reentrant=False)
            else:
                latents = self.latent_transformers[index](latents)
        return latents

    def _first_queries(self) -> Tensor:
        """Return the folded queries of the first cross-attend, which depend on no input; computed once per model.

        This is the only cache in the package that is keyed on tensors. A version alone is not enough: fused optimisers
        change weights but not their version. So queries are kept in evaluation mode only, until `train`, `eval` or a
        forward with gradients. Loading or moving a model changes a device, an address or a version.
        """
        block = self.cross_attends[0]
        assert isinstance(block, CrossAttend)
        weights: list[Tensor] = [*block.latent_norm.parameters(), *block.query.parameters()]
        weights += [self.latents, block.key.weight, block.input_norm.weight]
        kind = self.latents.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        state = (precision, *((p.device, p.data_ptr(), p._version) for p in weights))
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, block.fold(block.queries(self.latents.unsqueeze(0))))
        return self._folded[1]


class QueryReadout(nn.Module):
    """The readout of Perceiver IO: a learned query attends to the latents with one head and gives one vector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.query = nn.Parameter(torch.empty(1, channels))
        self.cross_attend = CrossAttend(channels, channels, channels, 1, 1, config.gelu, residual=config.query_residual)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the vector (B, D) that the query reads from latents (B, N, D)."""
        attended: Tensor = self.cross_attend(self.query.unsqueeze(0), Memory([ModalityInputs(latents)]))
        return attended[:, 0]


def compile_latents(model: Perceiver, compute: Compute) -> None:
    """Let torch.compile fuse the latent Transformers between their matrix products; weights keep their names.

    Raises UsageError, before the first step, if torch.compile cannot compile a sine here.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=compute.device))
    except Exception as error:  # no compiler, no Triton, an unsupported Python: each raises its own type
        reason = show_text(str(error).strip().partition("\n")[0])
        raise UsageError(f"torch.compile does not work here: {reason}", "leave out --compile") from error
    for transformer in model.latent_transformers:
        transformer.compile()


@torch.no_grad()
def initialise(model: Perceiver, seed: int) -> None:
    """Set every parameter from `seed` alone.

    | parameter | distribution | source |
    |---|---|---|
    | latents, modality encodings, query | normal, std 0.02, cut at two sigma (Haiku's reading of [-2, 2]) | App. C |
    | learned positions | the same with `learned_std`, 1.0 unless set | 4.1, App. B |
    | vectors of codes (text, tables) | as latents: larger ones of rare codes are noise (measured) | chosen here |
    | linear, convolution | LeCun: normal cut at two sigma, variance 1 / fan-in after the cut | official code |
    | linear biases, LayerNorm offsets | 0 | official code |
    | LayerNorm and batch norm scales | 1 | official code |
    | the head's weight | 0 | official code |
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(parameter: Tensor, std: float) -> None:
        if not parameter.is_meta:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)

    fill(model.latents, LATENT_STD)
    if model.readout is not None:
        fill(model.readout.query, LATENT_STD)
    for encoding in model.encoding.modality_encodings.values():
        fill(encoding, LATENT_STD)
    for name, table in model.encoding.learned_positions.items():
        fill(table, model.encoding.layouts[name].learned_std)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fill(module.weight, 1 / sqrt(module.weight[0].numel()) / TRUNCATED_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Embeddings):
            fill(module.vectors, LATENT_STD)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    nn.init.zeros_(model.head.weight)
