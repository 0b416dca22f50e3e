"""Speed put on the networks from outside: their blocks with other forwards, chosen once, tested equal block by block.

`accelerate` gives every block of a UNet or VAE the class below that extends its own; weights, names and meaning stay.
A layer that has a hook, an adapter or quantised weights on it is still called as a module (`ops`).

The fast UNet also takes what a run would compute again and again: `embed`ded timesteps and `project`ed texts, and fewer
inputs than rows where several rows are about the same x_t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ledits_min import unet, vae
from ledits_min.engine.ops import (
    add_conv,
    add_linear,
    attention,
    conv,
    feed_forward,
    group_norm_silu,
    upsample_conv,
)
from ledits_min.unet import AttentionHook, Conditioning

Network = TypeVar("Network", unet.UNet, vae.VAE)
KeysValues = Mapping[unet.Attention, tuple[Tensor, Tensor]]  # what a text is to every cross-attention


def accelerate(network: Network) -> Network:
    """The network itself, each of its blocks with its fast forward."""
    for module in network.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
    return network


@dataclass(frozen=True)
class FastConditioning(Conditioning):
    """`Conditioning` of a batch whose rows may share inputs; with `keys_values` the text is projected already.

    rows (B,): where fewer inputs than B are given, which of them each row of the batch is about. Up to the first
    cross-attention, which is the first to look at the text, there is one map per input and not one per row.
    """

    keys_values: KeysValues | None = None
    rows: Tensor | None = None

    def time_of(self, hidden: Tensor) -> Tensor:
        """`time` for every entry of `hidden`; the rows of one input have the same."""
        if self.rows is None or len(hidden) == len(self.rows):
            return self.time
        return self.time.new_empty(len(hidden), self.time.shape[1]).index_copy_(0, self.rows, self.time)

    def spread(self, values: Tensor) -> Tensor:
        """`values`, one per input or one per row already, as one per row."""
        return values if self.rows is None or len(values) == len(self.rows) else values[self.rows]


class FastUNet(unet.UNet):
    """`UNet` that also takes time (B, time_width) in place of t, keys and values in place of the context, and `rows`.

    With rows int64 (B,), x_t (M, C, h, w) has fewer entries than t and context: row i is about x_t[rows[i]], and rows
    about the same x_t, whose t and `added` must be the same, share what is computed before the text is looked at. Then
    `attention` must not tell rows apart in self-attention, whose first has one entry per input.
    """

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        context: Tensor | KeysValues,
        added: Tensor | None = None,
        attention: AttentionHook | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        assert rows is None or len(x_t) < len(rows), "rows are for inputs that several share"
        dtype = self.conv_in.weight.dtype
        tokens, keys_values = (context.to(dtype), None) if isinstance(context, Tensor) else (x_t.new_empty(0), context)
        time = t if t.is_floating_point() else self.embed(t, added)
        return self.predict(x_t, FastConditioning(time, tokens, attention, keys_values, rows))

    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(group_norm_silu(hidden, self.conv_norm_out))

    def project(self, context: Tensor) -> KeysValues:
        """context (B, L, D) -> its keys and values (B, heads, L, C / heads) in every cross-attention."""
        context = context.to(self.conv_in.weight.dtype)
        crossing = [block.attn2 for block in self.modules() if isinstance(block, unet.TransformerBlock)]
        return {attention: attention.project(context) for attention in cast(list[FastAttention], crossing)}


class FastUpBlock(unet.UpBlock):
    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        assert isinstance(conditioning, FastConditioning)
        for resnet, attend in zip_longest(self.resnets, self.attentions):
            both = [conditioning.spread(hidden), conditioning.spread(skips.pop())]
            hidden = resnet(torch.cat(both, dim=1), conditioning)
            if attend is not None:
                hidden = attend(hidden, conditioning)
        for upsample in self.upsamplers:
            hidden = upsample(hidden, skips[-1].shape[-2:])
        return hidden


class FastResnetBlock(unet.ResnetBlock):
    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, FastConditioning)
        residual = hidden if self.conv_shortcut is None else conv(hidden, self.conv_shortcut)
        time = self.time_emb_proj(nn.functional.silu(conditioning.time_of(hidden)))
        hidden = conv(group_norm_silu(hidden, self.norm1), self.conv1)
        return add_conv(residual, group_norm_silu(hidden, self.norm2, add=time), self.conv2)


class FastTransformer(unet.Transformer):
    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, FastConditioning)
        residual, size = conditioning.spread(hidden), hidden.shape[-2:]
        hidden = group_norm_silu(hidden, self.norm, silu=False)
        if not self.on_tokens:
            hidden = conv(hidden, cast(nn.Conv2d, self.proj_in))
        tokens = hidden.flatten(2).transpose(1, 2)
        if self.on_tokens:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, conditioning)
        if self.on_tokens:
            return residual + self.proj_out(tokens).transpose(1, 2).unflatten(2, size)
        return add_conv(residual, tokens.transpose(1, 2).unflatten(2, size), cast(nn.Conv2d, self.proj_out))


class FastTransformerBlock(unet.TransformerBlock):
    def forward(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning, FastConditioning)
        on_self: unet.Attend = attention
        on_text: unet.Attend = attention
        if conditioning.attention is not None:
            on_self, on_text = conditioning.attention.self_attention, conditioning.attention.cross_attention
        attn1, attn2 = cast(FastAttention, self.attn1), cast(FastAttention, self.attn2)
        normed = self.norm1(tokens)
        tokens = conditioning.spread(attn1.add_to(tokens, normed, attn1.project(normed), on_self))
        projected = conditioning.keys_values
        keys_values = attn2.project(conditioning.context) if projected is None else projected[attn2]
        tokens = attn2.add_to(tokens, self.norm2(tokens), keys_values, on_text)
        widen, _, narrow = self.ff.net
        return feed_forward(tokens, self.norm3, cast(unet.GEGLU, widen).proj, cast(nn.Linear, narrow))


class FastAttention(unet.Attention):
    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of context (B, L, D), (B, heads, L, C / heads) each."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def add_to(
        self, residual: Tensor, tokens: Tensor, keys_values: tuple[Tensor, Tensor], attend: unet.Attend
    ) -> Tensor:
        """residual + what `forward` gives for a context whose keys and values are there."""
        q, (k, v) = self.split_heads(self.to_q(tokens)), keys_values
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        attended = attend(q, k, v).to(tokens.dtype)
        return add_linear(residual, attended.transpose(1, 2).flatten(2), cast(nn.Linear, self.to_out[0]))


class FastUpsample(unet.Upsample):
    def forward(self, hidden: Tensor, size: torch.Size) -> Tensor:
        return upsample_conv(hidden, size, self.conv)


class FastEncoder(vae.Encoder):
    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(group_norm_silu(hidden, self.conv_norm_out))


class FastDecoder(vae.Decoder):
    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(group_norm_silu(hidden, self.conv_norm_out))


class FastVAEResnetBlock(vae.ResnetBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        residual = hidden if self.conv_shortcut is None else conv(hidden, self.conv_shortcut)
        hidden = conv(group_norm_silu(hidden, self.norm1), self.conv1)
        return add_conv(residual, group_norm_silu(hidden, self.norm2), self.conv2)


class FastVAEAttention(vae.Attention):
    def forward(self, hidden: Tensor) -> Tensor:
        normed = group_norm_silu(hidden, self.group_norm, silu=False)
        tokens = normed.flatten(2).transpose(1, 2)[:, None]  # (B, 1, h w, C)
        attended: Tensor = self.to_out[0](attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return hidden + attended[:, 0].transpose(1, 2).reshape(hidden.shape)


class FastVAEUpsample(vae.Upsample):
    def forward(self, hidden: Tensor) -> Tensor:
        height, width = hidden.shape[-2:]
        return upsample_conv(hidden, (2 * height, 2 * width), self.conv)


_FAST: dict[type, type] = {
    unet.UNet: FastUNet,
    unet.UpBlock: FastUpBlock,
    unet.ResnetBlock: FastResnetBlock,
    unet.Transformer: FastTransformer,
    unet.TransformerBlock: FastTransformerBlock,
    unet.Attention: FastAttention,
    unet.Upsample: FastUpsample,
    vae.Encoder: FastEncoder,
    vae.Decoder: FastDecoder,
    vae.ResnetBlock: FastVAEResnetBlock,
    vae.Attention: FastVAEAttention,
    vae.Upsample: FastVAEUpsample,
}
