"""The UNet of Stable Diffusion 1.x, 2.x and XL, written top-down: the network, its blocks, the layers inside a block.

Attribute names are the keys of a diffusers checkpoint, so a key found in a file can be grepped to the line that owns
it. The price is an odd name here and there: `to_out.0` and `ff.net.2` count positions of a list that also held dropout.
Architecture: Latent Diffusion [2112.10752, section 3.3], after the U-Net of DDPM [2006.11239, appendix B].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min.config import UNetConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionHook(Protocol):
    """What may be done instead of softmax(q k^T / sqrt(d)) v, in every transformer block alike.

    q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d); L = N in self-attention.
    """

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Conditioning:
    """What every block is given besides its input: time (B, time_width), context (B, L, D), how to attend."""

    time: Tensor
    context: Tensor
    attention: AttentionHook | None = None


class UNet(nn.Module):
    """Predict the noise (or v) in `x_t`, given the timestep and the text.

    x_t (B, C, h, w) in any float dtype, t int64 (B,), context (B, L, D); returns float32 (B, C, h, w).
    added (B, A) is SDXL's second way in: the pooled text beside sinusoids of the picture's sizes, embedded like t.
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
        added_width = config.projection_class_embeddings_input_dim
        self.add_embedding = TimeEmbedding(added_width, time_width) if added_width else None

        # Each level's resnets and downsampler leave one skip connection; the way up consumes them in reverse.
        skips, channels, last = [widths[0]], widths[0], len(widths) - 1
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            shape = BlockShape(width, heads[level], config.down_depths[level], resizes=level < last)
            inputs = [channels] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(DownBlock(inputs, shape, config))
            skips += [width] * (config.layers_per_block + shape.resizes)
            channels = width

        self.mid_block = MidBlock(BlockShape(channels, heads[-1], (config.mid_depth,), resizes=False), config)

        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(reversed(widths)):
            shape = BlockShape(width, heads[-1 - level], config.up_depths[level], resizes=level < last)
            inputs = [channels] + [width] * config.layers_per_block
            self.up_blocks.append(UpBlock([hidden + skips.pop() for hidden in inputs], shape, config))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_out = Float32Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Tensor,
        added: Tensor | None = None,
        attention: AttentionHook | None = None,
    ) -> Tensor:
        return self.predict(x_t, Conditioning(self.embed(t, added), context.to(self.conv_in.weight.dtype), attention))

    def predict(self, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        """Down, through the middle, and up again."""
        hidden = self.conv_in(x_t.to(self.conv_in.weight.dtype))
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, conditioning, skips)
        hidden = self.mid_block(hidden, conditioning)
        for block in self.up_blocks:
            hidden = block(hidden, conditioning, skips)
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))

    def embed(self, t: Tensor, added: Tensor | None = None) -> Tensor:
        """t (B,), and added (B, A) where the family has it -> (B, time_width)."""
        dtype = self.conv_in.weight.dtype
        time: Tensor = self.time_embedding(sinusoids(t, self.config.block_out_channels[0]).to(dtype))
        if self.add_embedding is not None:
            assert added is not None, "this UNet needs `added`: the pooled text and the picture's sizes"
            time = time + self.add_embedding(added.to(dtype))
        return time


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Describe numbers such as a timestep by waves of many lengths; values (...) -> float32 (..., width).

    [cos(t f_0), .., cos(t f_n), sin(t f_0), .., sin(t f_n)],  f_i = 10000 ^ (-i / n),  n = width / 2
    """
    half = width // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[..., None] * torch.exp(exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Float32Conv2d(nn.Conv2d):
    """A convolution that runs in, and returns, float32, whatever dtype its weights are kept in."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(hidden.float(), self.weight.float(), bias, self.stride, self.padding)


class TimeEmbedding(nn.Module):
    """A two-layer MLP on what every resnet is given; features (B, width) -> (B, time_width)."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


# --- one level --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockShape:
    """One level: width, attention heads, layers in each transformer (all 0: it does not attend), whether it resizes."""

    width: int
    heads: int
    depths: tuple[int, ...]
    resizes: bool

    def transformers(self, config: UNetConfig) -> nn.ModuleList:
        depths = self.depths if any(self.depths) else ()
        return nn.ModuleList(Transformer(self.width, self.heads, depth, config) for depth in depths)


class DownBlock(nn.Module):
    """One level on the way down: resnets, each followed by a transformer where the level attends, then a halving."""

    def __init__(self, inputs: list[int], shape: BlockShape, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, shape.width, config) for channels in inputs)
        self.attentions = shape.transformers(config)
        self.downsamplers = nn.ModuleList([Downsample(shape.width)] if shape.resizes else [])

    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        """Appends every intermediate result to `skips`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            hidden = resnet(hidden, conditioning)
            if attention is not None:
                hidden = attention(hidden, conditioning)
            skips.append(hidden)
        for downsample in self.downsamplers:
            hidden = downsample(hidden)
            skips.append(hidden)
        return hidden


class MidBlock(nn.Module):
    """The bottleneck: resnet, transformer, resnet; without a transformer the first resnet alone."""

    def __init__(self, shape: BlockShape, config: UNetConfig) -> None:
        super().__init__()
        (depth,) = shape.depths
        self.resnets = nn.ModuleList(ResnetBlock(shape.width, shape.width, config) for _ in range(2 if depth else 1))
        self.attentions = shape.transformers(config)

    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = self.resnets[0](hidden, conditioning)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden = resnet(attention(hidden, conditioning), conditioning)
        return hidden


class UpBlock(nn.Module):
    """One level on the way up: resnets over [hidden, skip], transformers where the level attends, then a doubling."""

    def __init__(self, inputs: list[int], shape: BlockShape, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, shape.width, config) for channels in inputs)
        self.attentions = shape.transformers(config)
        self.upsamplers = nn.ModuleList([Upsample(shape.width)] if shape.resizes else [])

    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        """Consumes one entry of `skips` per resnet; the next one left gives the size to upsample to."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), conditioning)
            if attention is not None:
                hidden = attention(hidden, conditioning)
        for upsample in self.upsamplers:
            # Not always twice the size: 65 latents halve to 33, which must come back as 65.
            hidden = upsample(hidden, skips[-1].shape[-2:])
        return hidden


# --- the layers inside a level ----------------------------------------------------------------------------------------


class ResnetBlock(nn.Module):
    """hidden + conv2(silu(norm2(conv1(silu(norm1(hidden))) + time))), the shortcut widened where widths differ."""

    def __init__(self, channels: int, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], width)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, width, 1) if channels != width else None

    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        hidden = hidden + self.time_emb_proj(F.silu(conditioning.time))[:, :, None, None]
        return residual + self.conv2(F.silu(self.norm2(hidden)))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (B, C, h, w), with a projection in and out."""

    def __init__(self, width: int, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.on_tokens = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.on_tokens else nn.Conv2d(width, width, 1)
        blocks = (TransformerBlock(width, heads, config) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(width, width) if self.on_tokens else nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        residual, size = hidden, hidden.shape[-2:]
        hidden = self.norm(hidden)
        if not self.on_tokens:
            hidden = self.proj_in(hidden)
        tokens = hidden.flatten(2).transpose(1, 2)  # (B, h w, C)
        if self.on_tokens:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, conditioning)
        if self.on_tokens:
            tokens = self.proj_out(tokens)
        hidden = tokens.transpose(1, 2).unflatten(2, size)
        return residual + (hidden if self.on_tokens else self.proj_out(hidden))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, config.upcast_attention)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, config.cross_attention_dim, heads, config.upcast_attention)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        on_self: Attend = F.scaled_dot_product_attention
        on_text: Attend = F.scaled_dot_product_attention
        if conditioning.attention is not None:
            on_self, on_text = conditioning.attention.self_attention, conditioning.attention.cross_attention
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed, on_self)
        tokens = tokens + self.attn2(self.norm2(tokens), conditioning.context, on_text)
        return tokens + self.ff(self.norm3(tokens))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over `heads` heads; tokens (B, N, C) attend to context (B, L, D) -> (B, N, C).

    With `upcast` it is computed in float32: SD 2.1's q k^T overflows float16.
    """

    def __init__(self, width: int, context_width: int, heads: int, upcast: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, tokens: Tensor, context: Tensor, attend: Attend) -> Tensor:
        q, k, v = (self.split_heads(each) for each in (self.to_q(tokens), self.to_k(context), self.to_v(context)))
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        attended = attend(q, k, v).to(tokens.dtype)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def split_heads(self, projected: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Widen fourfold through a gated unit, then project back; the identity stands where dropout was."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class GEGLU(nn.Module):
    """value * gelu(gate) with [value, gate] = proj(tokens); the gelu is the exact (erf) one. [2002.05202]"""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner_width)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Downsample(nn.Module):
    """Halve height and width (rounding up) with a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden)


class Upsample(nn.Module):
    """Grow to `size` with nearest neighbours, then convolve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(hidden, size=tuple(size), mode="nearest"))
