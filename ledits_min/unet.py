"""The Stable Diffusion 1.x UNet, written top-down: the network, its blocks, then the layers inside a block.

Attribute names are the keys of a diffusers checkpoint, so a key found in a file can be grepped to the line that owns
it. The price is an odd name here and there: `to_out.0` and `ff.net.2` count positions of a list that also held dropout.
Architecture: Latent Diffusion [2112.10752, section 3.3], after the U-Net of DDPM [2006.11239, appendix B].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min.config import UNetConfig
from ledits_min.ops import geglu, group_norm_silu


class UNet(nn.Module):
    """Predict the noise (or v) in `x_t`, given the timestep and the text.

    x_t (B, C, h, w) in any float dtype, t int64 (B,), context (B, L, D); returns float32 (B, C, h, w).
    The body runs in the parameters' dtype. The last convolution runs in float32 whatever that dtype is: SEGA works on
    the difference of two predictions, of which a bfloat16 output would keep only a handful of levels.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, heads = config.block_out_channels, config.num_attention_heads
        time_width = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_width)

        # Each level's resnets and downsampler leave one skip connection; the way up consumes them in reverse.
        skips = [widths[0]]
        channels = widths[0]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
            last = level == len(widths) - 1
            self.down_blocks.append(
                DownBlock(channels, width, time_width, heads[level] if attends else None, not last, config)
            )
            skips += [width] * (config.layers_per_block + (not last))
            channels = width

        self.mid_block = MidBlock(channels, time_width, heads[-1], config)

        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(reversed(widths)):
            attends = config.up_block_types[level] == "CrossAttnUpBlock2D"
            last = level == len(widths) - 1
            skip_channels = [skips.pop() for _ in range(config.layers_per_block + 1)]
            level_heads = tuple(reversed(heads))[level] if attends else None
            self.up_blocks.append(UpBlock(channels, skip_channels, width, time_width, level_heads, not last, config))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(t, dtype)
        context = context.to(dtype)
        hidden = self.conv_in(x_t.to(dtype))
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, time, context, skips)
        hidden = self.mid_block(hidden, time, context)
        for block in self.up_blocks:
            hidden = block(hidden, time, context, skips)
        hidden = group_norm_silu(hidden, self.conv_norm_out).float()
        bias = None if self.conv_out.bias is None else self.conv_out.bias.float()
        return F.conv2d(hidden, self.conv_out.weight.float(), bias, padding=1)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t through a two-layer MLP; t (B,) -> (B, time_width).

    features = [cos(t f_0), .., cos(t f_n), sin(t f_0), .., sin(t f_n)],  f_i = 10000 ^ (-i / n),  n = width / 2
    """

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.width // 2
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(exponent)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return embedding


class DownBlock(nn.Module):
    """One level on the way down: resnets, each followed by a transformer where the level attends, then a halving."""

    def __init__(
        self, channels: int, width: int, time_width: int, heads: int | None, downsample: bool, config: UNetConfig
    ) -> None:
        super().__init__()
        layers = config.layers_per_block
        inputs = [channels] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, width, time_width, config) for c in inputs)
        if heads is not None:
            self.attentions = nn.ModuleList(Transformer(width, heads, config) for _ in range(layers))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(width)])

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Appends every intermediate result to `skips`."""
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(hidden, time)
            if hasattr(self, "attentions"):
                hidden = self.attentions[i](hidden, context)
            skips.append(hidden)
        if hasattr(self, "downsamplers"):
            hidden = self.downsamplers[0](hidden)
            skips.append(hidden)
        return hidden


class MidBlock(nn.Module):
    """The bottleneck: resnet, transformer, resnet."""

    def __init__(self, width: int, time_width: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time_width, config) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(width, heads, config)])

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor) -> Tensor:
        hidden = self.resnets[0](hidden, time)
        hidden = self.attentions[0](hidden, context)
        result: Tensor = self.resnets[1](hidden, time)
        return result


class UpBlock(nn.Module):
    """One level on the way up: resnets over [hidden, skip], transformers where the level attends, then a doubling."""

    def __init__(
        self,
        channels: int,
        skip_channels: list[int],
        width: int,
        time_width: int,
        heads: int | None,
        upsample: bool,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        inputs = [channels] + [width] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(c + skip, width, time_width, config) for c, skip in zip(inputs, skip_channels, strict=True)
        )
        if heads is not None:
            self.attentions = nn.ModuleList(Transformer(width, heads, config) for _ in skip_channels)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """Consumes one entry of `skips` a resnet; the next one left gives the size to upsample to."""
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), time)
            if hasattr(self, "attentions"):
                hidden = self.attentions[i](hidden, context)
        if hasattr(self, "upsamplers"):
            # Not always twice the size: 65 latents halve to 33, which must come back as 65.
            hidden = self.upsamplers[0](hidden, skips[-1].shape[-2:])
        return hidden


class ResnetBlock(nn.Module):
    """hidden + conv2(silu(norm2(conv1(silu(norm1(hidden))) + time))), the shortcut widened where widths differ."""

    def __init__(self, channels: int, width: int, time_width: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, width)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, width, 1) if channels != width else None

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(group_norm_silu(hidden, self.norm1))
        hidden = self.conv2(group_norm_silu(hidden, self.norm2, add=self.time_emb_proj(F.silu(time))))
        return residual + hidden


class Transformer(nn.Module):
    """A transformer block over the pixels of a feature map (B, C, h, w), with a projection in and out."""

    def __init__(self, width: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear_projection = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.linear_projection else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, config.cross_attention_dim)])
        self.proj_out = nn.Linear(width, width) if self.linear_projection else nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        height, width = hidden.shape[-2:]
        residual = hidden
        hidden = group_norm_silu(hidden, self.norm, silu=False)
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        tokens = hidden.flatten(2).transpose(1, 2)  # (B, h w, C)
        if self.linear_projection:
            tokens = self.proj_in(tokens)
        tokens = self.transformer_blocks[0](tokens, context)
        if self.linear_projection:
            tokens = self.proj_out(tokens)
        hidden = tokens.transpose(1, 2).unflatten(2, (height, width))
        if not self.linear_projection:
            hidden = self.proj_out(hidden)
        return residual + hidden


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        result: Tensor = tokens + self.ff(self.norm3(tokens))
        return result


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over `heads` heads; tokens (B, N, C) attend to context (B, L, D)."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        q = self.split_heads(self.to_q(tokens))
        k = self.split_heads(self.to_k(context))
        v = self.split_heads(self.to_v(context))
        attended = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return result

    def split_heads(self, projected: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Widen four times through a gated unit, then project back; the identity stands where dropout was."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.net(tokens)
        return result


class GEGLU(nn.Module):
    """value * gelu(gate) with [value, gate] = proj(tokens); the gelu is the exact (erf) one. [2002.05202]"""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner_width)

    def forward(self, tokens: Tensor) -> Tensor:
        return geglu(self.proj(tokens))


class Downsample(nn.Module):
    """Halve height and width (rounding up) with a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.conv(hidden)
        return result


class Upsample(nn.Module):
    """Grow to `size` with nearest neighbours, then convolve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor, size: torch.Size) -> Tensor:
        result: Tensor = self.conv(F.interpolate(hidden, size=size, mode="nearest"))
        return result
