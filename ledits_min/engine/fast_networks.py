"""Speed put on the networks from outside: their blocks with other forwards, chosen once, tested equal block by block.

`accelerate` gives every block of a UNet or VAE the class below that extends its own; weights, names and meaning stay.
A layer that has a hook, an adapter or quantised weights on it is still called as a module (`ops`).

Where kernels run, a block's `open` gives its result as a `sums.Sum`, which the norm behind it adds up; elsewhere `open`
gives what `at_once` computes. `forward` is `open`, added up.

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
    defers_sums,
    feed_forward,
    geglu,
    group_norm_silu,
    upsample_conv,
)
from ledits_min.engine.sums import (
    Hidden,
    Sum,
    as_rows,
    as_sum,
    bare_conv,
    bare_pointwise,
    conv_later,
    folded_bias,
    opened,
    parts,
    pointwise,
    together,
    value,
)
from ledits_min.engine.torch_private import is_called_plainly
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

    @property
    def attends(self) -> tuple[unet.Attend, unet.Attend]:
        """How tokens attend to each other, and how to the text."""
        if self.attention is None:
            return attention, attention
        return self.attention.self_attention, self.attention.cross_attention

    def keys_values_of(self, layer: FastAttention) -> tuple[Tensor, Tensor]:
        return layer.project(self.context) if self.keys_values is None else self.keys_values[layer]

    def time_of(self, hidden: Tensor) -> Tensor:
        """`time` for every entry of `hidden`; the rows of one input have the same."""
        if self.rows is None or len(hidden) == len(self.rows):
            return self.time
        return self.time.new_empty(len(hidden), self.time.shape[1]).index_copy_(0, self.rows, self.time)

    def spread(self, values: Tensor) -> Tensor:
        """`values`, one per input or one per row already, as one per row."""
        return values if self.rows is None or len(values) == len(self.rows) else values[self.rows]

    def spread_sum(self, hidden: Hidden) -> Hidden:
        """Likewise; what is one per row already goes on waiting."""
        waits = self.rows is None or len(parts(hidden)) == len(self.rows)
        return hidden if waits else self.spread(value(hidden))


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

    def predict(self, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        x_t = x_t.to(self.conv_in.weight.dtype)
        laid = x_t.contiguous(memory_format=torch.channels_last)
        if not defers_sums(laid, self.conv_in, self.conv_norm_out):
            return super().predict(x_t, conditioning)
        hidden: Hidden = conv_later(laid, self.conv_in)
        skips = [hidden]
        for block in self.down_blocks:
            hidden = opened(block, hidden, conditioning, skips)
        hidden = opened(self.mid_block, hidden, conditioning)
        for block in self.up_blocks:
            hidden = opened(block, hidden, conditioning, skips)
        return self.conv_out(as_sum(hidden).normed(self.conv_norm_out))

    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(group_norm_silu(hidden, self.conv_norm_out))

    def project(self, context: Tensor) -> KeysValues:
        """context (B, L, D) -> its keys and values (B, heads, L, C / heads) in every cross-attention."""
        context = context.to(self.conv_in.weight.dtype)
        crossing = [block.attn2 for block in self.modules() if isinstance(block, unet.TransformerBlock)]
        return {attention: attention.project(context) for attention in cast(list[FastAttention], crossing)}


class FastDownBlock(unet.DownBlock):
    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        found = cast(list[Hidden], skips)
        hidden = value(self.open(hidden, conditioning, found))
        skips[:] = map(value, found)
        return hidden

    def open(self, hidden: Hidden, conditioning: Conditioning, skips: list[Hidden]) -> Hidden:
        for resnet, attend in zip_longest(self.resnets, self.attentions):
            hidden = opened(resnet, hidden, conditioning)
            if attend is not None:
                hidden = opened(attend, hidden, conditioning)
            skips.append(hidden)
        for downsample in self.downsamplers:
            hidden = opened(downsample, hidden)
            skips.append(hidden)
        return hidden


class FastMidBlock(unet.MidBlock):
    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        return value(self.open(hidden, conditioning))

    def open(self, hidden: Hidden, conditioning: Conditioning) -> Hidden:
        hidden = opened(self.resnets[0], hidden, conditioning)
        for attend, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden = opened(resnet, opened(attend, hidden, conditioning), conditioning)
        return hidden


class FastUpBlock(unet.UpBlock):
    def forward(self, hidden: Tensor, conditioning: Conditioning, skips: list[Tensor]) -> Tensor:
        return value(self.open(hidden, conditioning, cast(list[Hidden], skips)))

    def open(self, hidden: Hidden, conditioning: Conditioning, skips: list[Hidden]) -> Hidden:
        assert isinstance(conditioning, FastConditioning)
        for resnet, attend in zip_longest(self.resnets, self.attentions):
            hidden, skip = conditioning.spread_sum(hidden), conditioning.spread(value(skips.pop()))
            if isinstance(resnet, FastResnetBlock) and is_called_plainly(resnet):
                hidden = resnet.open(hidden, conditioning, skip)
            else:
                hidden = resnet(torch.cat([value(hidden), skip], dim=1), conditioning)
            if attend is not None:
                hidden = opened(attend, hidden, conditioning)
        for upsample in self.upsamplers:
            hidden = opened(upsample, hidden, parts(skips[-1]).shape[-2:])
        return hidden


class FastResnetBlock(unet.ResnetBlock):
    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        return value(self.open(hidden, conditioning))

    def open(self, hidden: Hidden, conditioning: Conditioning, skip: Tensor | None = None) -> Hidden:
        """forward([hidden, skip], conditioning)"""
        assert isinstance(conditioning, FastConditioning)
        shortcut = self.conv_shortcut
        layers = [self.norm1, self.conv1, self.time_emb_proj, self.norm2, self.conv2]
        if not defers_sums(parts(hidden), *layers, *([] if shortcut is None else [shortcut])):
            both = value(hidden) if skip is None else torch.cat([value(hidden), skip], dim=1)
            return self.at_once(both, conditioning)
        normed = (hidden := as_sum(hidden)).normed(self.norm1, skip=skip)
        time = nn.functional.silu(conditioning.time_of(normed))
        time = nn.functional.linear(time, self.time_emb_proj.weight, folded_bias(self.time_emb_proj, self.conv1))
        normed = group_norm_silu(bare_conv(normed, self.conv1), self.norm2, add=time)
        changed = bare_conv(normed, self.conv2)
        if shortcut is None:
            return Sum(changed, self.conv2.bias, value(hidden))
        return Sum(changed, folded_bias(self.conv2, shortcut), bare_pointwise(value(hidden), skip, shortcut))

    def at_once(self, hidden: Tensor, conditioning: FastConditioning) -> Tensor:
        residual = hidden if self.conv_shortcut is None else conv(hidden, self.conv_shortcut)
        time = self.time_emb_proj(nn.functional.silu(conditioning.time_of(hidden)))
        hidden = conv(group_norm_silu(hidden, self.norm1), self.conv1)
        return add_conv(residual, group_norm_silu(hidden, self.norm2, add=time), self.conv2)


class FastTransformer(unet.Transformer):
    def forward(self, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        return value(self.open(hidden, conditioning))

    def open(self, hidden: Hidden, conditioning: Conditioning) -> Hidden:
        assert isinstance(conditioning, FastConditioning)
        if not defers_sums(parts(hidden), self.norm, self.proj_in, self.proj_out):
            return self.at_once(value(hidden), conditioning)
        hidden = as_sum(hidden)
        normed = hidden.normed(self.norm, silu=False)
        residual, size = conditioning.spread(value(hidden)), normed.shape[-2:]
        tokens: Hidden = pointwise(as_rows(normed).unflatten(0, (len(normed), -1)), self.proj_in)
        for block in self.transformer_blocks:
            tokens = opened(block, tokens, conditioning)
        changed = pointwise(value(tokens), self.proj_out)
        return Sum(changed.transpose(1, 2).unflatten(2, size), None, residual)

    def at_once(self, hidden: Tensor, conditioning: FastConditioning) -> Tensor:
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
        return value(self.open(tokens, conditioning))

    def open(self, tokens: Hidden, conditioning: Conditioning) -> Hidden:
        assert isinstance(conditioning, FastConditioning)
        attn1, attn2 = cast(FastAttention, self.attn1), cast(FastAttention, self.attn2)
        widen, _, narrow = self.ff.net
        widen = cast(unet.GEGLU, widen).proj
        layers = self.norm1, *attn1.layers, self.norm2, *attn2.layers, self.norm3, widen, narrow
        if not defers_sums(parts(tokens), *layers):
            return self.at_once(value(tokens), conditioning)
        on_self, on_text = conditioning.attends
        normed = (tokens := as_sum(tokens)).layer_normed(self.norm1)
        q, k, v = attn1.queries_keys_values(normed)
        tokens = Sum(attn1.attended(q, k, v, on_self), None, value(tokens))
        normed = conditioning.spread(tokens.layer_normed(self.norm2))
        q, (k, v) = attn2.split_heads(attn2.to_q(normed)), conditioning.keys_values_of(attn2)
        tokens = Sum(attn2.attended(q, k, v, on_text), None, conditioning.spread(value(tokens)))
        return Sum(narrow(geglu(widen(tokens.layer_normed(self.norm3)))), None, value(tokens))

    def at_once(self, tokens: Tensor, conditioning: FastConditioning) -> Tensor:
        on_self, on_text = conditioning.attends
        attn1, attn2 = cast(FastAttention, self.attn1), cast(FastAttention, self.attn2)
        normed = self.norm1(tokens)
        tokens = conditioning.spread(attn1.add_to(tokens, normed, attn1.project(normed), on_self))
        tokens = attn2.add_to(tokens, self.norm2(tokens), conditioning.keys_values_of(attn2), on_text)
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
        heads = self.heads_together(self.split_heads(self.to_q(tokens)), *keys_values, attend)
        return add_linear(residual, heads, cast(nn.Linear, self.to_out[0]))

    @property
    def layers(self) -> list[nn.Module]:
        return [self.to_q, self.to_k, self.to_v, self.to_out[0]]

    def queries_keys_values(self, tokens: Tensor) -> list[Tensor]:
        """Those of a self-attention, (B, heads, N, C / heads) each, by one product."""
        projected = nn.functional.linear(tokens, together(self.to_q, self.to_k, self.to_v))
        return [self.split_heads(each) for each in projected.chunk(3, dim=2)]

    def attended(self, q: Tensor, k: Tensor, v: Tensor, attend: unet.Attend) -> Tensor:
        """What `forward` gives, from queries, keys and values (B, heads, N or L, C / heads)."""
        return self.to_out[0](self.heads_together(q, k, v, attend))

    def heads_together(self, q: Tensor, k: Tensor, v: Tensor, attend: unet.Attend) -> Tensor:
        dtype = q.dtype
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        return attend(q, k, v).to(dtype).transpose(1, 2).flatten(2)


class FastDownsample(unet.Downsample):
    def forward(self, hidden: Tensor) -> Tensor:
        return value(self.open(hidden))

    def open(self, hidden: Hidden) -> Hidden:
        hidden = value(hidden)
        return conv_later(hidden, self.conv) if defers_sums(hidden, self.conv) else self.conv(hidden)


class FastUpsample(unet.Upsample):
    def forward(self, hidden: Tensor, size: torch.Size) -> Tensor:
        return value(self.open(hidden, size))

    def open(self, hidden: Hidden, size: torch.Size) -> Hidden:
        hidden = value(hidden)
        if not defers_sums(hidden, self.conv):
            return upsample_conv(hidden, size, self.conv)
        return conv_later(nn.functional.interpolate(hidden, size=tuple(size), mode="nearest"), self.conv)


class FastEncoder(vae.Encoder):
    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(group_norm_silu(hidden, self.conv_norm_out))


class FastDecoder(vae.Decoder):
    def head(self, hidden: Tensor) -> Tensor:
        return self.conv_out(group_norm_silu(hidden, self.conv_norm_out))


class FastVAEResnetBlock(vae.ResnetBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        shortcut = self.conv_shortcut
        layers = [self.norm1, self.conv1, self.norm2, self.conv2]
        if defers_sums(hidden, *layers, *([] if shortcut is None else [shortcut])):
            changed = bare_conv(group_norm_silu(hidden, self.norm1), self.conv1)
            changed = bare_conv(group_norm_silu(changed, self.norm2, add=self.conv1.bias), self.conv2)
            if shortcut is None:
                return value(Sum(changed, self.conv2.bias, hidden))
            return value(Sum(changed, folded_bias(self.conv2, shortcut), bare_pointwise(hidden, None, shortcut)))
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
    unet.DownBlock: FastDownBlock,
    unet.MidBlock: FastMidBlock,
    unet.UpBlock: FastUpBlock,
    unet.ResnetBlock: FastResnetBlock,
    unet.Transformer: FastTransformer,
    unet.TransformerBlock: FastTransformerBlock,
    unet.Attention: FastAttention,
    unet.Downsample: FastDownsample,
    unet.Upsample: FastUpsample,
    vae.Encoder: FastEncoder,
    vae.Decoder: FastDecoder,
    vae.ResnetBlock: FastVAEResnetBlock,
    vae.Attention: FastVAEAttention,
    vae.Upsample: FastVAEUpsample,
}
