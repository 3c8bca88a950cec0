"""The two attention blocks: cross-attend (latents read the byte array) and self-attend (latents among themselves).

Axes: B batch, M inputs, N latents, C input channels, D latent channels, H heads, W width of Q, K and V.

Both blocks are pre-LayerNorm residual: `x = x + attention(norm(x), ...)`, then `x = x + dense(norm(x))` (App. C).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5  # LayerNorm's, as in Haiku


class Dense(nn.Module):
    """LayerNorm, linear, GELU, linear: the block after every attention; widening 1 is the paper's (no bottleneck)."""

    def __init__(self, channels: int, widening: int, gelu: str = "tanh") -> None:
        super().__init__()
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.widen = nn.Linear(channels, channels * widening)
        self.project = nn.Linear(channels * widening, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, D), to be added to `x`."""
        out: Tensor = self.project(F.gelu(self.widen(self.norm(x)), approximate=self.approximate))
        return out


class CrossAttend(nn.Module):
    """Latents (B, N, D) attend to a byte array (B, M, C) (paper 3.1, App. C).

    The byte array arrives as `normalised`: LayerNorm without its scale and offset, which has no parameters and is
    therefore made once for all cross-attends of a forward. Keys and values are used in one of two equal forms:

    - folded: LayerNorm's scale and the key matrix move to the latents' side, q . K_m = (scale * Wk^T q) . xhat_m plus
      a term that is the same for every m and cancels in the softmax; since weights sum to 1, the value matrix can be
      applied after the sum. Keys = values = xhat, and nothing of size M x C is projected.
    - projected: K and V are made from xhat, once per weight set and forward.

    `folds` picks the cheaper one. A key bias shifts all scores of a latent equally, so it changes nothing and gets no
    gradient in the folded form (and exactly zero, mathematically, in the other).

    With `residual` off the result of the attention takes the latents' place instead of being added to them.
    """

    def __init__(
        self,
        latent_channels: int,
        input_channels: int,
        width: int,
        heads: int,
        widening: int,
        gelu: str = "tanh",
        *,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.residual = residual
        self.latent_norm = nn.LayerNorm(latent_channels, eps=EPS)
        self.input_norm = nn.LayerNorm(input_channels, eps=EPS)
        self.query = nn.Linear(latent_channels, width)
        self.key = nn.Linear(input_channels, width)
        self.value = nn.Linear(input_channels, width)
        self.output = nn.Linear(width, latent_channels)
        self.dense = Dense(latent_channels, widening, gelu)

    def folds(self, num_latents: int) -> bool:
        """Return whether the folded form costs fewer multiply-adds per input than the projected one."""
        width, channels = self.key.weight.shape
        return 2 * self.heads * num_latents * channels <= 2 * channels * width + 2 * num_latents * width

    def keys_values(self, normalised: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, 1 or H, M, C or W) of a normalised byte array (B, M, C), in the cheaper form."""
        if self.folds(num_latents):
            folded = normalised.unsqueeze(1)
            return folded, folded
        rows = normalised * self.input_norm.weight + self.input_norm.bias
        return split_heads(self.key(rows), self.heads), split_heads(self.value(rows), self.heads)

    def forward(self, latents: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the new latents (B, N, D), from what `keys_values` gave for the same number of latents."""
        batch, count, _ = latents.shape
        query = split_heads(self.query(self.latent_norm(latents)), self.heads)  # (B, H, N, W / H)
        scale = query.shape[-1] ** -0.5
        if keys is values:
            # (W, C) -> (H, W / H, C): the rows of each head
            key_rows = self.key.weight.view(self.heads, -1, keys.shape[-1])
            folded = (query @ key_rows) * (self.input_norm.weight * scale)  # (B, H, N, C)
            attended = attend(folded.flatten(1, 2).unsqueeze(1), keys, values, 1.0)  # all heads share xhat
            attended = attended.view(batch, self.heads, count, -1) * self.input_norm.weight + self.input_norm.bias
            value_rows = self.value.weight.view(self.heads, -1, keys.shape[-1])
            attended = merge_heads(attended @ value_rows.mT) + self.value.bias
        else:
            attended = merge_heads(attend(query, keys, values, scale))
        attended = self.output(attended)
        latents = latents + attended if self.residual else attended
        return latents + self.dense(latents)  # type: ignore[no-any-return]


class SelfAttend(nn.Module):
    """One block of the latent Transformer on latents (B, N, D): a GPT-2 block without a mask (paper 3.1, App. C)."""

    def __init__(self, channels: int, heads: int, widening: int, gelu: str = "tanh") -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.dense = Dense(channels, widening, gelu)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the new latents (B, N, D)."""
        normalised = self.norm(latents)
        query, key, value = (split_heads(f(normalised), self.heads) for f in (self.query, self.key, self.value))
        latents = latents + self.output(merge_heads(attend(query, key, value, query.shape[-1] ** -0.5)))
        return latents + self.dense(latents)  # type: ignore[no-any-return]


def normalise(x: Tensor) -> Tensor:
    """Return LayerNorm of the rows of (B, M, C) without scale and offset, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return (B, N, W) as (B, H, N, W / H)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Return (B, H, N, W / H) as (B, N, W)."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(scale * Q K^T) V over (B, H, N or M, W) through PyTorch's fused attention."""
    width = query.shape[-1]
    pad = -width % 8 if query.is_cuda else 0
    if pad:
        # CUDA's fused kernels refuse a width such as the paper's 261 and PyTorch then silently builds all N x M
        # scores; zero columns change no score.
        query, key, value = (F.pad(x, (0, pad)) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :width]
