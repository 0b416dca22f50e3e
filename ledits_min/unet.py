"""The UNet of Stable Diffusion 1.x, 2.x and XL, written top-down: the network, its blocks, the layers inside a block.

Attribute names are the keys of a diffusers checkpoint, so a key found in a file can be grepped to the line that owns
it. The price is an odd name here and there: `to_out.0` and `ff.net.2` count positions of a list that also held dropout.
Architecture: Latent Diffusion [2112.10752, section 3.3], after the U-Net of DDPM [2006.11239, appendix B].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledits_min.config import UNetConfig
from ledits_min.engine.ops import add_conv, add_linear, conv, feed_forward, group_norm_silu, upsample_conv
from ledits_min.engine.ops import attention as plain_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
KeysValues = Mapping["Attention", tuple[Tensor, Tensor]]  # what a text is to every cross-attention


class AttentionControl(Protocol):
    """What may be done instead of softmax(q k^T / sqrt(d)) v, in every transformer block alike.

    q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d); L = N in self-attention.
    """

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Conditioning:
    """What every block is told besides its input: time (B, time_width), the text's context (B, L, D), how to attend.

    rows (B,): where fewer inputs than B are given, which of them each row of the batch is about. Up to the first
    cross-attention, which is the first to look at the text, every map is one an input and not one a row.
    """

    time: Tensor
    context: Tensor | KeysValues
    attention: AttentionControl | None = None
    rows: Tensor | None = None

    def time_of(self, hidden: Tensor) -> Tensor:
        """`time` for every entry of `hidden`; the rows of one input have the same."""
        if self.rows is None or len(hidden) == len(self.rows):
            return self.time
        return self.time.new_empty(len(hidden), self.time.shape[1]).index_copy_(0, self.rows, self.time)

    def spread(self, values: Tensor) -> Tensor:
        """`values`, one an input or one a row already, as one a row."""
        return values if self.rows is None or len(values) == len(self.rows) else values[self.rows]


class UNet(nn.Module):
    """Predict the noise (or v) in `x_t`, given the timestep and the text.

    x_t (B, C, h, w) in any float dtype, t int64 (B,), context (B, L, D); returns float32 (B, C, h, w).
    added (B, A) is SDXL's second way in: the pooled text beside sinusoids of the picture's sizes, embedded like t.
    With rows int64 (B,), x_t (M, C, h, w) has fewer entries than t and context: row i is about x_t[rows[i]], and rows
    about the same x_t, whose t and `added` must be the same, share what is computed before the text is looked at.
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
        skips = [widths[0]]
        channels = widths[0]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down_blocks.append(
                DownBlock(channels, width, time_width, heads[level], config.down_depths[level], not last, config)
            )
            skips += [width] * (config.layers_per_block + (not last))
            channels = width

        self.mid_block = MidBlock(channels, time_width, heads[-1], config.mid_depth, config)

        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(reversed(widths)):
            last = level == len(widths) - 1
            skip_channels = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(
                UpBlock(
                    channels, skip_channels, width, time_width, heads[-1 - level], config.up_depths[level], not last,
                    config,
                )
            )  # fmt: skip
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Tensor | KeysValues,
        added: Tensor | None = None,
        attention: AttentionControl | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Whoever asks often about the same t or text passes what `embed` and `project` made of them instead."""
        dtype = self.conv_in.weight.dtype
        time = t if t.is_floating_point() else self.embed(t, added)
        if isinstance(context, Tensor):
            context = context.to(dtype)
        assert rows is None or (len(x_t) < len(rows) and attention is None), "rows are for inputs that several share"
        conditioning = Conditioning(time, context, attention, rows)
        hidden = self.conv_in(x_t.to(dtype))
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, conditioning, skips)
        hidden = self.mid_block(hidden, conditioning)
        for block in self.up_blocks:
            hidden = block(hidden, conditioning, skips)
        hidden = group_norm_silu(hidden, self.conv_norm_out).float()
        bias = None if self.conv_out.bias is None else self.conv_out.bias.float()
        return F.conv2d(hidden, self.conv_out.weight.float(), bias, padding=1)

    def embed(self, t: Tensor, added: Tensor | None = None) -> Tensor:
        """t (B,), and added (B, A) where the family has it -> (B, time_width)."""
        dtype = self.conv_in.weight.dtype
        time: Tensor = self.time_embedding(sinusoids(t, self.config.block_out_channels[0]).to(dtype))
        if self.add_embedding is not None:
            assert added is not None, "this UNet is told more than the text's tokens"
            time = time + self.add_embedding(added.to(dtype))
        return time

    def project(self, context: Tensor) -> KeysValues:
        """context (B, L, D) -> its keys and values (B, heads, L, C / heads) in every cross-attention."""
        context = context.to(self.conv_in.weight.dtype)
        crossing = [block.attn2 for block in self.modules() if isinstance(block, TransformerBlock)]
        return {attention: attention.project(context) for attention in crossing}


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Describe numbers such as a timestep by waves of many lengths; values (...) -> float32 (..., width).

    [cos(t f_0), .., cos(t f_n), sin(t f_0), .., sin(t f_n)],  f_i = 10000 ^ (-i / n),  n = width / 2
    """
    half = width // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[..., None] * torch.exp(exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """A two-layer MLP on what every resnet is told; features (B, width) -> (B, time_width)."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, features: Tensor) -> Tensor:
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return embedding


class DownBlock(nn.Module):
    """One level on the way down: resnets, each followed by a transformer where the level attends, then a halving.

    `depths` has the number of layers in each transformer; zeros where the level does not attend.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        time_width: int,
        heads: int,
        depths: tuple[int, ...],
        downsample: bool,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        inputs = [channels] + [width] * (len(depths) - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, width, time_width, config) for c in inputs)
        if any(depths):
            self.attentions = nn.ModuleList(Transformer(width, heads, depth, config) for depth in depths)
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(width)])

    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        """Appends every intermediate result to `skips`."""
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(hidden, conditioning.time_of(hidden))
            if hasattr(self, "attentions"):
                hidden = self.attentions[i](hidden, conditioning)
            skips.append(hidden)
        if hasattr(self, "downsamplers"):
            hidden = self.downsamplers[0](hidden)
            skips.append(hidden)
        return hidden


class MidBlock(nn.Module):
    """The bottleneck: resnet, transformer, resnet; without a transformer the first resnet alone."""

    def __init__(self, width: int, time_width: int, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, time_width, config) for _ in range(2 if depth else 1))
        self.attentions = nn.ModuleList([Transformer(width, heads, depth, config)] if depth else [])

    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = self.resnets[0](hidden, conditioning.time_of(hidden))
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden = resnet(attention(hidden, conditioning), conditioning.time)
        return hidden


class UpBlock(nn.Module):
    """One level on the way up: resnets over [hidden, skip], transformers where the level attends, then a doubling."""

    def __init__(
        self,
        channels: int,
        skip_channels: list[int],
        width: int,
        time_width: int,
        heads: int,
        depths: tuple[int, ...],
        upsample: bool,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        inputs = [channels] + [width] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(c + skip, width, time_width, config) for c, skip in zip(inputs, skip_channels, strict=True)
        )
        if any(depths):
            self.attentions = nn.ModuleList(Transformer(width, heads, depth, config) for depth in depths)
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        """Consumes one entry of `skips` a resnet; the next one left gives the size to upsample to."""
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(torch.cat([hidden, conditioning.spread(skips.pop())], dim=1), conditioning.time)
            if hasattr(self, "attentions"):
                hidden = self.attentions[i](hidden, conditioning)
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
        residual = hidden if self.conv_shortcut is None else conv(hidden, self.conv_shortcut)
        hidden = conv(group_norm_silu(hidden, self.norm1), self.conv1)
        hidden = group_norm_silu(hidden, self.norm2, add=self.time_emb_proj(F.silu(time)))
        return add_conv(residual, hidden, self.conv2)


class Transformer(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map (B, C, h, w), with a projection in and out."""

    def __init__(self, width: int, heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        linear = config.use_linear_projection
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads, config) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = hidden.shape[-2:]
        residual = conditioning.spread(hidden)
        hidden = group_norm_silu(hidden, self.norm, silu=False)
        if isinstance(self.proj_in, nn.Conv2d):
            hidden = conv(hidden, self.proj_in)
        tokens = hidden.flatten(2).transpose(1, 2)  # (B, h w, C)
        if isinstance(self.proj_in, nn.Linear):
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, conditioning)
        if isinstance(self.proj_out, nn.Linear):
            tokens = self.proj_out(tokens)
        hidden = tokens.transpose(1, 2).unflatten(2, (height, width))
        if isinstance(self.proj_out, nn.Conv2d):
            return add_conv(residual, hidden, self.proj_out)
        return residual + hidden


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
        control = conditioning.attention
        on_self: Attend = plain_attention
        on_text: Attend = plain_attention
        if control is not None:
            on_self, on_text = control.self_attention, control.cross_attention
        normed = self.norm1(tokens)
        tokens = conditioning.spread(self.attn1(tokens, normed, normed, on_self))
        tokens = self.attn2(tokens, self.norm2(tokens), conditioning.context, on_text)
        result: Tensor = self.ff(tokens, self.norm3)
        return result


class Attention(nn.Module):
    """residual + softmax(q k^T / sqrt(d)) v over `heads` heads; tokens (B, N, C) attend to context (B, L, D).

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

    def forward(self, residual: Tensor, tokens: Tensor, context: Tensor | KeysValues, attend: Attend) -> Tensor:
        q = self.split_heads(self.to_q(tokens))
        k, v = self.project(context) if isinstance(context, Tensor) else context[self]
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        attended = attend(q, k, v).to(tokens.dtype)
        last = self.to_out[0]
        assert isinstance(last, nn.Linear)
        return add_linear(residual, attended.transpose(1, 2).flatten(2), last)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of context (B, L, D), (B, heads, L, C / heads) each."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def split_heads(self, projected: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        batch, tokens, _ = projected.shape
        return projected.view(batch, tokens, self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Widen four times through a gated unit, then project back; the identity stands where dropout was."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
        """tokens + net(norm(tokens)), as one operation."""
        unit, _, narrow = self.net
        assert isinstance(unit, GEGLU) and isinstance(narrow, nn.Linear)
        return feed_forward(tokens, norm, unit.proj, narrow)


class GEGLU(nn.Module):
    """value * gelu(gate) with [value, gate] = proj(tokens); the gelu is the exact (erf) one. [2002.05202]"""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner_width)


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
        return upsample_conv(hidden, size, self.conv)
