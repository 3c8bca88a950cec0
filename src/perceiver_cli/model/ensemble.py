"""Several models of one recipe as one: the mean of their probabilities.

Axes: B batch, N latents, D latent channels, K members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.model.encoding import ByteArrayEncoding, Segment
from perceiver_cli.model.perceiver import Perceiver


class Ensemble(nn.Module):
    """The models of several folds or seeds, which read the same inputs and answer as one."""

    def __init__(self, members: Iterable[Perceiver], *, multi_label: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.multi_label = multi_label

    @property
    def encoding(self) -> ByteArrayEncoding:
        """The encoding of the first member; the others differ in weights alone."""
        return self.parts[0].encoding

    @property
    def head(self) -> nn.Linear:
        """The head of the first member, for its shape."""
        return self.parts[0].head

    @property
    def parts(self) -> tuple[Perceiver, ...]:
        """The members."""
        return tuple(self.members)  # type: ignore[arg-type]

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return logits (B, classes) in float32 of the mean probabilities."""
        return self.classify(self.encode(segments))

    def encode(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return the final latents (B, K N, D) of all members, one after the other."""
        return torch.cat([member.encode(segments) for member in self.parts], dim=1)

    def classify(self, latents: Tensor) -> Tensor:
        """Return logits (B, classes) in float32 from latents of `encode`."""
        parts = zip(self.parts, latents.chunk(len(self.parts), dim=1), strict=True)
        return joined([member.classify(own) for member, own in parts], multi_label=self.multi_label)


Model = Perceiver | Ensemble


def parts_of(model: Model) -> tuple[Perceiver, ...]:
    """Return the members of an ensemble, or a single model itself."""
    return model.parts if isinstance(model, Ensemble) else (model,)


def joined(logits: Sequence[Tensor], *, multi_label: bool) -> Tensor:
    """Return logits (B, classes) of the mean probabilities of several models or views; logits of one are unchanged."""
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack(list(logits))
    if multi_label:
        # The odds of the mean, as sums in logarithms: a mean in float32 rounds to 1, whose logit is infinite. A
        # softplus, because ONNX has no stable logsigmoid.
        return (-F.softplus(-stacked)).logsumexp(dim=0) - (-F.softplus(stacked)).logsumexp(dim=0)
    return stacked.log_softmax(dim=-1).logsumexp(dim=0) - log(len(logits))
